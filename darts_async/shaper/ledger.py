"""The ledger: an append-only file of MessagePack records, one terminal record per sample.

Each record is one MessagePack map with a `type`; they follow one another without a frame, so a crash can only tear
the last one, and reading stops there. Records are written in one `write` per batch of events: what a process has
written survives its own death (not a power cut).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgpack
import msgspec
from msgspec import Struct

from darts_async.errors import DataError
from darts_async.shaper.group import Fate, Purpose


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
    fate: Fate
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


class StepsUndone(Record, frozen=True):
    """The learner is back at this version, older than all groups that were kept: the steps from it on are undone for
    good. What they had trained stays trained in the books and is in no step; other groups take these steps."""

    policy_version: int


class RunReopened(Record, frozen=True):
    """A run that had ended goes on after so many steps, with new generators: a later version is void."""

    num_steps: int


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
    | StepsUndone
    | RunReopened
)


class LedgerWriter:
    """Appends records to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._encoder = msgspec.msgpack.Encoder()
        self.num_bytes = os.fstat(self._file).st_size

    def append(self, records: Sequence[AnyRecord]) -> None:
        """Write records in one call; they are with the operating system on return."""
        self._write(b"".join(map(self._encoder.encode, records)))

    def catch_up(self, num_bytes: int, records: Sequence[AnyRecord]) -> None:
        """Write what is missing of the records that belong behind the first `num_bytes`: a process has died, and
        another has come to the same decisions.

        Raises:
            DataError: the file holds something else there.
        """
        data = b"".join(map(self._encoder.encode, records))
        there = os.pread(self._file, max(0, self.num_bytes - num_bytes), num_bytes)
        if self.num_bytes < num_bytes or not data.startswith(there):
            raise DataError(
                f"{self._path} and the journal beside it tell different stories from byte {num_bytes} of "
                f"{self.num_bytes} on: one of them was changed or lost; the run can only be resumed from a checkpoint"
            )
        self._write(data[len(there) :])

    def _write(self, data: bytes) -> None:
        self.num_bytes += len(data)
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)


def read_ledger(path: Path) -> Iterator[AnyRecord]:
    """The records of a ledger in order, without a torn last one.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for fields in msgpack.Unpacker(file, raw=False):
            yield msgspec.convert(fields, AnyRecord)
