"""The shaper's state machine under any interleaving."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.errors import DataError
from darts_async.protocol import (
    Cancel,
    EvaluationCompleted,
    GroupsCommitted,
    SampleFinished,
    Score,
    ScoreFailed,
    StepCompleted,
    group_id_of,
    sample_id_of,
)
from darts_async.shaper.group import Group, Stage
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.prompt_queue import MAX_RETRIES_PER_PROMPT
from darts_async.shaper.training import Training
from darts_async.topology.roles import LEARNER
from tests.shaper.world import World, world_config

RULES = {
    "none": {"rule": "none", "keep": 4, "launch": 4},
    "dual_end": {},
    "early_stop": {"early_stop": True},
    "survivor": {"rule": "survivor"},
    "one_survivor_of_many": {"rule": "survivor", "launch": 12},
    "random": {"rule": "random", "guard": True},
    "shortest": {"rule": "shortest", "early_stop": True},
    "longest": {"rule": "longest", "order": "completion"},
    "qlpo": {"rule": "qlpo", "guard": True},
    "unbiased survivor": {"rule": "survivor", "shortest": 2, "longest": 2, "weight_power": 1.0, "baseline": "history"},
    "utility": {"redundancy": {"total": "utility", "split": "paper", "batch": 5}},
    "placebo": {"redundancy": {"total": "fixed", "split": "shuffled"}},
    "saturation": {"redundancy": {"total": "fixed", "split": "reward_aware"}, "pruning": {"mode": "saturation"}},
    "tail batching": {"overcommit": 1.5},
    "tail batching of survivors": {"rule": "survivor", "launch": 8, "overcommit": 2.0},
    "one of the user's": {"rule": "tests.fakes.rules:Alternating"},
    "hazard": {"launch": 8, "pruning": {"mode": "hazard", "threshold": 0.02, "spare_probability": 0.3}},
}


def finished_world(seed: int, *, shaping: dict, num_generators: int = 2, **sections: dict) -> World:
    world = World(world_config(shaping=shaping, **sections), num_generators)
    world.run(random.Random(seed))
    return world


def check_accounts(world: World) -> None:
    """Every sample ended once; every decoded token has one outcome; every step had its groups."""
    config = world.config
    assert set(world.ended.values()) == {1}
    assert all(e.reason for e in world.outcomes.values())
    assert sum(world.finished.tokens_by_outcome.values()) == world.num_decoded
    assert world.finished.num_steps == config.learner.steps
    aborted = {e.sample_id for e in world.outcomes.values() if e.reason in ("hazard", config.shaping.rule)}
    assert not aborted & world.scored, "an aborted sample never reaches a reward"
    assert {world.outcomes[sample_id].outcome for sample_id in aborted} <= {"cancelled"}
    sizes = Counter(group_id_of(e.sample_id) for e in world.outcomes.values() if e.outcome == "trained")
    assert len(sizes) == config.learner.steps * config.learner.groups_per_step
    without_reward = {group_id_of(e.sample_id) for e in world.outcomes.values() if e.reason.startswith("reward_")}
    for group_id, size in sizes.items():
        fewest = config.shaping.smallest_group if group_id in without_reward else config.shaping.keep
        assert fewest <= size <= config.shaping.keep, group_id
    assert sum(world.finished.tokens_by_staleness.values()) == world.finished.tokens_by_outcome["trained"]
    assert max(world.finished.tokens_by_staleness) <= config.staleness.max_staleness
    assert world.max_staleness_seen <= config.staleness.max_staleness


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), max_staleness=st.integers(0, 3), num_generators=st.integers(1, 3))
def test_any_interleaving_ends_with_every_sample_ended_once_and_nothing_over_stale(
    rule: str, seed: int, max_staleness: int, num_generators: int
) -> None:
    staleness = {"max_staleness": max_staleness}
    world = finished_world(seed, shaping=RULES[rule], num_generators=num_generators, staleness=staleness)
    check_accounts(world)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_generators_may_die_or_fall_silent_at_any_time_and_nothing_is_lost(seed: int, data: st.DataObject) -> None:
    world = World(world_config(shaping=RULES[data.draw(st.sampled_from(sorted(RULES)), label="rule")]))
    rng = random.Random(seed)
    for _ in range(data.draw(st.integers(1, 6), label="deaths")):
        for _ in range(data.draw(st.integers(0, 150), label="moves before")):
            if world.state.phase is RunPhase.FINISHED or not world.moves():
                break
            move, *arguments = rng.choice(world.moves())
            move(*arguments)
            world.absorb(world.state.tick(world.now_s))
            world.state.validate()
        if world.state.phase is RunPhase.TRAINING:
            rng.choice([world.die, world.fall_silent])(rng.choice(sorted(world.generators)))
            world.state.validate()
    world.run(rng)
    check_accounts(world)


def run_with_failures(world: World, rng: random.Random, fails: Callable[[Score], bool]) -> int:
    """Play to the end; returns how many rewards failed."""
    num_failed = 0
    while world.state.phase is not RunPhase.FINISHED:
        move, *arguments = rng.choice(world.moves())
        if move == world.score and fails(world.to_score[0]):
            world.score(fails=True)
            num_failed += 1
        else:
            move(*arguments)
        world.state.validate()
    return num_failed


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_group_that_lost_rewards_is_trained_on_the_others(rule: str, seed: int) -> None:
    few = {"learner": {"steps": 3, "groups_per_step": 2}, "evaluation": {"samples_per_prompt": 0}}
    world, rng = World(world_config(shaping=RULES[rule], **few)), random.Random(seed)
    num_failed = run_with_failures(world, rng, lambda _: rng.random() < 0.3)
    check_accounts(world)
    failed = [e for e in world.outcomes.values() if e.reason.startswith("reward_")]
    assert 0 < len(failed) <= num_failed  # nobody asks about those of groups that were cut meanwhile
    assert all(e.outcome == "filtered" and e.reward is None for e in failed)
    assert all(e.reward is not None for e in world.outcomes.values() if e.outcome == "trained")
    assert world.finished.failed_rewards == {"raised": len(failed)}
    assert world.finished.num_rewards <= len(world.scored)


@pytest.mark.parametrize(
    ("rule", "baseline"),
    [
        ("none", "group"),
        ("survivor", "group"),
        ("unbiased survivor", "history"),
        ("unbiased survivor", "leave_one_out"),
    ],
)
def test_a_reward_that_fails_on_every_fifth_response_costs_hardly_a_group(rule: str, baseline: str) -> None:
    eight = {"keep": 8, "launch": 8 if rule == "none" else 10, "shortest": 6, "longest": 2, "baseline": baseline}
    world = World(world_config(shaping=RULES[rule] | eight, evaluation={"samples_per_prompt": 0}))
    num_responses = count(1)
    num_failed = run_with_failures(world, random.Random(0), lambda _: next(num_responses) % 5 == 0)
    check_accounts(world)
    assert num_failed > 10
    assert not [dropped for dropped in world.dropped if dropped.reason == "too_few_rewards"]
    metrics = [m.metrics for m in world.to_launcher if isinstance(m, StepCompleted)]
    assert 0.1 < np.mean([m["reward/failed_share"] for m in metrics]) < 0.3
    assert all(4 <= m["groups/kept_mean"] < 8 for m in metrics)
    assert 0 < metrics[0]["run/failed_rewards"] <= metrics[-1]["run/failed_rewards"] <= num_failed


def test_a_group_below_the_minimum_is_dropped_and_one_at_the_minimum_is_trained() -> None:
    shaping = {"rule": "none", "keep": 4, "launch": 4, "min_keep": 3}
    world = World(world_config(shaping=shaping, learner={"steps": 1}, evaluation={"samples_per_prompt": 0}))

    def fails(score: Score) -> bool:
        return score.sample_id - sample_id_of(group_id_of(score.sample_id), 0) < (group_id_of(score.sample_id) % 3)

    run_with_failures(world, random.Random(1), fails)
    check_accounts(world)
    sizes = Counter(group_id_of(e.sample_id) for e in world.outcomes.values() if e.outcome == "trained")
    assert all(size == 4 - group_id % 3 for group_id, size in sizes.items())
    dropped = {dropped.group_id for dropped in world.dropped if dropped.reason == "too_few_rewards"}
    assert dropped
    assert all(group_id % 3 == 2 for group_id in dropped)


def test_a_prompt_whose_rewards_always_fail_is_asked_again_three_times_and_then_left() -> None:
    world = World(world_config(learner={"steps": 6}, evaluation={"samples_per_prompt": 0}))
    run_with_failures(world, random.Random(2), lambda score: score.prompt == "p7")
    check_accounts(world)
    opened = Counter(world.prompt_of.values())
    assert opened[7] >= 2
    num_visits = world.opened[-1].cursor // 20 + 1
    assert opened[7] <= MAX_RETRIES_PER_PROMPT + num_visits
    assert not [
        e for e in world.outcomes.values() if e.outcome == "trained" and world.prompt_of[group_id_of(e.sample_id)] == 7
    ]


def test_the_first_failure_of_each_kind_is_told_at_once_and_all_at_the_end() -> None:
    world = World(world_config(evaluation={"samples_per_prompt": 0}))
    rng, kinds = random.Random(3), iter(["raised", "timeout", "raised", "timeout", "limit"])
    while world.state.phase is not RunPhase.FINISHED:
        move, *arguments = rng.choice(world.moves())
        kind = next(kinds, None) if move == world.score else None
        if kind is not None:
            world.feed("reward/0", ScoreFailed(world.to_score.popleft().sample_id, kind, f"why it {kind}"))
        else:
            move(*arguments)
    told = [m for m in world.to_launcher if isinstance(m, ScoreFailed)]
    assert [(m.kind, m.error) for m in told] == [(k, f"why it {k}") for k in ("raised", "timeout", "limit")]
    assert world.finished.failed_rewards == {"raised": 2, "timeout": 2, "limit": 1}
    assert world.finished.first_failures == {m.kind: m.error for m in told}


def test_synchronous_mode_opens_exactly_one_step_of_groups_per_version() -> None:
    world = World(world_config(staleness={"max_staleness": 0}, generator={"num_slots": 100}))
    rng = random.Random(0)
    while world.state.phase is not RunPhase.FINISHED:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
    opened = Counter(group.floor for group in world.opened if group.purpose == "train")
    steps, groups_per_step = world.config.learner.steps, world.config.learner.groups_per_step
    assert opened == dict.fromkeys(range(steps), groups_per_step)
    assert set(world.finished.tokens_by_staleness) == {0}


def test_a_group_of_survivors_cancels_all_but_the_tail_sample_at_the_kth_finish() -> None:
    world = World(world_config(shaping={"rule": "survivor", "launch": 8}, evaluation={"samples_per_prompt": 0}))
    name = "generator/0"
    while world.generators[name].inbox:
        world.receive(name)
    group = min(s // 4096 for s in world.generators[name].running)
    samples = [s for s in world.generators[name].running if s // 4096 == group]
    world.decode(name, samples)
    for sample in samples[:3]:
        assert not any(isinstance(m, Cancel) for m in world.generators[name].inbox)
        world.finish(name, sample)
    cancelled = {m.sample_id for m in world.generators[name].inbox if isinstance(m, Cancel)}
    assert len(cancelled) == 8 - 3 - 1
    assert cancelled < set(samples[3:])


def test_a_cancelled_sample_that_finishes_first_is_still_cancelled_and_never_judged() -> None:
    world = World(world_config(shaping={"rule": "survivor", "launch": 6}, evaluation={"samples_per_prompt": 0}))
    name = "generator/0"
    while world.generators[name].inbox:
        world.receive(name)
    group = min(s // 4096 for s in world.generators[name].running)
    samples = [s for s in world.generators[name].running if s // 4096 == group]
    for sample in samples[:3]:
        world.finish(name, sample)
    scored = len(world.to_score)
    late = next(m.sample_id for m in world.generators[name].inbox if isinstance(m, Cancel))
    world.finish(name, late)
    assert len(world.to_score) == scored
    assert world.outcomes[late].outcome == "cancelled"
    while world.generators[name].inbox:  # the cancel finds nothing and is not answered
        world.receive(name)
    world.run(random.Random(1))
    check_accounts(world)


def test_messages_told_twice_change_nothing() -> None:
    world = World(world_config())
    rng = random.Random(3)
    while world.state.phase is not RunPhase.FINISHED:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
        if move == world.finish:
            told = SampleFinished(arguments[1], "stop", 1)  # which the boundary would not let through
            world.absorb(world.state.handle(arguments[0], told, world.now_s))
        if move == world.learn:
            done = [e.sample_id // 4096 for e in world.outcomes.values() if e.step == world.version - 1]
            world.feed(LEARNER.first, GroupsCommitted(world.version - 1, np.array(done)))
        world.state.validate()
    check_accounts(world)


@pytest.mark.parametrize("rule", ["tail batching", "tail batching of survivors"])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_spares_that_are_not_asked_again_would_have_answered_the_same(
    rule: str, max_staleness: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"staleness": {"max_staleness": max_staleness}, "learner": {"steps": 8}}
    world = finished_world(seed, shaping=RULES[rule], **sections)
    assert any(dropped.reason == "overcommitted" for dropped in world.dropped), "there were spares to be cut"
    never = property(lambda self: None, lambda self, value: None)
    monkeypatch.setattr(Training, "_used_at", never, raising=False)
    monkeypatch.setattr(Training, "_cut_at_step", never, raising=False)
    assert finished_world(seed, shaping=RULES[rule], **sections).ledger == world.ledger


def test_overcommitted_groups_replace_slow_ones_and_cut_prompts_come_back() -> None:
    """Synchronous, four groups to a step and two spares: whichever four complete first make the step."""
    config = world_config(
        learner={"steps": 2, "groups_per_step": 4},
        shaping={"rule": "none", "launch": 4, "overcommit": 1.5},
        staleness={"max_staleness": 0},
        generator={"num_slots": 100},
        evaluation={"samples_per_prompt": 0},
    )
    world = World(config, num_generators=1)
    name = "generator/0"
    while world.generators[name].inbox:
        world.receive(name)
    assert len({s // 4096 for s in world.generators[name].running}) == 6
    slow = {0, 1}
    for sample in sorted(world.generators[name].running):
        if sample // 4096 not in slow:
            world.finish(name, sample)
    while world.to_score:
        world.score()
    assert {g.group_id for g in world.step_groups} == {2, 3, 4, 5}
    assert {d.group_id for d in world.dropped} == slow
    assert {d.reason for d in world.dropped} == {"overcommitted"}
    cut_prompts = {world.prompt_of[group] for group in slow}
    world.run(random.Random(0))
    check_accounts(world)
    again = [group for group, prompt in world.prompt_of.items() if prompt in cut_prompts and group not in slow]
    assert {world.outcomes[group * 4096].outcome for group in again} == {"trained"}, "and then they have no rivals"


def test_hazard_pruning_aborts_stragglers_as_their_tokens_stream() -> None:
    """Lengths are spread widely, so whoever has run for long is expected to run for long."""
    shaping = {"launch": 8, "pruning": {"mode": "hazard", "threshold": 2.0, "spare_probability": 0.0}}
    world = World(world_config(shaping=shaping, evaluation={"samples_per_prompt": 0}), num_generators=1)
    lengths = [3, 6, 10, 20, 40]
    for visit in range(100):
        world.state.planner.history.observe(visit % 20, lengths, [], [0.0, 1.0])
    name = "generator/0"
    while world.generators[name].inbox:
        world.receive(name)
    samples = [s for s in world.generators[name].running if s // 4096 == 0]
    for sample, length in zip(samples, lengths, strict=False):
        world.decode(name, [sample], length - 1)
        world.finish(name, sample)
    while world.to_score:
        world.score()
    world.absorb(world.state.tick(world.now_s))
    assert not any(isinstance(m, Cancel) for m in world.generators[name].inbox)
    world.decode(name, samples[5:7], 150)
    world.absorb(world.state.tick(world.now_s))
    cancelled = {m.sample_id for m in world.generators[name].inbox if isinstance(m, Cancel)}
    assert cancelled == set(samples[5:7]), "the one that has not grown old goes on"
    world.run(random.Random(0))
    check_accounts(world)
    assert {world.outcomes[s].reason for s in cancelled} == {"hazard"}


def test_redundancy_stays_between_keep_and_twice_that_and_falls_to_keep_without_spread() -> None:
    """All responses of this world are of nearly one length."""
    shaping = {"redundancy": {"total": "utility", "split": "paper"}}
    config = world_config(shaping=shaping, learner={"steps": 30}, evaluation={"samples_per_prompt": 0})
    world = World(config)
    rng = random.Random(0)
    while world.state.phase is not RunPhase.FINISHED:
        moves = [m for m in world.moves() if m[0] != world.decode]
        move, *arguments = rng.choice(moves)
        move(*arguments)
    means = [m.metrics["redundancy/mean"] for m in world.to_launcher if isinstance(m, StepCompleted)]
    assert all(4 <= mean <= 8 for mean in means)
    assert means[-1] == 4, "and the metrics say so"


def test_a_group_that_alone_keeps_the_learner_waiting_is_cut_and_asked_again() -> None:
    config = world_config(
        staleness={"max_staleness": 0, "cut_after_s": 5.0},
        generator={"num_slots": 100},
        evaluation={"samples_per_prompt": 0},
    )
    world = World(config, num_generators=1)
    name = "generator/0"
    while world.generators[name].inbox:
        world.receive(name)
    slow = min(world.generators[name].running)
    for sample in sorted(world.generators[name].running):
        if sample != slow:
            world.finish(name, sample)
    while world.to_score:
        world.score()
    assert len(world.step_groups) == config.learner.groups_per_step - 1
    world.absorb(world.state.tick(world.now_s + 4.0))
    assert not world.dropped
    world.absorb(world.state.tick(world.now_s + 6.0))
    assert [d.group_id for d in world.dropped] == [slow // 4096]
    world.run(random.Random(0))
    check_accounts(world)
    assert world.outcomes[slow].outcome == "stale"


def test_a_stop_cancels_what_runs_and_accounts_for_every_token() -> None:
    world = World(world_config())
    rng = random.Random(5)
    while world.version < 2:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
    world.absorb(world.state.stop("interrupted", world.now_s))
    world.run(rng)
    assert world.finished.reason == "interrupted"
    assert set(world.ended.values()) == {1}
    assert sum(world.finished.tokens_by_outcome.values()) == world.num_decoded


def waits_for_cancels(group: Group) -> bool:
    return not group.undecided and bool(group.at(Stage.CANCELLING))


def is_late(world: World, move: Callable[..., None], *arguments: Any) -> bool:
    """A generator takes no notice of a cancel."""
    if move not in (world.receive, world.finish):
        return False
    inbox = world.generators[arguments[0]].inbox
    cancelled = {command.sample_id for command in inbox if isinstance(command, Cancel)}
    return arguments[1] in cancelled if move == world.finish else isinstance(inbox[0], Cancel)


@pytest.mark.parametrize("how", ["stopped", "taken up without the ledger"])
@pytest.mark.parametrize("seed", range(12))
def test_no_prompt_is_asked_twice_when_all_that_is_open_is_given_up(seed: int, how: str) -> None:
    """Groups that came to nothing before, and those that were trained, may still wait for a sample to be cancelled."""
    config = world_config(shaping=RULES["shortest"] | {"overcommit": 1.5})
    world, rng = World(config), random.Random(seed)
    while world.version < 2 or not any(map(waits_for_cancels, world.state.work.groups.values())):
        moves = [move for move in world.moves() if rng.random() < 0.05 or not is_late(world, *move)]
        move, *arguments = rng.choice(moves or world.moves())
        world.score(fails=rng.random() < 0.15) if move == world.score else move(*arguments)
    training = world.state.training
    if how == "stopped":
        world.absorb(world.state.stop("enough", world.now_s))
        world.absorb(world.state.abandon(world.now_s))
    else:
        world.absorb(world.state.start_over(world.now_s, 2, world.state.num_steps))
    state = training.to_state()
    asked = [planned.prompt.prompt_id for planned in state.queue.again]
    trained = [world.prompt_of[group_id] for groups in world.history for group_id in groups]
    assert training.cursor <= 20, "in the first pass through the prompts"
    assert len(set(asked + trained)) == len(asked) + len(trained), (sorted(asked), sorted(trained))


def test_a_slow_group_of_its_own_step_is_waited_for() -> None:
    """With one group to a step nobody else waits, however long it takes."""
    config = world_config(
        learner={"steps": 2, "groups_per_step": 1},
        staleness={"max_staleness": 0, "cut_after_s": 5.0},
        evaluation={"samples_per_prompt": 0},
    )
    world = World(config)
    world.absorb(world.state.tick(world.now_s + 1000.0))
    assert not world.dropped
    world.run(random.Random(0))
    check_accounts(world)


def test_a_sample_never_goes_on_under_older_weights() -> None:
    world = World(world_config(evaluation={"samples_per_prompt": 0}), num_generators=2)
    first, second = sorted(world.generators)
    rng = random.Random(0)
    while world.version == 0:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
    if world.generators[first].version == 0:
        world.apply(first)
    assert world.generators[second].version == 0
    while world.generators[first].inbox:
        world.receive(first)
    moving = sorted(world.generators[first].running)
    world.decode(first, moving)
    world.fall_silent(first)
    while world.generators[second].inbox:
        world.receive(second)
    assert not set(moving) & set(world.generators[second].running)
    world.run(rng)
    check_accounts(world)


def test_a_commit_after_everything_was_given_up_changes_nothing() -> None:
    world = World(world_config())
    rng = random.Random(2)
    while len(world.step_groups) < world.config.learner.groups_per_step:
        move, *arguments = rng.choice([m for m in world.moves() if m[0] != world.learn])
        move(*arguments)
    world.absorb(world.state.stop("interrupted", world.now_s))
    world.absorb(world.state.abandon(world.now_s))
    assert world.state.phase is RunPhase.FINISHED
    world.learn()
    assert set(world.ended.values()) == {1}


def test_a_run_in_which_every_group_comes_to_nothing_ends_with_an_error() -> None:
    world = World(world_config(evaluation={"samples_per_prompt": 0}))
    rng = random.Random(0)

    def fail_for_ever() -> None:
        while True:
            move, *arguments = rng.choice(world.moves())
            world.score(fails=True) if move == world.score else move(*arguments)

    message = "given up one after another.*shaping.min_keep.*rewards failed, the last one with raised: no"
    with pytest.raises(DataError, match=message):
        fail_for_ever()


def test_a_run_continues_while_a_judge_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darts_async.shaper.training.MAX_DROPPED_IN_A_ROW", 10)
    world = World(world_config(evaluation={"samples_per_prompt": 0}))
    rng = random.Random(0)
    while len(world.dropped) < 30:
        move, *arguments = rng.choice(world.moves())
        world.score(fails=True, kind="unavailable") if move == world.score else move(*arguments)
    assert world.state.work.totals.rewards.num_by_kind["unavailable"] > 30


def test_a_shaper_that_comes_back_counts_groups_that_came_to_nothing_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a run that has ended by a broken reward function can be resumed with one that works."""
    monkeypatch.setattr("darts_async.shaper.training.MAX_DROPPED_IN_A_ROW", 10)
    world = World(world_config(evaluation={"samples_per_prompt": 0}))
    rng = random.Random(0)

    def fail_until_dropped(num_dropped: int) -> None:
        while len(world.dropped) < num_dropped:
            move, *arguments = rng.choice(world.moves())
            world.score(fails=True) if move == world.score else move(*arguments)

    fail_until_dropped(10)
    world.absorb(world.state.restarted(world.now_s))
    for peer in ("reward/0", LEARNER.first, *world.generators):
        world.absorb(world.state.peer_up(peer, 1, world.now_s))
    fail_until_dropped(20)
    with pytest.raises(DataError, match="were given up"):
        fail_until_dropped(21)


def test_a_stop_without_acknowledgements_ends_with_abandoned_samples() -> None:
    world = World(world_config())
    name = "generator/0"
    while world.generators[name].inbox:
        world.receive(name)
    world.decode(name, sorted(world.generators[name].running), 3)
    world.absorb(world.state.stop("interrupted", world.now_s))
    assert world.state.phase is RunPhase.STOPPING
    world.absorb(world.state.abandon(world.now_s))
    assert world.state.phase is RunPhase.FINISHED
    assert sum(world.finished.tokens_by_outcome.values()) == world.num_decoded
    assert world.finished.tokens_by_outcome["abandoned"] == world.num_decoded


def test_held_out_prompts_are_evaluated_before_and_after_on_all_their_samples() -> None:
    world = finished_world(7, shaping={})
    reports = [m for m in world.to_launcher if isinstance(m, EvaluationCompleted)]
    assert [r.policy_version for r in reports] == [0, world.config.learner.steps]
    assert all(len(r.rewards) == 2 * 2 for r in reports)
    steps = [m.step for m in world.to_launcher if isinstance(m, StepCompleted)]
    assert steps == list(range(world.config.learner.steps))
