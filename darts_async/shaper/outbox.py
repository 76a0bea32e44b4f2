"""What the shaper decides to do: messages to send and records to write, in order.

All parts of the state share one `Outbox`, which is emptied at the end of each event.
"""

from dataclasses import dataclass

from darts_async.protocol import ProcessToLauncher, ShaperToGenerator, ShaperToLearner, ShaperToReward
from darts_async.shaper.ledger import AnyRecord
from darts_async.topology.roles import LAUNCHER, LEARNER


@dataclass(frozen=True, slots=True)
class SendTo:
    """A message for a peer."""

    peer: str
    message: ShaperToGenerator | ShaperToReward | ShaperToLearner | ProcessToLauncher


@dataclass(frozen=True, slots=True)
class Forget:
    """Messages that an earlier incarnation of this peer has not acknowledged are void."""

    peer: str


Output = SendTo | Forget | AnyRecord


class Outbox:
    """The outputs of one event."""

    def __init__(self) -> None:
        self._outputs: list[Output] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing was decided since `take`."""
        return not self._outputs

    def send(self, peer: str, message: ShaperToGenerator | ShaperToReward) -> None:
        """A generator or a reward process is to get this."""
        self._outputs.append(SendTo(peer, message))

    def to_learner(self, message: ShaperToLearner) -> None:
        """The learner is to get this."""
        self._outputs.append(SendTo(LEARNER.first, message))

    def to_launcher(self, message: ProcessToLauncher) -> None:
        """The launcher is to get this."""
        self._outputs.append(SendTo(LAUNCHER, message))

    def forget(self, peer: str) -> None:
        """Another incarnation of the peer is up."""
        self._outputs.append(Forget(peer))

    def record(self, record: AnyRecord) -> None:
        """This is to be in the ledger before any later output is sent."""
        self._outputs.append(record)

    def take(self) -> list[Output]:
        """All outputs since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs
