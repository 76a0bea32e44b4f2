"""The ledger: an append-only file of MessagePack records, one terminal record per sample.

Each record is one MessagePack map with a `type`; they follow one another without a frame, so a crash can only tear
the last one, and reading stops there. Records are written in one `write` per batch of events: what a process has
written survives its own death (not a power cut).
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgpack
import msgspec
from msgspec import Struct

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


AnyRecord = GroupOpened | GroupShipped | GroupDropped | SampleEnded | VersionSeen | StepCommitted | LearnerRewound


class LedgerWriter:
    """Appends records to a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._encoder = msgspec.msgpack.Encoder()

    def append(self, records: list[AnyRecord]) -> None:
        """Write records in one call; they are with the operating system on return."""
        data = b"".join(map(self._encoder.encode, records))
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
