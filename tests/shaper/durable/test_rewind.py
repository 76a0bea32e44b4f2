"""The learner dies at any point and comes back at its last checkpoint: the same steps with the same groups, once."""

import random

import pytest

from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.prompts.source import ShuffledPrompts
from darts_async.protocol import CatchUp, LearnerReady, ShaperSnapshot, StepCompleted, TakeUpAgain, VersionSaved
from darts_async.shaper.committed_steps import REPLAYED_AHEAD
from darts_async.shaper.durable.replayable_state import (
    CameUp,
    Heard,
    Reopened,
    ReplayableState,
    Shared,
    WentDown,
    decode_shared,
    encode_shared,
)
from darts_async.shaper.estimates.patience import LEAST_S
from darts_async.shaper.ledger import LearnerRewound, Position, RunReopened, StepCommitted
from darts_async.shaper.outbox import SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import ShaperState, StateSnapshot
from darts_async.topology.roles import LAUNCHER, LEARNER
from launcher.analysis.audit_books import Books, audit
from tests.shaper.world import World, prompts, world_config


def step_to(world: World, version: int, rng: random.Random) -> None:
    """Any interleaving until the learner has this version and has published it."""
    while world.version < version or any(map(world.lags, world.generators.values())):
        play(world, rng)


def play(world: World, rng: random.Random) -> None:
    moves = world.moves()
    assert moves, world.describe()
    move, *arguments = rng.choice(moves)
    move(*arguments)
    world.state.validate()


def learner_dies_somehow(world: World, rng: random.Random) -> None:
    """Between two messages, or after a step or a checkpoint that nobody hears of."""
    if (world.learn,) in world.moves() and rng.random() < 0.5:
        world.learn(tells=False)
    if rng.random() < 0.3:
        world.save(tells=False)
    may_be_damaged = len(world.kept) - (not world.first_model_is_kept)
    world.learner_dies(num_damaged=rng.choice((0, 0, may_be_damaged)))
    world.state.validate()


def assert_nothing_is_lost(world: World, config: RunConfig) -> None:
    size, steps = config.learner.groups_per_step, config.learner.steps
    assert [len(groups) for groups in world.history] == [size] * steps
    trained = [group_id for groups in world.history for group_id in groups]
    assert len(set(trained)) == len(trained)
    assert set(world.ended.values()) == {1}
    assert world.max_staleness_seen <= config.staleness.max_staleness
    assert sum(world.finished.tokens_by_outcome.values()) == world.num_decoded
    assert sum(world.finished.tokens_by_staleness.values()) == world.finished.tokens_by_outcome["trained"]
    assert [m.step for m in world.to_launcher if isinstance(m, StepCompleted)] == list(range(steps))
    assert audit(Books.of(world.ledger), config, is_over=True, num_steps=steps) == []


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("seed", range(8))
def test_the_surviving_history_trains_every_step_with_exactly_its_groups(seed: int, max_staleness: int) -> None:
    rng = random.Random(seed)
    config = world_config(learner={"steps": 6}, staleness={"max_staleness": max_staleness})
    world = World(config)
    num_deaths = 0
    for _ in range(20_000):
        if world.state.phase is RunPhase.FINISHED:
            break
        chance = rng.random()
        if chance < 0.02 and num_deaths < 10:
            num_deaths += 1
            learner_dies_somehow(world, rng)
        elif chance < 0.025:
            world.die(rng.choice(sorted(world.generators)))
        elif chance < 0.03:  # the link of the learner is down for a while
            world.absorb(world.state.peer_lost(LEARNER.first, world.now_s, is_gone=False))
            world.absorb(world.state.peer_up(LEARNER.first, world.learner, world.now_s))
        elif chance < 0.04:
            world.save()
        else:
            play(world, rng)
        world.state.validate()
    assert world.state.phase is RunPhase.FINISHED, world.describe()
    assert num_deaths
    assert_nothing_is_lost(world, config)


def test_a_learner_without_a_checkpoint_begins_anew_and_generators_go_on_decoding() -> None:
    config = world_config(learner={"steps": 4})
    world, rng = World(config), random.Random(1)
    step_to(world, 2, rng)
    versions = {name: generator.version for name, generator in world.generators.items()}
    first = [list(groups) for groups in world.history]
    world.learner_dies()
    assert LearnerRewound(0) in world.ledger
    assert world.floor == 2
    assert not [move for move in world.moves() if move[0] == world.apply], "nothing older is published"
    for expected in first:
        world.learn()
        assert world.history[-1] == expected
    assert {name: generator.version for name, generator in world.generators.items()} == versions
    world.run(rng)
    assert [record.step for record in world.ledger if isinstance(record, StepCommitted)] == [0, 1, 0, 1, 2, 3]
    assert_nothing_is_lost(world, config)


def test_a_learner_that_catches_up_is_sent_a_few_steps_at_a_time() -> None:
    config = world_config(learner={"steps": 6})
    world, rng = World(config), random.Random(2)
    step_to(world, 5, rng)
    world.learner_dies()
    size = config.learner.groups_per_step
    for taken in range(5):
        replayed = [group.step for group in world.step_groups if group.step < 5]
        assert sorted(set(replayed)) == list(range(taken, min(taken + REPLAYED_AHEAD, 5)))
        assert len(replayed) == size * len(set(replayed))
        world.learn()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_groups_are_kept_until_every_checkpoint_holds_them_and_no_longer(keep: int) -> None:
    config = world_config(learner={"steps": 6, "checkpoint_every": 1, "keep_checkpoints": keep})
    world, rng = World(config), random.Random(3)
    for version in range(1, 6):
        step_to(world, version, rng)
        world.save()
        world.state.validate()
        kept = [step for step in range(version) if world.state.feed.committed.group_ids(step)]
        assert kept == list(range(max(0, version - keep + 1) if version >= keep else 0, version))
    expected = [list(groups) for groups in world.history]
    world.learner_dies(num_damaged=keep - 1)
    assert world.version == 5 - (keep - 1)
    for step in range(world.version, 5):
        world.learn()
        assert world.history[step] == expected[step]
    world.run(rng)
    assert_nothing_is_lost(world, config)


def test_before_there_are_enough_checkpoints_the_first_model_counts_as_one() -> None:
    config = world_config(learner={"steps": 4, "keep_checkpoints": 2})
    world, rng = World(config), random.Random(3)
    step_to(world, 2, rng)
    world.save()
    expected = [list(groups) for groups in world.history]
    world.learner_dies(num_damaged=1)
    assert world.version == 0
    for step in range(2):
        world.learn()
        assert world.history[step] == expected[step]
    world.run(rng)
    assert_nothing_is_lost(world, config)


def test_a_run_whose_last_checkpoint_turns_out_damaged_is_not_finished() -> None:
    config = world_config(learner={"steps": 3})
    world, rng = World(config), random.Random(5)
    step_to(world, 2, rng)
    world.save()
    while world.version < 3:
        play(world, rng)
    assert world.state.phase is not RunPhase.FINISHED
    world.learner_dies(num_damaged=1)
    save, world.save = world.save, lambda **_: None  # type: ignore[method-assign]
    while world.moves():
        play(world, rng)
    assert (world.version, world.state.phase) == (3, RunPhase.EVALUATING_AFTER)
    save()
    world.run(rng)
    assert world.state.phase is RunPhase.FINISHED


def test_a_learner_has_saved_no_more_than_it_has_taken() -> None:
    world, rng = World(world_config(learner={"steps": 4})), random.Random(3)
    step_to(world, 3, rng)
    world.save = lambda **_: None  # type: ignore[method-assign]
    world.learner_dies()
    taken = world.state.feed.committed
    position = taken.position
    assert position < 3 == taken.num_steps
    world.absorb(world.state.handle(LEARNER.first, VersionSaved(3, 3), world.now_s))
    world.state.validate()
    assert taken.durable == taken.oldest_kept == position


def test_no_step_is_undone_while_a_generator_decodes_under_its_version() -> None:
    """It takes no older version, and its tokens would be of a history that is not."""
    world, rng = World(world_config(learner={"steps": 4, "keep_checkpoints": 1})), random.Random(3)
    step_to(world, 2, rng)
    world.save()
    is_wanted = {"came back at version 1" in output.message.reason for output in comes_back(world, 1)}
    assert is_wanted == {True}
    assert not world.state.feed.learner_up
    world.absorb(world.state.stop("enough", world.now_s))
    assert not comes_back(world, 1), "a run that ends needs no learner for it"


def comes_back(world: World, version: int) -> list[SendTo]:
    """What the launcher is told of a learner at this version that the boundary lets through."""
    message = LearnerReady(version)
    assert world.boundary.refusal(world.state, LEARNER.first, message) is None
    outputs = world.state.handle(LEARNER.first, message, world.now_s)
    return [output for output in outputs if isinstance(output, SendTo) and isinstance(output.message, TakeUpAgain)]


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_run_starts_over_inside_a_life_only_before_any_generator_can_have_a_version(has_begun: bool) -> None:
    """What generators have said is not enough: here none has said anything, and one may have version 2."""
    config = world_config(learner={"steps": 4})
    world, rng = World(config), random.Random(3)
    step_to(world, 2, rng)
    shared = Shared(world.now_s, world.state.to_checkpoint(2), Position(1, 0))
    replayable = ReplayableState(
        lambda snapshot: world.make_state() if snapshot is None else restored(config, snapshot), life=2
    )
    taken_up = decode_shared(encode_shared(shared))
    assert taken_up is not None
    replayable.start_over(LearnerReady(2), taken_up, world.now_s)
    replayable.take(Reopened(world.now_s, 2))
    replayable.take(CameUp(world.now_s, LEARNER.first, 5))
    if has_begun:
        replayable.take(Heard(world.now_s, LEARNER.first, 5, 0, LearnerReady(2)))
        replayable.take(WentDown(world.now_s, LEARNER.first, True))
        replayable.take(CameUp(world.now_s, LEARNER.first, 6))
    assert replayable.state.work.generators.newest_version == -1
    outputs = replayable.take(Heard(world.now_s, LEARNER.first, 5 + has_begun, 0, LearnerReady(1)))
    to_launcher = [type(output.message) for output in outputs if isinstance(output, SendTo) and output.peer == LAUNCHER]
    assert to_launcher == ([TakeUpAgain] if has_begun else [])
    assert replayable.state.num_steps == (2 if has_begun else 1)
    replayable.take(Reopened(world.now_s, 3))
    assert not replayable.reports, "what was wanted of the life before is done"


def test_what_a_life_gives_to_its_learner_for_a_checkpoint_is_not_for_that_of_the_next() -> None:
    """It may start over, and come to the same version by other groups."""
    replayable = ReplayableState(lambda snapshot: World(world_config()).make_state())
    told = SendTo(LAUNCHER, StepCompleted(0, {}))
    replayable.reports = [SendTo(LEARNER.first, ShaperSnapshot(3, b"")), told]
    replayable.take(Reopened(0.0, 2))
    assert replayable.reports == [told]


def restored(config: RunConfig, snapshot: StateSnapshot) -> ShaperState:
    return ShaperState(config, ShuffledPrompts(prompts(20), seed=1), prompts(2), snapshot=snapshot)


def test_a_commit_that_died_with_the_learner_follows_from_its_checkpoint() -> None:
    config = world_config(learner={"steps": 4})
    world, rng = World(config), random.Random(4)
    while (world.learn,) not in world.moves():
        play(world, rng)
    world.learn(tells=False)
    world.save(tells=False)
    assert world.state.num_steps == 0
    world.learner_dies()
    assert world.state.num_steps == 1
    assert not [record for record in world.ledger if isinstance(record, LearnerRewound)]
    world.run(rng)
    assert_nothing_is_lost(world, config)


@pytest.mark.parametrize("is_behind", [True, False])
def test_no_group_is_cut_while_the_learner_catches_up(is_behind: bool) -> None:
    """Of the second step two groups are ready, and the third is waited for."""
    config = world_config(learner={"steps": 4}, staleness={"max_staleness": 0})
    world, rng = World(config, num_generators=1), random.Random(3)
    step_to(world, 1, rng)
    while len(world.groups_of_step()) != 2:
        play(world, rng)
    world.learner_dies()
    if not is_behind:
        world.learn()
    for _ in range(100):
        world.now_s += LEAST_S / 10
        world.absorb(world.state.tick(world.now_s))
        world.state.validate()
    assert bool(world.dropped) != is_behind


def test_checkpoints_of_another_run_are_refused() -> None:
    world = World(world_config())
    reason = world.boundary.refusal(world.state, LEARNER.first, LearnerReady(3))
    assert reason is not None
    assert "its checkpoints are of another run" in reason
    assert reason.endswith("darts-launch resume --from-checkpoint runs/it"), "the advice can be copied"
    with pytest.raises(DataError, match="its checkpoints are of another run"):
        world.state.handle(LEARNER.first, LearnerReady(3), world.now_s)


def test_a_run_is_finished_when_its_last_step_is_in_a_checkpoint() -> None:
    config = world_config(learner={"steps": 2})
    world, rng = World(config), random.Random(5)
    world.save = lambda **_: None  # type: ignore[method-assign]
    while world.moves():
        play(world, rng)
    assert world.state.phase is RunPhase.EVALUATING_AFTER
    assert world.state.num_steps == 2
    world.learner_dies()
    del world.save
    world.run(rng)
    assert_nothing_is_lost(world, config)


def test_a_run_that_ended_and_whose_end_was_not_noted_ends_again_when_the_learner_is_heard() -> None:
    config = world_config(learner={"steps": 2})
    world, rng = World(config), random.Random(5)
    world.run(rng)
    first, world.to_launcher = world.finished, []
    outputs = world.state.reopen(world.now_s, 2)
    assert outputs == [RunReopened(2, 2)]
    for peer in (*world.generators, "reward/0"):
        world.absorb(world.state.peer_up(peer, 5, world.now_s))
    assert world.state.phase is RunPhase.EVALUATING_AFTER, "the learner may have lost its last checkpoint"
    world.floor = -1
    world.absorb(world.state.peer_up(LEARNER.first, 5, world.now_s))
    assert world.floor == 2, "it has had a word"
    assert world.state.phase is RunPhase.FINISHED
    assert world.finished.tokens_by_outcome == first.tokens_by_outcome
    of_earlier_lives = {name: {0: sum(counts.values())} for name, counts in first.tokens_by_generator.items()}
    assert world.finished.tokens_by_generator == of_earlier_lives, "incarnations may have the same numbers again"


def test_a_version_that_a_generator_has_said_to_use_is_the_floor() -> None:
    """The commit of the step before it may have died with the learner."""
    world, rng = World(world_config(learner={"steps": 4})), random.Random(6)
    step_to(world, 1, rng)
    while (world.learn,) not in world.moves():
        play(world, rng)
    world.learn(tells=False)
    world.apply("generator/0")
    outputs = world.state.handle(LEARNER.first, LearnerReady(1), world.now_s)
    assert SendTo(LEARNER.first, CatchUp(2, 2)) in outputs
    assert world.state.num_steps == 1
