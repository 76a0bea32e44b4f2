"""Whole runs under a virtual clock in which everything fails: a few of them here, many in `bench.chaos`."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from bench.chaos import judged_run, run_many
from darts_async.learner.intake import Intake
from darts_async.protocol import TrainGroup
from darts_async.shaper.journal import Journal
from darts_async.shaper.routing import GeneratorPool
from darts_async.shaper.standing import AnyInput
from darts_async.simulation.chaos import draw_plan, run_chaos

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("first", [0, 1000, 2000, 3000])
def test_whatever_fails_nothing_is_lost_or_trained_twice_or_too_old_and_every_run_ends(first: int) -> None:
    tally = run_many(range(first, first + 10))
    assert not tally.failures
    assert tally.kills.total() > 10
    assert all(tally.kills[role] for role in ("generator", "reward", "shaper", "learner")) or first
    assert tally.faults["frames lost"] > 100


@pytest.mark.parametrize(
    "seed",
    [
        2,  # a generator told of a version before the learner told of its step
        75,  # a generator got what was meant for the one before it, and was not greeted yet
        796,  # the same, of the shaper
        1041,  # a generator that was in no group did not hear that it had been dropped
        586,  # the learner had published what a stop gave up, and its version was still waited for
        20373,  # a generator that was not heard of had decoded tokens, and the end was told without them
    ],
)
def test_runs_that_once_went_wrong(seed: int) -> None:
    judged_run(seed)


def test_the_same_seed_makes_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = run_chaos(draw_plan(7), tmp_path), run_chaos(draw_plan(7), tmp_path / "other")
    assert (one.duration_s, one.faults, one.finished) == (other.duration_s, other.faults, other.finished)


def test_a_shaper_that_writes_no_journal_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def append(self: Journal, inputs: Iterable[AnyInput]) -> None:
        pass

    monkeypatch.setattr(Journal, "append", append)
    assert run_many(range(12)).failures


def test_a_learner_that_takes_a_group_as_often_as_it_comes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: Intake, group: TrainGroup) -> None:
        self._by_step[group.step].append(group)

    monkeypatch.setattr(Intake, "take", take)
    assert run_many(range(30)).failures


def test_work_for_generators_without_the_current_weights_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GeneratorPool, "lowest_version", property(lambda self: 1000))
    assert run_many(range(5)).failures
