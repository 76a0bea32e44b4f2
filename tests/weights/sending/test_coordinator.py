"""The coordinator's decisions, one claim at a time; `test_weights_coordinator_chaos` tries everything at once."""

from typing import TypeVar

import numpy as np
import pytest

from darts_async.protocol import (
    EpochFormed,
    GeneratorToLearner,
    LearnerToGenerator,
    MemberJoined,
    StoreValue,
    TensorSpec,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightManifest,
)
from darts_async.weights.sending.coordinator import MAX_BROKEN_BROADCASTS, Coordinator
from darts_async.weights.sending.events import (
    Broadcast,
    BroadcastDone,
    BroadcastFailed,
    CoordinatorAction,
    CoordinatorEvent,
    DropGroup,
    FormGroup,
    MemberDropped,
    MemberLost,
    MemberMessage,
    Published,
    PublishFailed,
    SendToMember,
    Superseded,
)
from darts_async.weights.sending.membership import MAX_STRIKES

T = TypeVar("T")
MANIFEST = WeightManifest((TensorSpec("w", "float32", (4,)),), 4096)
SUMS = (11, -22)
DEADLINE_S = 10.0


class Desk:
    """A coordinator with a clock; every input is followed by `validate`."""

    def __init__(self, *members: str) -> None:
        self.now = 0.0
        self.coordinator = Coordinator(backend="gloo", interface="127.0.0.1", deadline_s=DEADLINE_S)
        for name in members:
            self.join(name)

    def _checked(self, actions: list[CoordinatorAction]) -> list[CoordinatorAction]:
        self.coordinator.validate()
        return actions

    def offer(self, version: int) -> list[CoordinatorAction]:
        return self._checked(self.coordinator.offer(version, MANIFEST, self.now))

    def feed(self, event: CoordinatorEvent) -> list[CoordinatorAction]:
        return self._checked(self.coordinator.handle(event, self.now))

    def say(self, name: str, message: GeneratorToLearner, incarnation: int = 1) -> list[CoordinatorAction]:
        return self.feed(MemberMessage(name, incarnation, message))

    def join(self, name: str, incarnation: int = 1) -> list[CoordinatorAction]:
        return self.say(name, MemberJoined(-1), incarnation)

    def ready(self, epoch: int, version: int, *names: str) -> list[CoordinatorAction]:
        return [action for name in names for action in self.say(name, UpdateReady(epoch, version))]

    def stage(self, epoch: int, version: int, *names: str, sums: tuple[int, ...] = SUMS) -> list[CoordinatorAction]:
        message = UpdateStaged(epoch, version, np.array(sums, np.int64))
        return [action for name in names for action in self.say(name, message)]

    def apply(self, epoch: int, version: int, *names: str) -> list[CoordinatorAction]:
        return [action for name in names for action in self.say(name, UpdateApplied(epoch, version, 0.5))]

    def complete(self, epoch: int, version: int, *names: str) -> list[CoordinatorAction]:
        self.ready(epoch, version, *names)
        self.feed(BroadcastDone(epoch, SUMS))
        self.stage(epoch, version, *names)
        return self.apply(epoch, version, *names)

    def expire(self) -> list[CoordinatorAction]:
        assert self.coordinator.deadline is not None
        self.now = self.coordinator.deadline
        return self._checked(self.coordinator.tick(self.now))


def sent(actions: list[CoordinatorAction], kind: type[LearnerToGenerator]) -> dict[str, LearnerToGenerator]:
    return {a.name: a.message for a in actions if isinstance(a, SendToMember) and isinstance(a.message, kind)}


def only(actions: list[CoordinatorAction], kind: type[T]) -> T:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


def kinds(actions: list[CoordinatorAction]) -> list[str]:
    return [type(a.message if isinstance(a, SendToMember) else a).__name__ for a in actions]


def test_an_update_goes_through_its_phases() -> None:
    desk = Desk("a", "b")
    actions = desk.offer(7)
    assert kinds(actions) == ["EpochFormed", "EpochFormed", "FormGroup", "UpdateOffered", "UpdateOffered"]
    assert sent(actions, EpochFormed) == {
        "a": EpochFormed(1, 1, 3, "gloo", "127.0.0.1", DEADLINE_S),
        "b": EpochFormed(1, 2, 3, "gloo", "127.0.0.1", DEADLINE_S),
    }
    assert only(actions, FormGroup) == FormGroup(1, 3, ("a", "b"))
    assert desk.ready(1, 7, "a") == []
    desk.now += 1
    assert desk.ready(1, 7, "b") == [Broadcast(1, 7)]
    desk.now += 2
    assert desk.stage(1, 7, "b") == []
    assert desk.feed(BroadcastDone(1, SUMS)) == []
    assert desk.stage(1, 7, "a") == [SendToMember("a", UpdateCommitted(1, 7)), SendToMember("b", UpdateCommitted(1, 7))]
    desk.now += 3
    assert desk.apply(1, 7, "a") == []
    (published,) = desk.apply(1, 7, "b")
    assert published == Published(7, ("a", "b"), {}, 1.0, 2.0, 3.0, {"a": 0.5, "b": 0.5})
    assert not desk.coordinator.is_busy
    assert desk.coordinator.deadline is None


def test_an_epoch_is_used_again_while_its_members_are_the_same() -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    desk.complete(1, 1, "a", "b")
    assert kinds(desk.offer(2)) == ["UpdateOffered", "UpdateOffered"]
    desk.complete(1, 2, "a", "b")
    desk.join("c")
    actions = desk.offer(3)
    assert actions[0] == DropGroup(1)
    assert only(actions, FormGroup) == FormGroup(2, 4, ("a", "b", "c"))


def test_a_restarted_member_is_another_member() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.complete(1, 1, "a")
    desk.join("a", incarnation=2)
    assert desk.coordinator.lagging(1) == ["a"]
    assert only(desk.offer(2), FormGroup).epoch == 2


def test_a_late_joiner_is_given_the_current_version_in_a_group_of_its_own() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.complete(1, 1, "a")
    assert desk.join("b") == []
    assert desk.coordinator.lagging(1) == ["b"]
    assert only(desk.offer(1), FormGroup) == FormGroup(2, 2, ("b",))
    assert only(desk.complete(2, 1, "b"), Published).members == ("b",)
    assert desk.coordinator.lagging(1) == []


def test_one_that_joins_during_an_update_is_not_waited_for() -> None:
    desk = Desk("a")
    desk.offer(1)
    assert desk.join("b") == []
    assert only(desk.complete(1, 1, "a"), Published).members == ("a",)
    assert desk.coordinator.lagging(1) == ["b"]


def test_a_version_of_an_earlier_learner_is_replaced_by_the_same_and_never_by_an_older_one() -> None:
    desk = Desk()
    for name, held in (("a", 6), ("b", 5), ("c", -1)):
        desk.say(name, MemberJoined(held))
    assert sorted(sent(desk.offer(5), UpdateOffered)) == ["b", "c"]
    assert only(desk.complete(1, 5, "b", "c"), Published).members == ("b", "c")
    assert desk.coordinator.lagging(5) == []
    assert sorted(sent(desk.offer(6), UpdateOffered)) == ["a", "b", "c"]


def test_nobody_is_waited_for_where_all_are_ahead() -> None:
    desk = Desk()
    assert desk.offer(5) == []
    (published,) = desk.say("a", MemberJoined(6))
    assert published == Published(5, (), {})
    assert not desk.coordinator.is_busy


def test_without_members_an_offer_waits_for_the_first() -> None:
    desk = Desk()
    assert desk.offer(1) == []
    desk.now += 9
    assert only(desk.join("a"), FormGroup).members == ("a",)


def test_without_members_an_offer_fails_at_the_deadline_and_says_what_is_missing() -> None:
    desk = Desk()
    desk.offer(1)
    failed = only(desk.expire(), PublishFailed)
    assert failed.policy_version == 1
    assert "no generator" in failed.reason
    assert "10 s" in failed.reason


def test_one_that_is_late_to_join_the_group_is_dropped_and_the_others_form_a_new_one() -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    desk.ready(1, 1, "a")
    actions = desk.expire()
    assert only(actions, MemberDropped).name == "b"
    assert set(sent(actions, UpdateAborted)) == {"a", "b"}
    assert DropGroup(1) in actions
    assert only(actions, FormGroup) == FormGroup(2, 2, ("a",))
    published = only(desk.complete(2, 1, "a"), Published)
    assert published.members == ("a",)
    assert "10 s to join the group" in published.dropped["b"]


def test_a_dropped_one_may_join_again() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.expire()
    assert only(desk.join("a"), FormGroup).epoch == 2
    assert only(desk.complete(2, 1, "a"), Published).members == ("a",)


@pytest.mark.parametrize("phase", ["forming", "transferring"])
def test_a_lost_member_ends_the_round_for_all_before_the_commit(phase: str) -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    if phase == "transferring":
        desk.ready(1, 1, "a", "b")
    actions = desk.feed(MemberLost("b"))
    assert sent(actions, UpdateAborted) == {"a": UpdateAborted(1, 1, "b left: its link is down")}, (
        "whoever is gone is not told"
    )
    assert only(actions, FormGroup) == FormGroup(2, 2, ("a",))
    assert only(desk.complete(2, 1, "a"), Published).dropped == {"b": "its link is down"}


def test_after_the_commit_a_lost_member_is_not_waited_for() -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    desk.ready(1, 1, "a", "b")
    desk.feed(BroadcastDone(1, SUMS))
    desk.stage(1, 1, "a", "b")
    desk.apply(1, 1, "a")
    actions = desk.feed(MemberLost("b"))
    assert kinds(actions) == ["MemberDropped", "DropGroup", "Published"]
    assert only(actions, Published).members == ("a",)


def test_if_the_last_one_goes_after_the_commit_the_update_waits_for_another() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.ready(1, 1, "a")
    desk.feed(BroadcastDone(1, SUMS))
    desk.stage(1, 1, "a")
    desk.feed(MemberLost("a"))
    assert desk.coordinator.is_busy
    assert only(desk.join("a", incarnation=2), FormGroup).epoch == 2


@pytest.mark.parametrize("learner_is_first", [True, False])
def test_a_wrong_checksum_is_never_committed_and_costs_the_membership(learner_is_first: bool) -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    desk.ready(1, 1, "a", "b")
    desk.stage(1, 1, "a")
    if learner_is_first:
        desk.feed(BroadcastDone(1, SUMS))
        actions = desk.stage(1, 1, "b", sums=(11, -23))
    else:
        desk.stage(1, 1, "b", sums=(11, -23))
        actions = desk.feed(BroadcastDone(1, SUMS))
    assert not sent(actions, UpdateCommitted)
    assert set(sent(actions, UpdateAborted)) == {"a", "b"}
    assert "differ" in only(actions, MemberDropped).reason
    assert only(actions, FormGroup).members == ("a",)


def test_a_checksum_for_each_tensor_is_demanded() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.ready(1, 1, "a")
    desk.feed(BroadcastDone(1, SUMS))
    assert only(desk.stage(1, 1, "a", sums=SUMS[:1]), MemberDropped).name == "a"


def test_a_failed_member_gets_another_try_but_not_for_ever() -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    for epoch in range(1, MAX_STRIKES):
        actions = desk.say("b", UpdateFailed(epoch, 1, "connection reset"))
        assert set(sent(actions, UpdateAborted)) == {"a", "b"}
        assert only(actions, FormGroup) == FormGroup(epoch + 1, 3, ("a", "b"))
    actions = desk.say("b", UpdateFailed(MAX_STRIKES, 1, "connection reset"))
    assert only(actions, FormGroup).members == ("a",)
    assert desk.join("b") == []
    assert "connection reset" in only(desk.complete(MAX_STRIKES + 1, 1, "a"), Published).dropped["b"]
    assert desk.coordinator.lagging(1) == [], "barred from this version"
    assert only(desk.offer(2), FormGroup).members == ("a", "b")


def test_a_restart_wipes_the_slate() -> None:
    desk = Desk("a")
    desk.offer(1)
    for epoch in range(1, MAX_STRIKES + 1):
        desk.say("a", UpdateFailed(epoch, 1, "x"))
    assert desk.coordinator.lagging(1) == []
    assert only(desk.join("a", incarnation=2), FormGroup).members == ("a",)


def test_one_that_cannot_apply_is_dropped_and_the_others_are_done() -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    desk.ready(1, 1, "a", "b")
    desk.feed(BroadcastDone(1, SUMS))
    desk.stage(1, 1, "a", "b")
    desk.apply(1, 1, "a")
    actions = desk.say("b", UpdateFailed(1, 1, "no such parameter"))
    assert set(sent(actions, UpdateAborted)) == {"b"}
    assert only(actions, Published).members == ("a",)


def test_a_broken_broadcast_is_tried_again_and_given_up_in_the_end() -> None:
    desk = Desk("a")
    desk.offer(1)
    for epoch in range(1, MAX_BROKEN_BROADCASTS):
        assert only(desk.feed(BroadcastFailed(epoch, "reset by peer")), FormGroup).epoch == epoch + 1
    actions = desk.feed(BroadcastFailed(MAX_BROKEN_BROADCASTS, "reset by peer"))
    assert "reset by peer" in only(actions, PublishFailed).reason
    assert set(sent(actions, UpdateAborted)) == {"a"}
    assert only(desk.offer(2), FormGroup).members == ("a",), "it is still a member"


def test_a_hung_broadcast_ends_at_the_deadline() -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    desk.ready(1, 1, "a", "b")
    actions = desk.expire()
    assert {a.name for a in actions if isinstance(a, MemberDropped)} == {"a", "b"}
    assert DropGroup(1) in actions
    assert only(desk.join("a"), FormGroup).members == ("a",)


def test_a_learner_that_does_not_finish_its_broadcast_ends_at_the_deadline() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.ready(1, 1, "a")
    desk.stage(1, 1, "a")
    assert only(desk.expire(), FormGroup).epoch == 2


def test_one_that_is_late_to_apply_is_dropped() -> None:
    desk = Desk("a", "b")
    desk.offer(1)
    desk.ready(1, 1, "a", "b")
    desk.feed(BroadcastDone(1, SUMS))
    desk.stage(1, 1, "a", "b")
    desk.apply(1, 1, "b")
    actions = desk.expire()
    assert set(sent(actions, UpdateAborted)) == {"a"}
    assert only(actions, Published).members == ("b",)


def test_answers_of_another_epoch_version_incarnation_or_phase_change_nothing() -> None:
    desk = Desk("a")
    desk.offer(5)
    for message in (
        UpdateReady(2, 5),
        UpdateReady(1, 4),
        UpdateApplied(1, 5, 0.0),
        UpdateStaged(1, 5, np.array(SUMS)),
        UpdateFailed(2, 5, "late news"),
        StoreValue(1, "k", b"v"),
        MemberJoined(5),
    ):
        assert desk.say("a", message) == []
    assert desk.say("a", UpdateReady(1, 5), incarnation=9) == []
    assert desk.say("stranger", UpdateReady(1, 5)) == []
    assert desk.feed(BroadcastDone(1, SUMS)) == []
    assert desk.feed(BroadcastFailed(9, "x")) == []
    assert desk.feed(MemberLost("stranger")) == []
    assert desk.coordinator.tick(desk.now) == []
    assert desk.ready(1, 5, "a") == [Broadcast(1, 5)]
    assert desk.ready(1, 5, "a") == []


def test_a_member_that_left_an_idle_group_gets_a_new_one() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.complete(1, 1, "a")
    assert desk.join("a") == [DropGroup(1)]
    assert only(desk.offer(2), FormGroup).epoch == 2


def test_a_group_that_breaks_while_idle_is_not_used_again() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.complete(1, 1, "a")
    assert desk.feed(BroadcastFailed(1, "x")) == [DropGroup(1)]
    assert only(desk.offer(2), FormGroup).epoch == 2


def test_of_several_queued_versions_only_the_newest_is_published() -> None:
    desk = Desk("a")
    desk.offer(1)
    assert desk.offer(2) == []
    assert desk.offer(4) == [Superseded(2)]
    assert desk.offer(3) == [Superseded(3)]
    actions = desk.complete(1, 1, "a")
    assert only(actions, Published).policy_version == 1
    assert sent(actions, UpdateOffered) == {"a": UpdateOffered(1, 4, MANIFEST, DEADLINE_S)}
    assert only(desk.complete(1, 4, "a"), Published).policy_version == 4


def test_a_version_that_all_members_have_is_published_at_once() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.complete(1, 1, "a")
    assert desk.offer(1) == [Published(1, ("a",), {})]


def test_withdrawing_tells_everyone_and_ends_both_updates() -> None:
    desk = Desk("a")
    desk.offer(1)
    desk.offer(2)
    actions = desk.coordinator.withdraw("shutting down", desk.now)
    desk.coordinator.validate()
    assert kinds(actions) == ["Superseded", "UpdateAborted", "DropGroup", "PublishFailed"]
    assert not desk.coordinator.is_busy
    assert desk.coordinator.withdraw("again", desk.now) == []
