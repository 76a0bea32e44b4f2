"""What `LearnerState` tells the process to do: actions, at once and in order, and moves of the trainer's owner."""

from dataclasses import dataclass

from darts_async.protocol import Message, TrainGroup
from darts_async.transport import Event
from darts_async.weights.sending.events import MemberLost, MemberMessage


@dataclass(frozen=True, slots=True)
class Tell:
    link: str
    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Refuse:
    """Accept nothing more from the sender of this event."""

    event: Event
    reason: str


Action = Tell | Refuse | MemberMessage | MemberLost
"""The last two are for the coordinator of the weights."""


@dataclass(frozen=True, slots=True)
class Wait:
    """There is nothing to do until `what` has come."""

    what: str


FOR_GENERATORS = Wait("generators")
FOR_SHAPER = Wait("the shaper")


@dataclass(frozen=True, slots=True)
class Train:
    """Forward and backward of these groups, in one pass."""

    groups: tuple[TrainGroup, ...]


@dataclass(frozen=True, slots=True)
class TakeStep:
    """Change the parameters: all groups of the step are in the gradient. Answered by `step_taken`."""

    groups: tuple[TrainGroup, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Begin to give the generators this version; answered by `published`."""

    version: int


@dataclass(frozen=True, slots=True)
class Save:
    """Begin to write a checkpoint of this version; answered by `saved`."""

    version: int
    has_shaper: bool  # whether the shaper's own state is there, or will come


class WriteModel:
    """Write the final model out of the last checkpoint; answered by `model_written`."""


class Leave:
    """There is nothing left to do."""


Move = Wait | Train | TakeStep | Publish | Save | WriteModel | Leave
