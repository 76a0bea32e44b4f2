"""What the learner takes: groups to train on, members whose claims can be true, tallies that can be merged."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig
from darts_async.learner.boundary import Boundary
from darts_async.learner.intake import Intake
from darts_async.learner.metric_sums import Tally
from darts_async.protocol import (
    NUM_BINS,
    CatchUp,
    GeneratorToLearner,
    Greet,
    LearnerToGenerator,
    MemberJoined,
    PartSaved,
    RankReady,
    RankToLeader,
    ShaperSnapshot,
    ShaperToLearner,
    StepTallied,
    StoreValue,
    TensorSpec,
    TrainGroup,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightManifest,
)
from darts_async.weights.sending.coordinator import Coordinator
from darts_async.weights.sending.events import (
    Broadcast,
    BroadcastDone,
    CoordinatorAction,
    MemberDropped,
    MemberLost,
    MemberMessage,
    Published,
    PublishFailed,
    SendToMember,
)
from tests.support.nonsense import messages

CONFIG = RunConfig.model_validate(
    {"learner": {"steps": 6}, "sampling": {"max_new_tokens": 8}, "staleness": {"max_staleness": 1}}
)
BOUNDARY = Boundary(CONFIG, vocab_size=50)
MANIFEST = WeightManifest((TensorSpec("w", "float32", (4,)),), 4096)
SUMS = np.array([1, 2], np.int64)


def group(**changes: Any) -> TrainGroup:
    values: dict[str, Any] = {
        "group_id": 3,
        "step": 2,
        "prompt_tokens": np.array([4, 5], np.int32),
        "num_tokens": np.array([1, 2], np.int32),
        "token_ids": np.array([1, 2, 3], np.int32),
        "logprobs": np.array([-1, -2, 0], np.float32),
        "versions": np.array([1, 2, 2], np.int32),
        "rewards": np.array([0, 1], np.float32),
        "weights": np.array([1, 1], np.float32),
    }
    return TrainGroup(**(values | changes))


def test_a_group_that_can_be_trained_on_is_taken() -> None:
    assert BOUNDARY.of_shaper(group()) is None
    assert BOUNDARY.of_shaper(group(baseline=0.5)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 6}, "step 6 of 6"),
        ({"step": -1}, "step -1 of 6"),
        ({"group_id": -1}, "step 2 of 6"),
        ({"prompt_tokens": np.empty(0, np.int32)}, "a prompt of 0 tokens"),
        ({"num_tokens": np.array([-1, 4], np.int32)}, "-1 to 4 tokens"),
        ({"num_tokens": np.array([0, 3], np.int32)}, "0 to 3 tokens"),
        ({"token_ids": np.array([1, 2, 50], np.int32)}, "vocabulary of 50"),
        ({"prompt_tokens": np.array([-4], np.int32)}, "token ids -4"),
        ({"logprobs": np.array([-1, np.nan, 0], np.float32)}, "from nan"),
        ({"versions": np.array([0, 2, 2], np.int32)}, "versions 0 to 2 in step 2, and max_staleness is 1"),
        ({"versions": np.array([1, 2, 3], np.int32)}, "versions 1 to 3 in step 2"),
        ({"rewards": np.array([0, np.inf], np.float32)}, "rewards"),
        ({"weights": np.array([1, -1], np.float32)}, "weights"),
        ({"weights": np.array([1, 0], np.float32)}, "weights"),
        ({"baseline": float("nan")}, "a baseline of nan"),
    ],
)
def test_a_group_that_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    reason = BOUNDARY.of_shaper(group(**changes))
    assert reason is not None
    assert re.search(words, reason), reason


def test_a_group_without_the_pass_rate_that_the_baseline_is_made_of_is_refused() -> None:
    shaping = {"rule": "none", "launch": 4, "keep": 4, "baseline": "history"}
    boundary = Boundary(RunConfig.model_validate({"learner": {"steps": 6}, "shaping": shaping}))
    assert "a baseline of None" in str(boundary.of_shaper(group()))
    assert boundary.of_shaper(group(baseline=0.5)) is None


@pytest.mark.parametrize("message", [CatchUp(7, 7), CatchUp(3, 2), CatchUp(-1, 0), ShaperSnapshot(7, b""), Greet(0)])
def test_versions_beyond_the_run_are_refused(message: Any) -> None:
    assert BOUNDARY.of_shaper(message) is not None


def refusal(message: GeneratorToLearner) -> str | None:
    return BOUNDARY.of_generator(message, newest_version=2, newest_epoch=7)


def test_a_member_cannot_hold_a_version_that_no_learner_has_made() -> None:
    """All others would wait until the learner is there."""
    assert refusal(MemberJoined(2)) is None
    assert refusal(MemberJoined(-1)) is None
    assert "none after 2 can have been made" in str(refusal(MemberJoined(3)))
    assert "version -2" in str(refusal(MemberJoined(-2)))
    assert "2 ranks, of 1" in str(refusal(MemberJoined(0, num_ranks=2)))


def test_answers_to_epochs_that_were_never_formed_are_refused_and_late_ones_are_not() -> None:
    assert refusal(UpdateReady(7, 1)) is None
    assert refusal(UpdateReady(2, 1)) is None
    assert "epoch 8, and the newest one is 7" in str(refusal(UpdateReady(8, 1)))
    assert "epoch 8" in str(refusal(StoreValue(8, "a", b"")))
    assert "paused for nan s" in str(refusal(UpdateApplied(7, 1, float("nan"))))


def test_tallies_that_cannot_be_merged_are_refused() -> None:
    histogram = bytes(NUM_BINS * 8)
    assert BOUNDARY.of_rank(StepTallied(0, {"a": 1.0}, {"a": 2.0}, {}, {"r": histogram})) is None
    assert "different names: ['a']" in str(BOUNDARY.of_rank(StepTallied(0, {"a": 1.0}, {}, {}, {})))
    assert "histograms of [7] bytes" in str(BOUNDARY.of_rank(StepTallied(0, {}, {}, {}, {"r": b"1234567"})))
    assert "step 6 of 6" in str(BOUNDARY.of_rank(StepTallied(6, {}, {}, {}, {})))
    assert "version 9 of 6" in str(BOUNDARY.of_rank(RankReady(9)))
    assert "version -1 of 6" in str(BOUNDARY.of_rank(PartSaved(-1, 0, 0)))


many = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.slow
@many
@given(said=st.lists(messages(RankToLeader), max_size=8))
def test_every_tally_that_is_taken_can_be_merged_and_sent(said: list[RankToLeader]) -> None:
    whole = Tally()
    for message in said:
        if isinstance(message, StepTallied) and BOUNDARY.of_rank(message) is None:
            whole.merge(Tally.of(message))
    assert Tally.of(whole.message(0)).sums == pytest.approx(whole.sums, nan_ok=True)


@pytest.mark.slow
@many
@given(said=st.lists(messages(ShaperToLearner), max_size=8))
def test_every_group_that_is_taken_is_one_of_this_run(said: list[ShaperToLearner]) -> None:
    intake = Intake()
    for message in said:
        if isinstance(message, TrainGroup) and BOUNDARY.of_shaper(message) is None:
            intake.take(message)
    num_waiting = intake.num_waiting
    assert num_waiting == sum(len(intake.together(step, 99, 1 << 30)) for step in range(CONFIG.learner.steps))


class Members:
    """Two members that do as they are told, of which one also says anything else; and the coordinator."""

    HONEST, ROGUE = "generator/0", "generator/1"

    def __init__(self) -> None:
        self.coordinator = Coordinator(backend="gloo", interface="127.0.0.1", deadline_s=10.0)
        self.incarnations = {self.HONEST: 1, self.ROGUE: 1}
        self.now = 0.0
        self.published: list[int] = []
        self.dropped: set[str] = set()
        self.replies: list[tuple[str, GeneratorToLearner]] = []
        self.offered: dict[str, UpdateOffered] = {}
        for name in self.incarnations:
            self.hear(name, MemberJoined(-1))

    def hear(self, name: str, message: GeneratorToLearner) -> None:
        epoch = self.coordinator.newest_epoch
        if BOUNDARY.of_generator(message, newest_version=2, newest_epoch=epoch) is not None:
            assert name == self.ROGUE, "an honest member is never refused"
            self.restart(name)
        elif not isinstance(message, StoreValue):
            self.absorb(self.coordinator.handle(MemberMessage(name, self.incarnations[name], message), self.now))

    def restart(self, name: str) -> None:
        self.incarnations[name] += 1
        self.replies = [reply for reply in self.replies if reply[0] != name]
        self.offered.pop(name, None)
        self.absorb(self.coordinator.handle(MemberLost(name), self.now))
        self.hear(name, MemberJoined(-1))

    def absorb(self, actions: list[CoordinatorAction]) -> None:
        self.coordinator.validate()
        for action in actions:
            match action:
                case SendToMember(name, message):
                    self.replies += [(name, reply) for reply in self.answers(name, message)]
                case Broadcast(epoch, version):
                    there = [name for name, offered in self.offered.items() if offered.epoch == epoch]
                    self.replies += [(name, UpdateStaged(epoch, version, SUMS)) for name in there]
                    self.absorb(self.coordinator.handle(BroadcastDone(epoch, (1, 2)), self.now))
                case Published(version, members):
                    assert self.HONEST in members, "it has what was published"
                    self.published.append(version)
                case MemberDropped(name, _):
                    self.dropped.add(name)
                case PublishFailed():
                    raise AssertionError(f"an honest member is there: {action}")

    def answers(self, name: str, message: LearnerToGenerator) -> list[GeneratorToLearner]:
        match message:
            case UpdateOffered(epoch, version):
                self.offered[name] = message
                return [UpdateReady(epoch, version)]
            case UpdateCommitted(epoch, version):
                return [UpdateApplied(epoch, version, 0.0)]
            case UpdateAborted():
                return [MemberJoined(-1)]
        return []

    def reply(self) -> None:
        if self.replies:
            self.hear(*self.replies.pop(0))
        elif self.coordinator.deadline is not None:
            self.now = self.coordinator.deadline
            self.absorb(self.coordinator.tick(self.now))


@pytest.mark.slow
@many
@given(conversation=st.lists(st.none() | messages(GeneratorToLearner), max_size=40))
def test_a_member_that_says_anything_keeps_no_version_from_the_others(
    conversation: list[GeneratorToLearner | None],
) -> None:
    members = Members()
    members.absorb(members.coordinator.offer(2, MANIFEST, members.now))
    for said in conversation:
        if said is None:
            members.reply()
        else:
            members.hear(Members.ROGUE, said)
    for _ in range(200):
        if not members.coordinator.is_busy:
            break
        members.reply()
    assert members.published == [2]
    assert members.dropped <= {Members.ROGUE}
