"""Whole runs under a virtual clock in which everything fails: a few of them here, many in `bench.chaos`."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import pytest

from bench.chaos import judged_run, run_many
from darts_async.learner.boundary import Boundary
from darts_async.learner.intake import Intake
from darts_async.learner.moves import Move
from darts_async.learner.state import LearnerState
from darts_async.protocol import MemberJoined, TrainGroup, UpdateApplied, UpdateFailed, UpdateReady
from darts_async.shaper.boundary import Boundary as ShaperBoundary
from darts_async.shaper.durable.journal import Journal
from darts_async.shaper.durable.replayable_state import AnyInput
from darts_async.shaper.ledger import Counted
from darts_async.shaper.rosters import GeneratorRoster
from darts_async.simulation.chaos.lies import lie_instead_of
from darts_async.simulation.chaos.plan import Hardship, config_of, draw_plan
from darts_async.simulation.chaos.power import DiskOfShaper
from darts_async.simulation.chaos.run import run_chaos
from darts_async.topology.run_files import JOURNAL_FILE, LEDGER_FILE

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
        20,  # the head of the journal named a place of the ledger that was void since a start-over
        300167,  # the sums counted steps that the learner was taking again
        500154,  # a learner that was greeted while it loaded told of its checkpoint before it said where it was
        600440,  # stopped while the learner had taken a step that the shaper did not know of yet: the judge was wrong
        600801,  # checkpoints that were damaged one after the other in one life: the run takes itself up again
        504067,  # the same
        20373,  # a generator that was not heard of had decoded tokens, and the end was told without them
    ],
)
def test_runs_that_once_went_wrong(seed: int) -> None:
    """What a seed draws depends on the code, so it may no longer come to that point."""
    judged_run(seed)


def seeds_with(is_meant: Callable[[Hardship], bool], num_seeds: int) -> list[int]:
    """The first whose plans are such, of runs that are not stopped."""
    plans = (draw_plan(seed) for seed in itertools.count())
    meant = (plan.seed for plan in plans if plan.stop_at_s is None and is_meant(plan.hardship))
    return list(itertools.islice(meant, num_seeds))


def faults_of(seeds: Iterable[int], wanted: Iterable[str] = ()) -> Counter[str]:
    """Of runs that pass; of no more than it takes to find what is wanted."""
    found = Counter[str]()
    for seed in seeds:
        found += judged_run(seed).faults
        if wanted and all(found[name] for name in wanted):
            break
    return found


@pytest.mark.parametrize("loss", ["unflushed", "anything"])
def test_runs_outlive_the_loss_of_the_ends_of_files(loss: str) -> None:
    found = faults_of(seeds_with(lambda hardship: hardship.loss == loss and len(hardship.outages_at_s) == 4, 6))
    kinds = ("without its end",) if loss == "unflushed" else ("without its end", "emptied", "gone", "with a wrong bit")
    assert all(found[f"shaper.journal {kind}"] + found[f"ledger.msgpack {kind}"] for kind in kinds), found


def test_runs_outlive_a_launcher_that_dies_while_processes_start() -> None:
    found = faults_of(seeds_with(lambda hardship: hardship.starts_slowly and hardship.outage_while_starting > 0.5, 5))
    assert found["outages while processes start"] > 5, found


@pytest.mark.parametrize("moment", ["last step taken", "model written", "end told"])
def test_runs_that_die_in_their_last_second_end_as_finished(moment: str) -> None:
    found = faults_of(seeds_with(lambda hardship: hardship.last_moment == moment, 6))
    assert sum(times for name, times in found.items() if moment in name) >= 2, found


def test_runs_outlive_processes_that_talk_nonsense() -> None:
    wanted = [f"nonsense refused by a {role}" for role in ("shaper", "generator", "learner")]
    wanted += [f"{role}s killed for nonsense" for role in ("generator", "shaper")]
    found = faults_of(seeds_with(lambda hardship: hardship.lies > 0.001, 50), wanted)
    assert all(found[name] for name in wanted), found


def test_runs_outlive_a_full_disk() -> None:
    wanted = [f"shapers that died of a full disk at the {file}" for file in ("journal", "ledger")]
    found = faults_of(seeds_with(lambda hardship: len(hardship.full_disks) == 2, 40), wanted)
    assert all(found[name] for name in wanted), found


@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_keeps_its_promise_has_what_was_flushed(seed: int, tmp_path: Path) -> None:
    disk = DiskOfShaper(tmp_path, Random(seed), Counter())
    ledger, journal = tmp_path / LEDGER_FILE, tmp_path / JOURNAL_FILE
    ledger.write_bytes(b"flushed")
    journal.write_bytes(b"old journal")
    disk.flushed(disk.sizes())
    for path in (ledger, journal):
        path.write_bytes(path.read_bytes() + b" and not")
    disk.keep_journal()
    (tmp_path / "new").write_bytes(b"new journal")
    (tmp_path / "new").replace(journal)
    disk.lose_unflushed()
    assert b"flushed and not".startswith(ledger.read_bytes())
    assert ledger.stat().st_size >= len(b"flushed")
    assert journal.read_bytes() == b"new journal" or journal.read_bytes().startswith(b"old journal")


def test_no_lie_could_be_the_truth() -> None:
    config = config_of(draw_plan(0))
    told = MemberJoined(0, 1), UpdateApplied(3, 1, 0.0), UpdateReady(3, 1), UpdateFailed(3, 1, "")
    for message in told:
        for seed in range(10):
            lie = lie_instead_of(message, Random(seed))
            assert lie is not None
            boundary = Boundary(config, Path("runs/it"))
            assert boundary.of_generator(message, newest_version=1, newest_epoch=3) is None
            assert boundary.of_generator(lie, newest_version=1, newest_epoch=3)  # type: ignore[arg-type]


def test_nonsense_that_is_taken_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShaperBoundary, "refusal", lambda *_: None)
    liars = seeds_with(lambda hardship: hardship.lies > 0.001, 8)
    assert any(run_many(range(seed, seed + 1)).failures for seed in liars)


def test_a_ledger_that_is_not_taken_back_to_its_journal_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "corrected_to", lambda *_: [])
    seeds = seeds_with(lambda hardship: hardship.loss == "anything" and len(hardship.outages_at_s) == 4, 6)
    assert any(run_many(range(seed, seed + 1)).failures for seed in seeds)


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


def test_a_learner_that_publishes_what_is_older_than_its_floor_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def next_move(self: LearnerState, really: Callable[[LearnerState], Move] = LearnerState.next_move) -> Move:
        self.floor = min(self.floor, 0)
        return really(self)

    monkeypatch.setattr(LearnerState, "next_move", next_move)
    assert run_many(range(10, 16)).failures


def test_work_for_generators_without_the_current_weights_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GeneratorRoster, "lowest_version", property(lambda self: 1000))
    assert run_many(range(5)).failures
