"""Peers that say anything: the state takes what can be meant and nothing else, and honest peers come to the end."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darts_async.protocol import (
    GeneratorReady,
    GeneratorToShaper,
    GroupsCommitted,
    LearnerReady,
    LearnerToShaper,
    RewardReady,
    RewardToShaper,
    SampleCancelled,
    SampleFinished,
    SampleRejected,
    SampleScored,
    TokensDecoded,
    VersionPublished,
    VersionSaved,
    WeightsApplied,
)
from darts_async.shaper.boundary import Boundary
from darts_async.shaper.durable.replayable_state import MAX_SHARED_BYTES
from darts_async.shaper.state import Incoming
from darts_async.topology.roles import LEARNER
from tests.shaper.world import World, world_config
from tests.support.nonsense import messages

GENERATOR, REWARD = "generator/0", "reward/0"
UNIONS: dict[str, Any] = {GENERATOR: GeneratorToShaper, REWARD: RewardToShaper, LEARNER.first: LearnerToShaper}
FAR = 1 << 40


class Refused(Exception):
    """A peer is refused in the middle of what it does."""


class RogueWorld(World):
    """Peers that have lied are replaced when they are refused, as the launcher does; no other may be refused."""

    def __init__(self) -> None:
        self.liars: set[str] = set()
        self.num_refused = 0
        self.reward_incarnation = 1
        super().__init__(world_config())

    def feed(self, peer: str, message: Incoming) -> None:
        if peer in self.liars and self.boundary.refusal(self.state, peer, message) is not None:
            raise Refused(peer)
        super().feed(peer, message)

    def lie(self, peer: str, message: Incoming) -> None:
        if isinstance(message, VersionSaved) and message.policy_version > self.saved:
            return  # a checkpoint that is not there: nothing can be trained again without it
        self.liars.add(peer)
        self.feed(peer, message)

    def move(self, choice: int) -> None:
        if moves := self.moves():
            move, *arguments = moves[choice % len(moves)]
            move(*arguments)

    def attempt(self, act: Any, *arguments: Any) -> None:
        """Do something; who is refused for it is replaced."""
        try:
            act(*arguments)
        except Refused as refused:
            self.num_refused += 1
            self.replace(str(refused))
        self.state.validate()

    def replace(self, peer: str) -> None:
        self.liars.discard(peer)
        if peer == LEARNER.first:
            self.learner_dies()
        elif peer == REWARD:
            self.to_score.clear()
            self.reward_incarnation += 1
            self.absorb(self.state.peer_lost(peer, self.now_s, is_gone=True))
            self.absorb(self.state.peer_up(peer, self.reward_incarnation, self.now_s))
        else:
            self.die(peer)


def tokens(
    sample_ids: list[int], counts: list[int], *, version: int = 0, token_id: int = 1, logprob: float = -1.0
) -> TokensDecoded:
    total = sum(counts)
    flat = np.full(total, token_id, np.int32), np.full(total, logprob, np.float32)
    return TokensDecoded(version, np.array(sample_ids, np.int64), np.array(counts, np.int32), *flat)


def nearly_true(world: World, peer: str, kind: int, off_by: int) -> Incoming:
    """What an honest peer could say, but for one number."""
    seat, work = world.state.work.generators.seats.get(GENERATOR), world.state.work
    assigned = sorted(seat.sample_ids) if seat is not None and seat.sample_ids else [0]
    sample_id = assigned[kind % len(assigned)]
    sample = work.sample(sample_id)
    num_tokens = sample.num_tokens if sample is not None else 0
    position = world.state.feed.committed.position
    shipped = world.state.feed.groups_of(position)
    if peer == GENERATOR:
        of_generator: list[Incoming] = [
            GeneratorReady(world.state.greeting(GENERATOR) + off_by, 8, 1024),
            SampleFinished(sample_id, "stop", num_tokens + off_by),
            SampleCancelled(sample_id, num_tokens + off_by),
            SampleRejected(sample_id + off_by, "no"),
            WeightsApplied(world.version + off_by, 0.0),
            tokens([sample_id, sample_id + off_by], [1, 1], version=world.version + kind % 3 - 1),
        ]
        return of_generator[kind % len(of_generator)]
    if peer == REWARD:
        return SampleScored(sample_id + off_by, 1.0)
    of_learner: list[Incoming] = [
        LearnerReady(position + off_by),
        GroupsCommitted(position + off_by, np.array(shipped, np.int64)),
        GroupsCommitted(position, np.array([group_id + off_by for group_id in shipped], np.int64)),
        VersionPublished(position + off_by),
        VersionSaved(position + off_by, 0),
    ]
    return of_learner[kind % len(of_learner)]


lies = st.sampled_from(sorted(UNIONS)).flatmap(lambda peer: st.tuples(st.just(peer), messages(UNIONS[peer])))
nearly = st.tuples(st.sampled_from(sorted(UNIONS)), st.integers(0, 29), st.integers(-1, 1))
conversations = st.lists(st.integers(0, 40) | nearly | lies, min_size=15, max_size=80)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(conversation=conversations, num_moves=st.sampled_from([0, 100, 250, 400]), seed=st.integers(0, 9))
def test_whatever_peers_say_the_state_holds_and_honest_ones_come_to_the_end(
    conversation: list[Any], num_moves: int, seed: int
) -> None:
    world, rng = RogueWorld(), random.Random(seed)
    for _ in range(num_moves):
        world.move(rng.randrange(1 << 30))
    for step in conversation:
        if isinstance(step, int):
            world.attempt(world.move, step)
        elif len(step) == 3:
            world.attempt(world.lie, step[0], nearly_true(world, *step))
        else:
            world.attempt(world.lie, *step)
    for peer in sorted(world.liars):
        world.replace(peer)
    world.run(rng)


def working_world() -> World:
    """A generator holds samples, one of them with tokens; no step is taken."""
    world = World(world_config())
    while world.generators[GENERATOR].inbox:
        world.receive(GENERATOR)
    world.decode(GENERATOR, sorted(world.generators[GENERATOR].running)[:1], num_tokens=3)
    return world


def held(world: World, place: int = 0) -> int:
    return sorted(world.generators[GENERATOR].running)[place]


NONSENSE: dict[str, tuple[Any, str]] = {
    "a second answer to a greeting": (lambda w: GeneratorReady(1, 8, 1024), "answers greeting 1 twice"),
    "an answer to no greeting": (lambda w: GeneratorReady(7, 8, 1024), "greeting 7, and the newest one is 1"),
    "more slots than were asked for": (lambda w: GeneratorReady(1, 9, 1024), "twice"),
    "tokens of a version from the future": (lambda w: tokens([held(w)], [1], version=FAR), "enough for 0"),
    "tokens of no version": (lambda w: tokens([held(w)], [1], version=-1), "version -1"),
    "tokens outside the vocabulary": (lambda w: tokens([held(w)], [1], token_id=50), "outside the vocabulary of 50"),
    "negative tokens": (lambda w: tokens([held(w)], [1], token_id=-1), "token ids -1 to -1"),
    "a logarithm that is not a number": (lambda w: tokens([held(w)], [1], logprob=np.nan), "from nan to nan"),
    "a token that could not be drawn": (lambda w: tokens([held(w)], [1], logprob=-np.inf), "from -inf"),
    "a probability above one": (lambda w: tokens([held(w)], [1], logprob=0.5), "to 0.5"),
    "tokens of a sample of another": (lambda w: tokens([FAR], [1]), "which it does not hold"),
    "one sample twice in a message": (lambda w: tokens([held(w), held(w)], [1, 1]), "two places"),
    "more tokens than were asked for": (lambda w: tokens([held(w)], [254]), "257 tokens of sample"),
    "more tokens than a response can have": (lambda w: tokens([FAR], [1022]), "1022 tokens of one sample"),
    "an end with fewer tokens": (lambda w: SampleFinished(held(w), "stop", 2), "ended with 2 tokens, and 3 were sent"),
    "an end without a token": (lambda w: SampleFinished(held(w, 1), "stop", 0), "finished without a token"),
    "an end that was not asked for": (lambda w: SampleCancelled(held(w), 3), "not asked of it"),
    "the end of a sample of another": (lambda w: SampleFinished(FAR, "stop", 3), "which it does not hold"),
    "rejecting a sample of another": (lambda w: SampleRejected(FAR, "no"), "which it does not hold"),
    "weights from the future": (lambda w: WeightsApplied(FAR, 0.0), "enough for 0"),
    "weights of the past": (lambda w: WeightsApplied(-1, 0.0), "went back from version 0 to -1"),
    "a pause of no length": (lambda w: WeightsApplied(0, float("nan")), "it stalled for nan s"),
    "a reward that is not a number": (lambda w: SampleScored(held(w), float("nan")), "a reward of nan"),
    "a reward that float32 does not hold": (lambda w: SampleScored(held(w), 1e39), r"a reward of 1e\+39"),
    "parts of a reward of one function": (
        lambda w: SampleScored(held(w), 1.0, (1.0,)),
        "1 parts .* 0 reward functions",
    ),
    "a part that is not a number": (lambda w: SampleScored(held(w), 1.0, (float("nan"),)), "a reward of 1.0"),
    "the reward of a sample never opened": (lambda w: SampleScored(FAR, 1.0), "has never existed"),
    "no workers": (lambda w: RewardReady(0), "0 workers"),
    "a learner beyond the last step": (lambda w: LearnerReady(FAR), "of 4"),
    "a learner ahead of what was shipped": (lambda w: LearnerReady(1), "its checkpoints are of another run"),
    "a learner of no version": (lambda w: LearnerReady(-1), "at version -1"),
    "a step of other groups": (lambda w: GroupsCommitted(0, np.array([90, 91, 92])), "were shipped for it"),
    "a step from the future": (lambda w: GroupsCommitted(3, np.array([0, 1, 2])), "the next one is 0"),
    "a version published before it is made": (lambda w: VersionPublished(1), "is at 0"),
    "a version saved before it is made": (lambda w: VersionSaved(FAR, 0), "enough for 0"),
    "checkpoints that are older than the oldest": (lambda w: VersionSaved(0, 1), "of version 1, and the newest of 0"),
    "more of the shaper than it gave": (lambda w: LearnerReady(0, bytes(MAX_SHARED_BYTES + 1)), "is the most"),
    "groups before the first": (lambda w: LearnerReady(0, b"", -1), "groups up to -1"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_what_cannot_be_meant_is_refused_in_plain_words(what: str) -> None:
    make, words = NONSENSE[what]
    world = working_world()
    reason = Boundary(world.config, Path("runs/it"), vocab_size=50).refusal(world.state, GENERATOR, make(world))
    assert reason is not None
    assert re.search(words, reason), reason


def test_a_step_is_not_taken_before_all_of_its_groups_were_shipped() -> None:
    world, rng = World(world_config()), random.Random(1)
    while len(world.state.feed.groups_of(0)) != 2:
        move, *arguments = rng.choice(world.moves())
        move(*arguments)
    early = GroupsCommitted(0, np.array(world.state.feed.groups_of(0), np.int64))
    reason = world.boundary.refusal(world.state, LEARNER.first, early)
    assert reason is not None
    assert "were shipped for it" in reason


def test_what_is_late_is_taken_and_changes_nothing() -> None:
    """A generator that was silent says what was true when it said it."""
    world = working_world()
    sample_id = held(world)
    boundary = Boundary(world.config, Path("runs/it"))
    world.absorb(world.state.peer_lost(GENERATOR, world.now_s, is_gone=False))
    world.absorb(world.state.peer_up(GENERATOR, 1, world.now_s))
    for late in (
        tokens([sample_id], [1]),
        SampleFinished(sample_id, "stop", 4),
        SampleCancelled(sample_id, 9),
        GeneratorReady(1, 8, 1024),
        WeightsApplied(0, 0.1),
    ):
        assert boundary.refusal(world.state, GENERATOR, late) is None
        world.absorb(world.state.handle(GENERATOR, late, world.now_s))
        world.state.validate()
    assert world.state.work.owned(GENERATOR, sample_id) is None


def test_nothing_is_taken_from_a_peer_that_was_not_greeted() -> None:
    world = working_world()
    assert "before it was greeted" in str(
        Boundary(world.config, Path("runs/it")).refusal(world.state, "generator/7", RewardReady(1))
    )
