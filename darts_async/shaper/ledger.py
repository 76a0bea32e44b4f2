"""The ledger: an append-only file of records, one terminal record per sample.

Each record is one MessagePack array, its kind and then its fields in order, framed by its length and checksums
(`wire.framing`): a crash can only tear the last one, and reading stops there. Records are written in one `write` per
batch of events: what a process has written survives its own death, and a power loss about a second later.

Nothing that can be read is ever overwritten. A shaper that continues from an earlier point than the end of the ledger
writes `TakenBack`: readers leave out the records that this makes void. One that continues from a later point, because
the file has lost records that no other file holds, writes their sums, `BroughtForward`.
"""

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import msgspec
from msgspec import Struct

from darts_async.errors import DataError
from darts_async.machine.full_disk import append_whole
from darts_async.shaper.group import Purpose
from darts_async.topology.outcomes import SampleOutcome
from darts_async.wire.framing import frame, payload_at, read_frames


class LedgerRecord(Struct, frozen=True, array_like=True):
    """Base of all records. Tags are part of the format: a number is never given to another kind."""


class GroupOpened(LedgerRecord, frozen=True, tag=0):
    """A prompt was drawn and its samples launched; `floor` is the lowest version they can be decoded under."""

    group_id: int
    prompt_id: int
    purpose: Purpose
    num_samples: int
    floor: int
    cursor: int


class SamplePlaced(LedgerRecord, frozen=True, tag=1):
    """A generator was given a sample, for the first time or to continue."""

    sample_id: int
    generator: str
    incarnation: int


class WeightsAcknowledged(LedgerRecord, frozen=True, tag=2):
    """A generator has said that it decodes under this version from now on."""

    generator: str
    incarnation: int
    policy_version: int


class GroupShipped(LedgerRecord, frozen=True, tag=3):
    """The kept samples went to the learner, for `step`."""

    group_id: int
    step: int


class GroupDropped(LedgerRecord, frozen=True, tag=4):
    """The group will not be trained; its prompt is asked again."""

    group_id: int
    reason: str


class SampleEnded(LedgerRecord, frozen=True, tag=5):
    """The one terminal event of a sample. `step` is set for trained samples only."""

    sample_id: int
    outcome: SampleOutcome
    reason: str
    num_tokens: int
    oldest_version: int | None
    newest_version: int | None
    step: int | None
    reward: float | None


class VersionSeen(LedgerRecord, frozen=True, tag=6):
    """A version was published."""

    policy_version: int


class StepCommitted(LedgerRecord, frozen=True, tag=7):
    """The learner has taken a step with these groups in its gradient, for the first time or again."""

    step: int
    group_ids: tuple[int, ...]


class LearnerRewound(LedgerRecord, frozen=True, tag=8):
    """The learner is back at this version: the steps from it on are undone, and are taken again."""

    policy_version: int


class RunReopened(LedgerRecord, frozen=True, tag=9):
    """The run continues with new processes after so many steps. A later version is void."""

    num_steps: int
    life: int = 0
    """Which life of the run this is of."""


class TakenBack(LedgerRecord, frozen=True, tag=10):
    """Of the records that count so far, the first `num_records` still do, and the others are void: the shaper continues
    from its state after these."""

    num_records: int


class BroughtForward(LedgerRecord, frozen=True, tag=11):
    """Earlier records are lost. Every sample of the groups before `next_group_id` has ended, and these are the sums."""

    num_records: int
    """Before it, the lost ones included."""
    num_steps: int
    next_group_id: int
    samples_by_outcome: dict[str, int]
    tokens_by_outcome: dict[str, int]


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
    """A place in a ledger: after so many records, as this life of the run counts them.

    A checkpoint has one. It is unambiguous: a life takes records back, if at all, before its learner continues (see
    `ShaperState.may_start_over`), so before any checkpoint of it."""

    life: int
    num_records: int


class Lineage:
    """Which of the written records count, and which places in the ledger are still valid.

    A life continues from some place in what earlier lives have written. What these wrote after that place is void, and
    the new life gives the same numbers to other records. So a place names the life that counted.
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
            case RunReopened(life=life):  # a life may start over: what it has written before still counts
                self.firsts.setdefault(life, self.num_records)
        self.num_records += 1

    def holds(self, position: Position) -> bool:
        """Whether all records before this place are there, and count."""
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
        """Write what is missing of the records that belong after the first `num_bytes`: another process has made the
        decisions of one that died again.

        Raises:
            DataError: the file holds something else there.
        """
        data = _framed(records)
        there = os.pread(self._file, max(0, self.num_bytes - num_bytes), num_bytes)
        if self.num_bytes < num_bytes or not data.startswith(there):
            raise DataError(
                f"{self.path} does not continue from byte {num_bytes} of {self.num_bytes} as the journal beside it "
                "says: one of them was changed or has lost its end; end the run and take it up again: "
                f"darts-launch resume {self.path.parent}"
            )
        self._write(data[len(there) :])

    def cut(self, num_bytes: int) -> None:
        """Remove what follows the first `num_bytes`, which cannot be read."""
        os.ftruncate(self._file, num_bytes)
        self.num_bytes = num_bytes

    def _write(self, data: bytes) -> None:
        append_whole(self._file, data, self.path)
        self.num_bytes += len(data)

    def flusher(self) -> Callable[[], None]:
        """A call that flushes all that is written so far to the disk; any thread may make it, whatever happens here."""
        file = os.dup(self._file)

        def work() -> None:
            os.fsync(file)
            os.close(file)

        return work

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)


class Records(Sequence[AnyRecord]):
    """Records of a ledger as bytes, each decoded whenever it is asked for: a run has millions of them, which take ten
    times as much memory as objects."""

    def __init__(self, data: memoryview, begins: "array[int]") -> None:
        """Those of `data` that begin at these bytes."""
        self.data, self._begins, self._later = data, begins, bytearray()

    def append(self, record: AnyRecord, begin: int | None = None) -> None:
        """One more, which `data` holds at `begin` or not at all."""
        if begin is None:
            begin = len(self.data) + len(self._later)
            self._later += frame(_encode(record))
        self._begins.append(begin)

    def cut(self, num_records: int) -> None:
        """Keep only the first so many."""
        del self._begins[num_records:]

    def num_same(self, other: "Records") -> int:
        """How many are the same as in another, from the first on."""
        shorter, one_file = min(len(self), len(other)), self.data is other.data
        for number in range(shorter):
            begin, theirs = self._begins[number], other._begins[number]
            is_one = one_file and begin == theirs < len(self.data)
            if not is_one and self[number] != other[number]:
                return number
        return shorter

    def begin(self, number: int) -> int:
        """The byte where this one begins."""
        return self._begins[number]

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, number: int) -> AnyRecord: ...
    @overload
    def __getitem__(self, number: slice) -> list[AnyRecord]: ...
    def __getitem__(self, number: int | slice) -> AnyRecord | list[AnyRecord]:
        if isinstance(number, slice):
            return [self._at(begin) for begin in self._begins[number]]
        return self._at(self._begins[number])

    def _at(self, begin: int) -> AnyRecord:
        later = begin - len(self.data)
        return _decode(payload_at(self.data, begin) if later < 0 else payload_at(memoryview(self._later), later))


class Counted:
    """The records of a ledger that count, as they are written."""

    def __init__(self, data: memoryview) -> None:
        """`data`: what the file holds, of which no record is taken yet."""
        self.records = Records(data, array("Q"))
        """In order, without those that are void."""
        self.lineage = Lineage()
        self.num_void = 0
        """Records that were taken back."""

    def take(self, record: AnyRecord, begin: int | None = None) -> None:
        """A record is written; `begin` is where it is in the file, if that had it when it was read."""
        if isinstance(record, TakenBack):
            num_taken_back = min(self.lineage.num_records - record.num_records, len(self.records))
            self.records.cut(len(self.records) - num_taken_back)
            self.num_void += num_taken_back
        else:
            self.records.append(record, begin)
        self.lineage.take(record)

    def corrected_to(self, other: "Counted") -> list[AnyRecord]:
        """What is to be written after these for those of `other` to count."""
        num_same = self.records.num_same(other.records)
        if num_same == len(self.records):
            return other.records[num_same:]
        if any(isinstance(record, BroughtForward) for record in self.records[num_same:]):
            return [TakenBack(0), *other.records]  # before it the numbers are others
        num_lost = self.lineage.num_records - len(self.records)
        return [TakenBack(num_lost + num_same), *other.records[num_same:]]


@dataclass(frozen=True, slots=True)
class FoundLedger:
    """What a ledger holds, as far as it can be read."""

    written: Records
    """All records, in order."""
    num_bytes: int
    """Of the whole records."""
    counted: Counted
    damaged_at: int | None
    """The byte from which on the file cannot be read, if that is not what a death leaves."""

    @property
    def records(self) -> Records:
        """In order, without those that are void."""
        return self.counted.records

    def until(self, num_bytes: int, num_records: int, firsts: dict[int, int]) -> Counted | None:
        """What counted when the file had so many bytes, if it had this lineage then. Else None: it has lost its end
        since, or another file is in its place. Nothing is ever overwritten, so records that became void later are here
        too."""
        num_written = bisect_left(range(len(self.written)), num_bytes, key=self.written.begin)
        counted = Counted(self.written.data)
        for number in range(num_written):
            counted.take(self.written[number], self.written.begin(number))
        end = self.num_bytes if num_written == len(self.written) else self.written.begin(num_written)
        is_whole = num_bytes == end
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
        data = b""
    frames = read_frames(data)
    written, counted = Records(frames.data, frames.begins), Counted(frames.data)
    for number, begin in enumerate(frames.begins):
        try:
            record = written[number]
        except msgspec.DecodeError:  # whole, and not of this version
            written.cut(number)
            return FoundLedger(written, begin, counted, begin)
        counted.take(record, begin)
    return FoundLedger(written, frames.num_bytes, counted, frames.num_bytes if frames.is_damaged else None)


def read_ledger(path: Path) -> Records:
    """The records of a ledger that count, in order: see `scan_ledger`. Raises `OSError`."""
    return scan_ledger(path).records


def _framed(records: Iterable[AnyRecord]) -> bytes:
    return b"".join(frame(_encode(record)) for record in records)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AnyRecord).decode
