"""The state of a shaper, and what a new process needs beside it to continue. Pure.

Everything that happens to a shaper is an `Input`, and `take` is the only way in. A shaper that starts from the same
`JournalHead` and takes the same inputs under the same settings reaches the same state, with the same outputs. The
journal depends on this. A run may be resumed with other settings, so the head holds those of its life.

A position in the ledger is a number of records, so that this module can make the shaper's part of a checkpoint,
`Shared`.

After a greeting, generators and reward processes ask again for their work. Messages to the launcher, and those that the
learner keeps for a checkpoint, are *reports*: they are remembered until the peer has handled them.
"""

from collections.abc import Callable
from typing import TypeGuard, cast

import msgspec
from msgspec import Struct

from darts_async.protocol import LearnerReady, RunFinished, ShaperSnapshot, TakeUpAgain
from darts_async.shaper.ledger import LearnerRewound, Lineage, Position, SampleEnded, TakenBack
from darts_async.shaper.outbox import Forget, Output, SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import Incoming, ShaperState, StateSnapshot
from darts_async.topology.roles import LAUNCHER
from darts_async.wire.encoding import decoder, encode
from darts_async.wire.framing import frame, read_frames


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
    """The deadline of an orderly end has passed."""


class Restarted(Input, frozen=True):
    """A new process has replaced a dead one."""


class Reopened(Input, frozen=True):
    """All processes have ended, and the run continues in another life."""

    life: int


class Confirmed(Input, frozen=True):
    """A peer has handled every report so far."""

    peer: str


class RolloutsWritten(Input, frozen=True):
    """A file of rollouts is written, or was given up because it could not be written."""

    serial: int
    is_given_up: bool


AnyInput = Heard | CameUp | WentDown | Ticked | Stopped | Abandoned | Restarted | Reopened | Confirmed | RolloutsWritten


class JournalHead(Struct, frozen=True):
    """The state of a shaper, to be encoded at once. `ledger_bytes` is the size of the ledger at that moment."""

    now_s: float
    snapshot: StateSnapshot
    heard: dict[str, tuple[int, int]]
    reports: list[SendTo]
    ledger_bytes: int
    place: Position
    firsts: dict[int, int]
    """See `Lineage`."""
    settings: str
    """The settings of the run, as JSON."""


class Shared(Struct, frozen=True):
    """The shaper's part of a checkpoint, to be encoded at once. Groups that are open in it do not continue."""

    now_s: float
    snapshot: StateSnapshot
    place: Position
    """The position in the ledger at that moment."""


MAX_SHARED_BYTES = 32 << 20
"""Size limit of a message. A larger part is left out, which can only happen while a learner catches up."""
MakeState = Callable[[StateSnapshot | None], ShaperState]


class ReplayableState:
    """See the module."""

    def __init__(self, make_state: MakeState, snapshot: StateSnapshot | None = None, life: int = 1) -> None:
        self._make_state = make_state
        self.state = make_state(snapshot)
        self.life = life
        """The present life of the run."""
        self.lineage = Lineage()
        self.now_s = 0.0
        """Time of the newest input."""
        self.heard: dict[str, tuple[int, int]] = {}
        """{peer: (incarnation, number of its first message that was not taken)}"""
        self.reports: list[SendTo] = []
        """Unconfirmed reports, in order."""

    @classmethod
    def of(cls, head: JournalHead, make_state: MakeState) -> "ReplayableState":
        """The inverse of `to_head`."""
        replayable = cls(make_state, head.snapshot, head.place.life)
        replayable.now_s, replayable.heard, replayable.reports = head.now_s, head.heard, head.reports
        replayable.lineage.num_records, replayable.lineage.firsts = head.place.num_records, head.firsts
        return replayable

    @property
    def place(self) -> Position:
        """The position in the ledger."""
        return Position(self.life, self.lineage.num_records)

    def to_head(self, ledger_bytes: int) -> JournalHead:
        """For `of`."""
        return JournalHead(
            now_s=self.now_s,
            snapshot=self.state.to_state(),
            heard=self.heard,
            reports=self.reports,
            ledger_bytes=ledger_bytes,
            place=self.place,
            firsts=self.lineage.firsts,
            settings=self.state.settings,
        )

    def continue_with(self, make_state: MakeState) -> None:
        """Continue from this state under the settings of `make_state`."""
        self._make_state, self.state = make_state, make_state(self.state.to_state())

    def take(self, given: AnyInput) -> list[Output]:
        """Handle one input completely."""
        self.now_s = given.now_s
        return self._noted(self._decide(given))

    def start_over(self, ready: LearnerReady, shared: Shared | None, now_s: float) -> list[Output]:
        """Continue with a learner whose version does not follow from this state: from the shaper's part of its
        checkpoint, from the beginning if it has the first model, or else from the sums of this state. Later records
        become void. If earlier records are lost, the ledger begins again with their sums."""
        return self._noted(self._start_over(ready, shared, now_s))

    def begin_again(self) -> list[Output]:
        """Begin again: all records of the ledger become void."""
        return self._noted([TakenBack(0)] if self.lineage.num_records else [])

    def _noted(self, outputs: list[Output]) -> list[Output]:
        """Count the records, complete what goes to a checkpoint, and remember the reports."""
        for output in outputs:
            if not isinstance(output, SendTo | Forget):
                self.lineage.take(output)
        outputs = [self._completed(output) for output in outputs]
        self.reports += [output for output in outputs if is_report(output)]
        return outputs

    def _completed(self, output: Output) -> Output:
        if isinstance(output, SendTo) and isinstance(output.message, ShaperSnapshot):
            version = output.message.policy_version
            shared = Shared(self.now_s, self.state.to_checkpoint(version), self.place)
            state = encode_shared(shared)
            return SendTo(output.peer, ShaperSnapshot(version, state if len(state) <= MAX_SHARED_BYTES else b""))
        return output

    def _start_over(self, ready: LearnerReady, shared: Shared | None, now_s: float) -> list[Output]:
        num_records = self.lineage.num_records
        if shared is None and not ready.policy_version:  # the first model: nothing had happened
            shared = Shared(0.0, self._make_state(None).to_state(), Position(1, 0))
        if shared is not None:
            before, self.state = self.state, self._make_state(shared.snapshot)
            self.state.take_peers_of(before)
        outputs = self.state.start_over(now_s, self.life, ready.policy_version, ready.next_group_id)
        if shared is not None and self.lineage.holds(shared.place):
            is_later = num_records > shared.place.num_records
            return [*([TakenBack(shared.place.num_records)] if is_later else []), *outputs]
        num_records = max(num_records, shared.place.num_records if shared is not None else 0)
        position = self.state.feed.committed.position
        undone = [LearnerRewound(position)] if self.state.feed.committed.is_behind else []
        kept = [each for each in outputs if not isinstance(each, SampleEnded)]
        return [self.state.sums(num_records), *kept, *undone]

    def _decide(self, given: AnyInput) -> list[Output]:
        match given:
            case Heard(now_s, peer, incarnation, seq, message):
                self.heard[peer] = incarnation, seq + 1
                return [*self._prepared_for(message, now_s), *self.state.handle(peer, message, now_s)]
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
            case Reopened(now_s, life):
                self.reports = [report for report in self.reports if _outlives_a_life(report)]
                self.life, self.heard = life, {}
                return self.state.reopen(now_s, life)
            case Confirmed(_, peer):
                self.reports = [report for report in self.reports if report.peer != peer]
                return []
            case RolloutsWritten(_, serial, is_given_up):
                self.state.work.rollouts.written(serial, is_given_up=is_given_up)
                return []

    def _prepared_for(self, message: Incoming, now_s: float) -> list[Output]:
        """Start over if the learner is at a version that this state does not explain."""
        if not isinstance(message, LearnerReady) or self.state.phase is RunPhase.FINISHED:
            return []
        if self.state.explains(message.policy_version) or not self.state.may_start_over:
            return []
        return self._start_over(message, decode_shared(message.shaper_state), now_s)


def encode_shared(shared: Shared) -> bytes:
    """The bytes for a checkpoint."""
    return frame(encode(shared))


def decode_shared(data: bytes) -> Shared | None:
    """The inverse of `encode_shared`; None if the bytes are torn, damaged, empty or of another version."""
    payloads = read_frames(data).payloads
    try:
        return cast(Shared, decoder(Shared).decode(payloads[0])) if payloads else None
    except msgspec.DecodeError:
        return None


def _outlives_a_life(report: SendTo) -> bool:
    """The end of a life is reported in that life only. A checkpoint part for its learner is not for the next learner,
    which may reach the same version by other steps."""
    return report.peer == LAUNCHER and not isinstance(report.message, RunFinished | TakeUpAgain)


def is_report(output: Output) -> TypeGuard[SendTo]:
    """Whether it is kept until its peer has handled it."""
    return isinstance(output, SendTo) and (output.peer == LAUNCHER or isinstance(output.message, ShaperSnapshot))
