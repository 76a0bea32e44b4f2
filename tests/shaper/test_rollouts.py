"""Which groups are kept to be looked at: whole, each in the file of its step, and in no other."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig
from darts_async.prompts.source import Prompt
from darts_async.protocol import group_id_of, sample_id_of
from darts_async.rollouts import FileName
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.outbox import Output
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.rollouts import MAX_UNWRITTEN, RolloutFile, Rollouts
from darts_async.shaper.state import ShaperState
from tests.shaper.durable.test_snapshot import copy_of
from tests.shaper.test_state import RULES
from tests.shaper.world import World, world_config


class Keeper(World):
    """A world whose files are written at some later time, each in place of an earlier one of its name."""

    def __init__(self, config: RunConfig, rng: random.Random, **world: Any) -> None:
        self.files: dict[FileName, RolloutFile] = {}
        self.num_writes: Counter[FileName] = Counter()
        self._rng = rng
        super().__init__(config, **world)

    def absorb(self, outputs: list[Output]) -> None:
        super().absorb(outputs)
        if self._rng.random() < 0.3:
            self.write()

    def write(self) -> None:
        for file in self.state.work.rollouts.unwritten:
            self.files[file.name] = file
            self.num_writes[file.name] += 1
            self.state.work.rollouts.written(file.serial, is_given_up=False)

    def shown(self, kind: str) -> dict[int, list[int]]:
        """The ids of the groups in the files of a kind, by number."""
        return {
            name.number: [group.group_id for group in file.groups]
            for name, file in self.files.items()
            if name.kind == kind
        }


def kept_world(seed: int, *, per_step: int = 3, **sections: Any) -> Keeper:
    rng = random.Random(seed)
    world = Keeper(world_config(telemetry={"sample_groups": per_step}, **sections), rng)
    world.run(rng)
    world.write()
    return world


def check_shown(world: Keeper) -> None:
    """Every file has whole groups of its step, as the ledger has them."""
    ids = [group_id for groups in world.shown("train").values() for group_id in groups]
    assert len(ids) == len(set(ids)), "no group is in two files"
    for name, file in world.files.items():
        for group in file.groups:
            trained = {world.outcomes[s.sample_id].step for s in group.samples} - {None}
            assert trained <= {name.number}, (name, trained)
            assert [s.sample_id for s in group.samples] == sorted(s.sample_id for s in group.samples)
            for sample in group.samples:
                end = world.outcomes[sample.sample_id]
                said = sample.end_outcome, sample.end_reason, sample.num_tokens, sample.reward
                assert said == (end.outcome, end.reason, end.num_tokens, end.reward)
                assert len(sample.token_ids()) == end.num_tokens, "also of those that were cancelled"
                assert len(sample.decoded_by) >= bool(end.num_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), max_staleness=st.integers(0, 2))
def test_in_any_interleaving_every_group_is_in_the_file_of_its_step_as_a_whole(
    rule: str, seed: int, max_staleness: int
) -> None:
    world = kept_world(seed, shaping=RULES[rule], staleness={"max_staleness": max_staleness})
    check_shown(world)
    steps = {e.step for e in world.outcomes.values() if e.outcome == "trained"}
    trained = {group_id_of(e.sample_id) for e in world.outcomes.values() if e.outcome == "trained"}
    shown = {group_id for groups in world.shown("train").values() for group_id in groups}
    assert steps <= world.shown("train").keys()
    assert trained <= shown, "all groups of a step were asked for"
    assert world.shown("held-out").keys() == {0, world.config.learner.steps}
    assert all(len(groups) == world.num_held_out for groups in world.shown("held-out").values())
    assert not world.state.work.rollouts.unwritten


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), deaths=st.integers(1, 4))
def test_deaths_of_generators_and_learners_change_nothing_of_it(seed: int, deaths: int) -> None:
    rng = random.Random(seed)
    world = Keeper(world_config(telemetry={"sample_groups": 3}), rng)
    for _ in range(deaths):
        for _ in range(rng.randrange(200)):
            if world.state.phase is RunPhase.FINISHED or not world.moves():
                break
            move, *arguments = rng.choice(world.moves())
            move(*arguments)
        if world.state.phase is not RunPhase.FINISHED:
            rng.choice([lambda: world.die("generator/0"), world.learner_dies])()
    world.run(rng)
    world.write()
    check_shown(world)
    assert world.shown("train").keys() >= set(range(world.config.learner.steps))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), num_moves=st.integers(0, 300))
def test_what_was_not_written_is_written_by_the_process_that_takes_the_place(seed: int, num_moves: int) -> None:
    rng = random.Random(seed)
    world = Keeper(world_config(telemetry={"sample_groups": 3}), rng)
    for _ in range(num_moves):
        if world.state.phase is RunPhase.FINISHED or not world.moves():
            break
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
    again: ShaperState = copy_of(world, world.state)
    before = [(file.serial, file.name, len(file.groups)) for file in world.state.work.rollouts.unwritten]
    assert [(file.serial, file.name, len(file.groups)) for file in again.work.rollouts.unwritten] == before
    world.state = again
    world.run(rng)
    world.write()
    check_shown(world)
    assert world.shown("train").keys() >= set(range(world.config.learner.steps))


def test_nothing_is_kept_where_nothing_is_asked_for() -> None:
    world = kept_world(3, per_step=0)
    assert not world.files
    assert not any(s.chunks for group in world.state.work.groups.values() for s in group.samples)


@pytest.mark.parametrize(("per_step", "groups_per_step"), [(1, 64), (4, 64), (3, 4), (5, 7), (4, 4), (9, 4)])
def test_so_many_groups_of_each_step_are_kept_whatever_they_are_like(per_step: int, groups_per_step: int) -> None:
    config = {"telemetry": {"sample_groups": per_step}, "learner": {"steps": 4, "groups_per_step": groups_per_step}}
    rollouts = Rollouts(world_config(**config))
    for first in (0, groups_per_step, 17):
        kept = [rollouts.wants(group_id, "train") for group_id in range(first, first + groups_per_step)]
        assert sum(kept) == min(per_step, groups_per_step)
    assert all(rollouts.wants(group_id, "evaluate") for group_id in range(9))


def test_groups_that_come_to_nothing_are_shown_at_once_and_only_a_few_of_them() -> None:
    world = Keeper(world_config(telemetry={"sample_groups": 2}, evaluation={"samples_per_prompt": 0}), random.Random(1))
    rng = random.Random(1)
    while len(world.dropped) < 12:  # every reward fails
        moves = [move for move in world.moves() if move[0] != world.score]
        if world.to_score and (rng.random() < 0.5 or not moves):
            world.score(fails=True)
        else:
            move, *arguments = rng.choice(moves)
            move(*arguments)
        world.state.validate()
    world.write()
    [shown] = world.shown("train").items()
    assert shown[0] == 0
    assert 0 < len(shown[1]) <= 2
    file = world.files[FileName("train", 0)]
    reasons = {sample.end_reason for group in file.groups for sample in group.samples}
    assert "reward_raised" in reasons


def test_files_that_are_given_up_are_counted_and_those_of_a_name_are_one() -> None:
    world = Keeper(world_config(telemetry={"sample_groups": 3}), random.Random(5))
    world.write = lambda: None  # type: ignore[method-assign]
    world.run(random.Random(5))
    rollouts = world.state.work.rollouts
    names = [file.name for file in rollouts.unwritten]
    assert len(names) == len(set(names)) >= world.config.learner.steps
    num_groups = sum(len(file.groups) for file in rollouts.unwritten)
    for file in rollouts.unwritten:
        rollouts.written(file.serial, is_given_up=True)
        rollouts.written(file.serial, is_given_up=True)
    assert rollouts.num_given_up == num_groups
    assert not rollouts.unwritten


def test_where_nothing_writes_them_the_oldest_files_are_given_up() -> None:
    rollouts = Rollouts(world_config(telemetry={"sample_groups": 3}))
    prompt = Prompt(1, "1 +1 =", np.array([1, 2], np.int32), "2", "{}")
    for version in range(MAX_UNWRITTEN + 5):
        rollouts.begin_evaluation()
        rollouts.ended(Group(version, prompt, "evaluate", [Sample(sample_id_of(version, 0), Stage.ENDED)]))
        rollouts.close_evaluation(version)
        rollouts.validate(0)
    assert [file.name.number for file in rollouts.unwritten] == list(range(5, MAX_UNWRITTEN + 5))
    assert rollouts.num_given_up == 5
