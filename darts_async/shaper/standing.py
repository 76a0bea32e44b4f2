"""Where a shaper stands: its state, and what another process needs beside it to take its place.

Everything that happens to a shaper is an `Input`, and `take` is the only way in. A shaper that starts from a `Head` and
takes the same inputs stands where the first one stood, with the same outputs on the way: this is what the journal
rests on. Pure, as the state.

What generators and reward processes were sent is asked for again when they are greeted. Not so what goes to the
launcher, and what the learner keeps for a checkpoint: these *reports* are remembered until they have been handled.
"""

from collections.abc import Callable
from typing import TypeGuard

from msgspec import Struct

from darts_async.protocol import RunFinished, ShaperSnapshot
from darts_async.shaper.state import LAUNCHER, Incoming, ShaperState, Snapshot
from darts_async.shaper.workload import Output, Send


class Input(Struct, frozen=True, tag=True):
    """Something that happens to a shaper."""

    now_s: float


class Heard(Input, frozen=True):
    """A message, the `seq`-th of this incarnation of a peer."""

    peer: str
    incarnation: int
    seq: int
    message: Incoming


class CameUp(Input, frozen=True):
    """A peer is connected."""

    peer: str
    incarnation: int


class WentDown(Input, frozen=True):
    """A peer is gone, or silent."""

    peer: str
    is_gone: bool


class Ticked(Input, frozen=True):
    """Time has passed."""


class Stopped(Input, frozen=True):
    """The run is to end early."""

    reason: str


class Abandoned(Input, frozen=True):
    """The end has been waited for long enough."""


class Restarted(Input, frozen=True):
    """A new process has taken the place of the one before."""


class Reopened(Input, frozen=True):
    """A run that was stopped, or whose end was not noted, goes on."""


class Confirmed(Input, frozen=True):
    """A peer has handled every report so far."""

    peer: str


AnyInput = Heard | CameUp | WentDown | Ticked | Stopped | Abandoned | Restarted | Reopened | Confirmed


class Head(Struct, frozen=True):
    """Where a shaper stood, to be encoded at once. `ledger_bytes` is how much of the ledger was written by then."""

    now_s: float
    snapshot: Snapshot
    heard: dict[str, tuple[int, int]]
    reports: list[Send]
    ledger_bytes: int


class Standing:
    """See the module."""

    def __init__(self, state: ShaperState) -> None:
        self.state = state
        self.now_s = 0.0
        """Of the newest input."""
        self.heard: dict[str, tuple[int, int]] = {}
        """{peer: (incarnation, first message of it that has not been taken)}"""
        self.reports: list[Send] = []
        """Not confirmed, in order."""

    @classmethod
    def of(cls, head: Head, revive: Callable[[Snapshot], ShaperState]) -> "Standing":
        """Where `to_head` was taken."""
        standing = cls(revive(head.snapshot))
        standing.now_s, standing.heard, standing.reports = head.now_s, head.heard, head.reports
        return standing

    def to_head(self, ledger_bytes: int) -> Head:
        """For `of`."""
        return Head(self.now_s, self.state.to_state(), self.heard, self.reports, ledger_bytes)

    def take(self, given: AnyInput) -> list[Output]:
        """One input, completely."""
        self.now_s = given.now_s
        outputs = self._decide(given)
        self.reports += [output for output in outputs if is_report(output)]
        return outputs

    def _decide(self, given: AnyInput) -> list[Output]:
        match given:
            case Heard(now_s, peer, incarnation, seq, message):
                self.heard[peer] = incarnation, seq + 1
                return self.state.handle(peer, message, now_s)
            case CameUp(now_s, peer, incarnation):
                return self.state.peer_up(peer, incarnation, now_s)
            case WentDown(now_s, peer, is_gone):
                return self.state.peer_lost(peer, now_s, is_gone=is_gone)
            case Ticked(now_s):
                return self.state.tick(now_s)
            case Stopped(now_s, reason):
                return self.state.stop(reason, now_s)
            case Abandoned(now_s):
                return self.state.abandon(now_s)
            case Restarted(now_s):
                return self.state.restarted(now_s)
            case Reopened(now_s):
                self.reports = [report for report in self.reports if not isinstance(report.message, RunFinished)]
                return self.state.reopen(now_s)
            case Confirmed(_, peer):
                self.reports = [report for report in self.reports if report.peer != peer]
                return []


def is_report(output: Output) -> TypeGuard[Send]:
    """Whether it is kept until it has been handled."""
    return isinstance(output, Send) and (output.peer == LAUNCHER or isinstance(output.message, ShaperSnapshot))
