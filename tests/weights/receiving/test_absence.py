"""Weights that nobody is there to take: the only generator has died, and is to come back."""

from darts_async.config import RestartConfig
from darts_async.protocol import EpochFormed, MemberJoined, TensorSpec, WeightManifest, WeightsRefused
from darts_async.weights.sending.coordinator import Coordinator
from darts_async.weights.sending.events import MemberLost, MemberMessage, PublishFailed, SendToMember

MANIFEST = WeightManifest((TensorSpec("w", "float32", (4,)),), 4096)


def coordinator_whose_only_member_is_gone() -> Coordinator:
    coordinator = Coordinator(backend="gloo", interface="127.0.0.1", deadline_s=10.0, absence_s=100.0)
    coordinator.handle(MemberMessage("generator/0", 1, MemberJoined(-1)), 0.0)
    coordinator.offer(1, MANIFEST, 0.0)
    coordinator.handle(MemberLost("generator/0"), 1.0)
    coordinator.validate()
    return coordinator


def test_an_update_outlasts_the_absence_of_the_only_generator_and_goes_to_its_next_incarnation() -> None:
    coordinator = coordinator_whose_only_member_is_gone()
    assert coordinator.tick(100.9) == []
    actions = coordinator.handle(MemberMessage("generator/0", 2, MemberJoined(-1)), 100.9)
    [formed] = [a.message for a in actions if isinstance(a, SendToMember) and isinstance(a.message, EpochFormed)]
    assert formed.world_size == 2


def test_an_absence_that_does_not_end_fails_the_update() -> None:
    coordinator = coordinator_whose_only_member_is_gone()
    [failed] = coordinator.tick(101.0)
    assert isinstance(failed, PublishFailed)
    assert "no generator was available to receive it within 100 s" in failed.reason


def test_nobody_waits_for_the_return_of_a_member_that_is_there_and_failed_too_often() -> None:
    coordinator = Coordinator(backend="gloo", interface="127.0.0.1", deadline_s=10.0, absence_s=1000.0)
    coordinator.handle(MemberMessage("generator/0", 1, MemberJoined(-1)), 0.0)
    actions, now = coordinator.offer(1, MANIFEST, 0.0), 0.0
    while (deadline := coordinator.deadline) is not None and now < 500.0:  # it never answers, and joins again
        now = deadline
        actions = coordinator.tick(now)
        if coordinator.is_busy:
            coordinator.handle(MemberMessage("generator/0", 1, MemberJoined(-1)), now)
        coordinator.validate()
    [failed] = [action for action in actions if isinstance(action, PublishFailed)]
    assert "only generator/0 is available, and failed too often" in failed.reason
    assert now == 40.0, "three rounds and one deadline more"


def test_a_member_that_failed_too_often_and_has_ended_is_waited_for() -> None:
    coordinator = Coordinator(backend="gloo", interface="127.0.0.1", deadline_s=10.0, absence_s=1000.0)
    coordinator.handle(MemberMessage("generator/0", 1, MemberJoined(-1)), 0.0)
    coordinator.offer(1, MANIFEST, 0.0)
    refused = []
    for now in (10.0, 20.0, 30.0):
        refused += [
            a for a in coordinator.tick(now) if isinstance(a, SendToMember) and isinstance(a.message, WeightsRefused)
        ]
        coordinator.handle(MemberMessage("generator/0", 1, MemberJoined(-1)), now)
        coordinator.validate()
    assert [send.name for send in refused] == ["generator/0"]
    coordinator.handle(MemberLost("generator/0"), 31.0)
    coordinator.validate()
    assert coordinator.tick(200.0) == []
    assert coordinator.handle(MemberMessage("generator/0", 2, MemberJoined(-1)), 200.0), "a new one begins anew"


def test_the_absence_that_is_allowed_holds_every_start_that_the_policy_allows() -> None:
    policy = RestartConfig.model_validate(
        {"intensity": {"max": 2}, "backoff": {"initial_s": 1.0, "max_s": 4.0, "jitter": 0.5}}
    )
    assert policy.absence_s(start_timeout_s=60.0) == 3 * (4.0 * 1.5 + 60.0)
