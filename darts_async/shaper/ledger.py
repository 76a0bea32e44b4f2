"""The ledger: an append-only file of records, one terminal record per sample.

Each record is one MessagePack map with a `type`, framed by its length and checksums (`wire.framing`): a crash can only
tear the last one, and reading stops there. Records are written in one `write` per batch of events: what a process has
written survives its own death, and a power loss about a second later.

Nothing that can be read is ever overwritten. A shaper that goes on from an earlier point than the ledger had reached
says so by `TakenBack`: readers leave out the records that are void by it. One that goes on from a later point, because
the file has lost records that no other file holds, says by `BroughtForward` what they had come to.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from darts_async.errors import DataError
from darts_async.machine.full_disk import append_whole
from darts_async.shaper.group import Purpose
from darts_async.topology.outcomes import Outcome
from darts_async.wire.framing import HEAD_BYTES, frame, read_frames


class Record(Struct, frozen=True, tag_field="type", tag=True):
    """Base of all records."""


class GroupOpened(Record, frozen=True):
    """A prompt was drawn and its samples launched; `floor` is the lowest version they can be decoded under."""

    group_id: int
    prompt_id: int
    purpose: Purpose
    num_samples: int
    floor: int
    cursor: int


class SamplePlaced(Record, frozen=True):
    """A generator was given a sample, for the first time or to go on with."""

    sample_id: int
    generator: str
    incarnation: int


class WeightsAcknowledged(Record, frozen=True):
    """A generator has said that it decodes under this version from now on."""

    generator: str
    incarnation: int
    policy_version: int


class GroupShipped(Record, frozen=True):
    """The kept samples went to the learner, for `step`."""

    group_id: int
    step: int


class GroupDropped(Record, frozen=True):
    """The group will not be trained; its prompt is asked again."""

    group_id: int
    reason: str


class SampleEnded(Record, frozen=True):
    """The one terminal event of a sample. `step` is set for trained samples only."""

    sample_id: int
    fate: Outcome
    reason: str
    num_tokens: int
    oldest_version: int | None
    newest_version: int | None
    step: int | None
    reward: float | None


class VersionSeen(Record, frozen=True):
    """A version was published."""

    policy_version: int


class StepCommitted(Record, frozen=True):
    """The learner has taken a step with these groups in its gradient, for the first time or again."""

    step: int
    group_ids: tuple[int, ...]


class LearnerRewound(Record, frozen=True):
    """The learner is back at this version: the steps from it on are undone, and are taken again."""

    policy_version: int


class RunReopened(Record, frozen=True):
    """A run whose processes had all ended goes on after so many steps, with new generators: a later version is void."""

    num_steps: int
    life: int = 0
    """Which start of the launcher this is of."""


class TakenBack(Record, frozen=True):
    """Of the records so far, without those that are void already, the first `num_records` count; the others are void:
    the shaper goes on from where it stood after these."""

    num_records: int


class BroughtForward(Record, frozen=True):
    """Earlier records are lost. Every sample of the groups before `next_group_id` has ended, and these are the sums."""

    num_records: int
    """That were before it, those that are lost included."""
    num_steps: int
    next_group_id: int
    samples_by_fate: dict[str, int]
    tokens_by_fate: dict[str, int]


AnyRecord = (
    GroupOpened
    | SamplePlaced
    | WeightsAcknowledged
    | GroupShipped
    | GroupDropped
    | SampleEnded
    | VersionSeen
    | StepCommitted
    | LearnerRewound
    | RunReopened
    | TakenBack
    | BroughtForward
)


_STEERING = (RunReopened, TakenBack, BroughtForward)
"""Records that say which others count."""


class Position(Struct, frozen=True):
    """A place in a ledger: after so many records, as this life of the run counted them."""

    life: int
    num_records: int


class Lineage:
    """Which of the records that were written count, and which places in the ledger are still in it.

    A life goes on from some place in what the lives before it have written. What these wrote after that place is void,
    and a later life counts other records by the same numbers. So a place names the life that counted.
    """

    def __init__(self) -> None:
        self.num_records = 0
        self.firsts = {1: 0}
        """{life: records before its first}, of the lives that have a record that counts."""

    def take(self, record: AnyRecord) -> None:
        """A record is written."""
        if not isinstance(record, _STEERING):
            self.num_records += 1
            return
        match record:
            case TakenBack(num_records=num_records):
                self.num_records = num_records
                self.firsts = {life: first for life, first in self.firsts.items() if first < max(num_records, 1)}
                if not num_records:
                    self.firsts = {1: 0}
                return
            case BroughtForward(num_records=num_records):
                self.num_records, self.firsts = num_records, {}
            case RunReopened(life=life):  # a life may start over: what it has before that still counts
                self.firsts.setdefault(life, self.num_records)
        self.num_records += 1

    def holds(self, position: Position) -> bool:
        """Whether the records before this place are all there, and count."""
        first = self.firsts.get(position.life)
        if first is None:
            return False
        end = min((each for life, each in self.firsts.items() if life > position.life), default=self.num_records)
        return first <= position.num_records <= end


class LedgerWriter:
    """Appends records to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.num_bytes = os.fstat(self._file).st_size

    def append(self, records: Sequence[AnyRecord]) -> None:
        """Write records in one call; they are with the operating system on return."""
        self._write(_framed(records))

    def catch_up(self, num_bytes: int, records: Sequence[AnyRecord]) -> None:
        """Write what is missing of the records that belong after the first `num_bytes`: a process has died, and another
        has come to the same decisions.

        Raises:
            DataError: the file holds something else there.
        """
        data = _framed(records)
        there = os.pread(self._file, max(0, self.num_bytes - num_bytes), num_bytes)
        if self.num_bytes < num_bytes or not data.startswith(there):
            raise DataError(
                f"{self.path} does not go on from byte {num_bytes} of {self.num_bytes} as the journal beside it says: "
                "one of them was changed or has lost its end; end the run and take it up again: "
                f"darts-launch resume {self.path.parent}"
            )
        self._write(data[len(there) :])

    def cut(self, num_bytes: int) -> None:
        """Nothing that can be read follows the first `num_bytes`."""
        os.ftruncate(self._file, num_bytes)
        self.num_bytes = num_bytes

    def _write(self, data: bytes) -> None:
        append_whole(self._file, data, self.path)
        self.num_bytes += len(data)

    def flusher(self) -> Callable[[], None]:
        """What has everything so far on the disk, to be called in any thread, whatever happens here meanwhile."""
        file = os.dup(self._file)

        def work() -> None:
            os.fsync(file)
            os.close(file)

        return work

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)


class Counted:
    """The records of a ledger that count, as they are written."""

    def __init__(self) -> None:
        self.records: list[AnyRecord] = []
        """In order, without those that are void."""
        self.lineage = Lineage()
        self.num_void = 0
        """Records that were taken back."""

    def take(self, record: AnyRecord) -> None:
        """A record is written."""
        if isinstance(record, TakenBack):
            num_taken_back = min(self.lineage.num_records - record.num_records, len(self.records))
            del self.records[len(self.records) - num_taken_back :]
            self.num_void += num_taken_back
        else:
            self.records.append(record)
        self.lineage.take(record)

    def corrected_to(self, other: "Counted") -> list[AnyRecord]:
        """What is to be written after these for those of `other` to count."""
        num_same, shorter = 0, min(len(self.records), len(other.records))
        while num_same < shorter and self.records[num_same] == other.records[num_same]:
            num_same += 1
        if num_same == len(self.records):
            return other.records[num_same:]
        if any(isinstance(record, BroughtForward) for record in self.records[num_same:]):
            return [TakenBack(0), *other.records]  # before it the numbers are others
        num_lost = self.lineage.num_records - len(self.records)
        return [TakenBack(num_lost + num_same), *other.records[num_same:]]


@dataclass(frozen=True, slots=True)
class FoundLedger:
    """What a ledger holds, as far as it can be read."""

    written: list[AnyRecord]
    """All records, in order."""
    ends: list[int]
    """The byte after each of them."""
    counted: Counted
    damaged_at: int | None
    """The byte from which on the file cannot be read, if that is not what a death leaves."""

    @property
    def records(self) -> list[AnyRecord]:
        """In order, without those that are void."""
        return self.counted.records

    @property
    def lineage(self) -> Lineage:
        """Of the records that count."""
        return self.counted.lineage

    @property
    def num_void(self) -> int:
        """Records that were taken back."""
        return self.counted.num_void

    @property
    def num_bytes(self) -> int:
        """Of the whole records."""
        return self.ends[-1] if self.ends else 0

    def until(self, num_bytes: int, num_records: int, firsts: dict[int, int]) -> Counted | None:
        """What counted when the file had so many bytes, if it had this lineage then; else None: it has lost its end
        since, or another file is in its place. Nothing is ever overwritten, so what was void later is here too."""
        num_written = bisect_right(self.ends, num_bytes)
        counted = _counted(self.written[:num_written])
        is_whole = num_bytes == (self.ends[num_written - 1] if num_written else 0)
        is_same = (counted.lineage.num_records, counted.lineage.firsts) == (num_records, firsts)
        return counted if is_whole and is_same else None


def scan_ledger(path: Path) -> FoundLedger:
    """Read up to the first record that is torn or damaged; a file that is not there holds nothing.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return FoundLedger([], [], Counted(), None)
    frames, decode = read_frames(data), msgspec.msgpack.Decoder(AnyRecord).decode
    damaged_at = frames.num_bytes if frames.is_damaged else None
    written: list[AnyRecord] = []
    ends: list[int] = []
    for payload in frames.payloads:
        num_bytes = ends[-1] if ends else 0
        try:
            written.append(decode(payload))
        except msgspec.DecodeError:  # whole, and not of this version
            damaged_at = num_bytes
            break
        ends.append(num_bytes + HEAD_BYTES + len(payload))
    return FoundLedger(written, ends, _counted(written), damaged_at)


def _counted(written: Iterable[AnyRecord]) -> Counted:
    counted = Counted()
    for record in written:
        counted.take(record)
    return counted


def read_ledger(path: Path) -> list[AnyRecord]:
    """The records of a ledger that count, in order: see `scan_ledger`. Raises `OSError`."""
    return scan_ledger(path).records


def _framed(records: Iterable[AnyRecord]) -> bytes:
    return b"".join(frame(_encode(record)) for record in records)


_encode = msgspec.msgpack.Encoder().encode
