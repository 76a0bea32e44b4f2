"""Evaluations between the steps: beside training, complete, under known versions, and never in training's way."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from darts_async.config import EvaluationConfig
from darts_async.protocol import EvaluationCompleted, StepCompleted, VersionPublished, group_id_of
from darts_async.shaper.evaluation import Evaluation
from darts_async.shaper.group import RUNNING
from darts_async.shaper.phases import RunPhase
from darts_async.topology.roles import LEARNER
from tests.shaper.test_state import RULES, check_accounts
from tests.shaper.world import World, prompts, world_config

NUM_HELD_OUT = 3


def evaluating_world(
    *, share: float = 0.25, samples: int = 2, every: int = 1, steps: int = 4, **sections: dict
) -> World:
    evaluation = {"every_steps": every, "samples_per_prompt": samples, "max_slot_share": share}
    learner = {"steps": steps, "groups_per_step": 3}
    return World(world_config(evaluation=evaluation, learner=learner, **sections), num_held_out=NUM_HELD_OUT)


def reports(world: World) -> list[EvaluationCompleted]:
    return [message for message in world.to_launcher if isinstance(message, EvaluationCompleted)]


def evaluates(world: World, sample_id: int) -> bool:
    return world.purpose_of[group_id_of(sample_id)] == "evaluate"


def check_evaluations(world: World) -> None:
    """Each one that was due is reported once, on every held-out sample, or counted as skipped; no sample of it is
    ever touched by a rule, and none is of older weights than it says."""
    every, num_samples = world.config.evaluation.every_steps, world.config.evaluation.samples_per_prompt
    steps, found = world.config.learner.steps, reports(world)
    versions = [report.policy_version for report in found]
    due = list(range(every, steps, every)) if every else []
    assert versions == sorted(set(versions))
    assert {0, steps} <= set(versions) <= {0, steps, *due}
    assert len(found) + sum(report.num_skipped for report in found) == len(due) + 2
    for report in found:
        assert report.prompt_ids.tolist() == [p for p in range(NUM_HELD_OUT) for _ in range(num_samples)]
        assert report.policy_version <= report.newest_version <= steps
    assert (found[0].newest_version, found[-1].newest_version) == (0, steps)
    ends = [end for sample_id, end in world.outcomes.items() if evaluates(world, sample_id)]
    assert len(ends) == len(found) * NUM_HELD_OUT * num_samples
    assert {end.outcome for end in ends} == {"evaluated"}
    ends.sort(key=lambda end: end.sample_id)
    for number, end in enumerate(ends):
        report = found[number // (NUM_HELD_OUT * num_samples)]
        assert end.oldest_version is not None
        assert end.newest_version is not None
        assert report.policy_version <= end.oldest_version <= end.newest_version <= report.newest_version


@pytest.mark.parametrize("rule", ["none", "survivor", "early_stop", "saturation", "hazard", "tail batching"])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    every=st.integers(1, 4),
    share=st.sampled_from([0.01, 0.3, 1.0]),
    max_staleness=st.integers(0, 2),
)
def test_each_evaluation_reports_each_held_out_sample_once_whatever_training_does(
    rule: str, seed: int, every: int, share: float, max_staleness: int
) -> None:
    staleness = {"max_staleness": max_staleness}
    world = evaluating_world(share=share, every=every, steps=6, shaping=RULES[rule], staleness=staleness)
    world.run(random.Random(seed))
    check_accounts(world)
    check_evaluations(world)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), every=st.integers(1, 3), data=st.data())
def test_generators_may_die_or_fall_silent_under_an_evaluation(seed: int, every: int, data: st.DataObject) -> None:
    world = evaluating_world(every=every, steps=5, shaping=RULES["survivor"])
    rng = random.Random(seed)
    for _ in range(data.draw(st.integers(1, 6), label="deaths")):
        for _ in range(data.draw(st.integers(0, 120), label="moves before")):
            if world.state.phase is RunPhase.FINISHED or not world.moves():
                break
            move, *arguments = rng.choice(world.moves())
            move(*arguments)
            world.state.validate()
        if world.state.phase is RunPhase.TRAINING:
            rng.choice([world.die, world.fall_silent])(rng.choice(sorted(world.generators)))
            world.state.validate()
    world.run(rng)
    check_accounts(world)
    check_evaluations(world)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_every_step_is_taken_while_the_samples_of_one_evaluation_do_not_come_to_an_end(max_staleness: int) -> None:
    world = evaluating_world(steps=6, samples=4, staleness={"max_staleness": max_staleness})
    rng = random.Random(3)
    while world.state.num_steps < 6:
        moves = [m for m in world.moves() if not ends_an_evaluation(world, m)]
        move, *arguments = rng.choice(moves)
        move(*arguments)
        world.state.validate()
    assert len(reports(world)) == 1, "only the one before the first step is over"
    world.run(rng)
    check_accounts(world)
    check_evaluations(world)
    assert [(r.policy_version, r.newest_version, r.num_skipped) for r in reports(world)] == [
        (0, 0, 0),
        (1, 6, 4),  # those of versions 2 to 5
        (6, 6, 0),
    ]


def ends_an_evaluation(world: World, move: tuple) -> bool:
    """Whether a move would end a sample of an evaluation that is under way beside training."""
    return move[0] == world.finish and world.state.phase is RunPhase.TRAINING and evaluates(world, move[2])


@pytest.mark.parametrize(("share", "samples", "expected"), [(0.01, 4, 4), (0.25, 2, 4), (0.5, 2, 8), (1.0, 4, 12)])
def test_beside_training_held_out_samples_keep_to_their_share_of_the_slots(
    share: float, samples: int, expected: int
) -> None:
    world = evaluating_world(share=share, samples=samples, steps=8, generator={"num_slots": 8, "max_queued": 2})
    rng, most = random.Random(5), 0
    while world.state.num_steps < 8:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
        if 0 < world.state.num_steps < 8:
            running = [s for s in world.state.work.samples() if s.stage in RUNNING and evaluates(world, s.sample_id)]
            most = max(most, len(running))
    assert most == min(expected, NUM_HELD_OUT * samples)


def test_the_last_evaluation_begins_when_training_and_the_one_under_way_are_over() -> None:
    world = evaluating_world(steps=3, samples=4)
    rng = random.Random(1)
    while world.state.phase is not RunPhase.EVALUATING_AFTER:
        moves = [m for m in world.moves() if world.state.num_steps == 3 or not ends_an_evaluation(world, m)]
        move, *arguments = rng.choice(moves)
        move(*arguments)
    assert [r.policy_version for r in reports(world)] == [0, 1]
    assert {g.purpose for g in world.state.work.groups.values() if g.undecided} == {"evaluate"}
    assert {g.floor for g in world.state.work.groups.values() if g.undecided} == {3}


def test_an_evaluation_under_way_at_a_stop_is_cancelled_and_not_reported() -> None:
    world = evaluating_world(steps=50, samples=4)
    rng = random.Random(2)
    while not any(evaluates(world, s.sample_id) and s.num_tokens for s in world.state.work.samples()) or (
        world.state.num_steps < 2
    ):
        move, *arguments = rng.choice([m for m in world.moves() if not ends_an_evaluation(world, m)])
        move(*arguments)
    num_opened = len(world.opened)
    world.absorb(world.state.stop("interrupted", world.now_s))
    world.run(rng)
    assert len(world.opened) == num_opened, "its other prompts are left"
    assert [r.policy_version for r in reports(world)] == [0]
    assert set(world.ended.values()) == {1}
    assert sum(world.finished.tokens_by_outcome.values()) == world.num_decoded
    ends = [end for sample_id, end in world.outcomes.items() if evaluates(world, sample_id)]
    assert {end.outcome for end in ends} == {"evaluated", "cancelled"}


def test_a_version_that_is_announced_again_is_evaluated_once() -> None:
    world = evaluating_world(every=2, steps=6)
    rng = random.Random(4)
    while world.state.phase is not RunPhase.FINISHED:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
        if all(generator.version == world.version for generator in world.generators.values()):
            world.feed(LEARNER.first, VersionPublished(world.version))
    check_evaluations(world)


def test_without_a_setting_there_are_two_evaluations_and_a_metric_line_per_step() -> None:
    world = evaluating_world(every=0)
    world.run(random.Random(7))
    check_evaluations(world)
    assert [r.policy_version for r in reports(world)] == [0, 4]
    assert sum(isinstance(m, StepCompleted) for m in world.to_launcher) == 4


def test_evaluations_of_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"every_steps is 5, but evaluation\.samples_per_prompt is 0"):
        EvaluationConfig(every_steps=5, samples_per_prompt=0)


def test_the_prompts_of_each_set_are_told_apart() -> None:
    named = [replace(prompt, part=part) for prompt, part in zip(prompts(3), ("", "probe", ""), strict=True)]
    work = World(world_config()).state.work
    alone, several = (Evaluation(EvaluationConfig(), work, tuple(held_out)) for held_out in (prompts(3), named))
    assert alone.prompts_by_set == {}
    assert several.prompts_by_set == {"prompts": [0, 2], "probe": [1]}
