"""A generator's membership, without a transfer: whatever comes in whatever order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.protocol import (
    EpochFormed,
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
from darts_async.weights.receiving.member import Action, Apply, Member, Order, Report, Tell

MANIFEST = WeightManifest((TensorSpec("w", "float32", (4,)),), 4096)
NO_CHECKSUMS = np.empty(0, np.int64)


def formed(epoch: int) -> EpochFormed:
    return EpochFormed(epoch, 1, 2, "gloo", "127.0.0.1", 1.0)


def staged_member() -> Member:
    """It has received version 0 in epoch 1, and only the commit is missing."""
    member = Member(num_ranks=1)
    member.join()
    for message in (formed(1), UpdateOffered(1, 0, MANIFEST, 1.0)):
        member.handle(message)
    for report in (UpdateReady(1, 0), UpdateStaged(1, 0, NO_CHECKSUMS)):
        member.report(report)
    return member


def test_what_was_committed_is_applied_and_told() -> None:
    member = staged_member()
    assert member.handle(UpdateCommitted(1, 0)) == [Order(UpdateCommitted(1, 0)), Apply(0)]
    assert member.applied(0.5) == [Tell(UpdateApplied(1, 0, 0.5))]
    assert member.policy_version == 0


def test_an_offer_that_comes_while_an_update_is_applied_waits_for_its_end() -> None:
    member, offered = staged_member(), UpdateOffered(1, 1, MANIFEST, 1.0)
    member.handle(UpdateCommitted(1, 0))
    assert member.handle(offered) == []
    assert member.applied(0.0) == [Tell(UpdateApplied(1, 0, 0.0)), Order(offered)]


def test_a_member_that_fails_says_so_and_asks_for_the_next_group() -> None:
    member = staged_member()
    actions = member.report(UpdateFailed(1, 0, "torn"))
    failed, joined = Tell(UpdateFailed(1, 0, "torn")), Tell(MemberJoined(-1, 1))
    assert actions == [Order(UpdateAborted(1, 0, "torn")), failed, joined]
    assert member.handle(UpdateCommitted(1, 0)) == [], "it has left"


epochs, versions = st.integers(1, 4), st.integers(0, 3)
messages: st.SearchStrategy[LearnerToGenerator] = st.one_of(
    st.builds(formed, epochs),
    st.builds(lambda epoch: StoreValue(epoch, "k", b"v"), epochs),
    st.builds(lambda epoch, version: UpdateOffered(epoch, version, MANIFEST, 1.0), epochs, versions),
    st.builds(UpdateCommitted, epochs, versions),
    st.builds(lambda epoch, version: UpdateAborted(epoch, version, "given up"), epochs, versions),
)
reports: st.SearchStrategy[Report] = st.one_of(
    st.builds(UpdateReady, epochs, versions),
    st.builds(lambda epoch, version: UpdateStaged(epoch, version, NO_CHECKSUMS), epochs, versions),
    st.builds(lambda epoch, version: UpdateFailed(epoch, version, "broke"), epochs, versions),
)
inputs = st.one_of(messages, reports, st.sampled_from(("join", "lost", "applied", "apply failed")))


@pytest.mark.slow
@settings(max_examples=400)
@given(st.lists(inputs, max_size=60))
def test_the_transfer_hears_of_one_group_at_a_time_and_applies_one_update_at_a_time(said: list[object]) -> None:
    member, group, applying = Member(num_ranks=1), -1, False
    for each in said:
        actions: list[Action] = []
        match each:
            case "join":
                actions = member.join()
            case "lost":
                actions = member.leave("lost")
            case "applied" | "apply failed" if applying:
                applying = False
                actions = member.applied(0.0) if each == "applied" else member.apply_failed("torn")
            case UpdateReady() | UpdateStaged() | UpdateFailed():
                actions = member.report(each)
            case EpochFormed() | StoreValue() | UpdateOffered() | UpdateCommitted() | UpdateAborted():
                actions = member.handle(each)
        member.validate()
        for action in actions:
            match action:
                case Order(EpochFormed(epoch)):
                    assert group == -1, "the group before was left"
                    group = epoch
                case Order(command):
                    assert command.epoch == group
                    if isinstance(command, UpdateAborted):
                        group = -1
                case Apply():
                    assert not applying
                    applying = True
