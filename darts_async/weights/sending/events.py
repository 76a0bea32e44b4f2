"""The events that the coordinator handles, and the actions that it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from darts_async.protocol import GeneratorToLearner, LearnerToGenerator

# --- events ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberMessage:
    name: str
    incarnation: int
    message: GeneratorToLearner


@dataclass(frozen=True, slots=True)
class MemberLost:
    name: str


@dataclass(frozen=True, slots=True)
class BroadcastDone:
    """The learner has sent all buckets. Its tensors have these checksums. [num_tensors]"""

    epoch: int
    checksums: Sequence[int]


@dataclass(frozen=True, slots=True)
class BroadcastFailed:
    """The learner could not join the group of `epoch`, or could not send."""

    epoch: int
    error: str


CoordinatorEvent = MemberMessage | MemberLost | BroadcastDone | BroadcastFailed


# --- actions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendToMember:
    name: str
    message: LearnerToGenerator


@dataclass(frozen=True, slots=True)
class FormGroup:
    """Join the group of `epoch` as rank 0."""

    epoch: int
    world_size: int  # ranks: the learner's and each member's
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send all buckets to the group of `epoch`; answered by `BroadcastDone` or `BroadcastFailed`."""

    epoch: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class DropGroup:
    """Abort the group of `epoch` and all calls in it."""

    epoch: int


@dataclass(frozen=True, slots=True)
class MemberDropped:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Published:
    """The members have applied the version. The durations are those of the successful round."""

    policy_version: int
    members: tuple[str, ...]
    dropped: Mapping[str, str]
    """Former members, with the reason."""
    forming_s: float = 0.0
    """Joining the group, unless it existed, and getting ready."""
    transfer_s: float = 0.0
    """Packing, broadcast and checksums on both sides."""
    apply_s: float = 0.0
    """Waiting for step boundaries and swapping."""
    stalls_s: Mapping[str, float] = field(default_factory=dict)
    """Time in which each member decoded nothing."""


@dataclass(frozen=True, slots=True)
class PublishFailed:
    policy_version: int
    reason: str
    dropped: Mapping[str, str]
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Superseded:
    """A queued version was replaced by a newer one."""

    policy_version: int


CoordinatorAction = (
    SendToMember | FormGroup | Broadcast | DropGroup | MemberDropped | Published | PublishFailed | Superseded
)
