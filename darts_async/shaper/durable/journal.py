"""The journal: a state of the shaper, and everything that has happened to it since.

One file of framed records (`wire.framing`). The first is a `JournalHead`, the others are inputs in order. What was
written survives the death of the process. About a second later it also survives a power loss.

- Inputs are written before any peer hears of their consequences, and before they are acknowledged.
- A death can only tear the last record. Reading stops there, and its peer sends that input again.
- When the inputs are larger than the head, a new journal with a new head is begun beside the old one. Inputs go to both
  until the new one is on the disk and takes the name of the old one. So the file is as large as the work in flight, and
  a power loss leaves one of the two complete.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from darts_async.errors import NoSpaceError
from darts_async.machine.full_disk import append_whole
from darts_async.shaper.durable.replayable_state import AnyInput, JournalHead
from darts_async.wire.atomic_file import flush
from darts_async.wire.encoding import decoder, encode
from darts_async.wire.framing import frame, read_frames

MIN_BYTES = 1 << 18
"""Fewer bytes of inputs are not worth a new head."""


class Journal:
    """Writes a journal. Call `begin` or `resume` first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_suffix(".new")
        self._file = self._next = -1
        self._head_bytes = self._next_head_bytes = 0
        self._num_bytes = self._next_bytes = 0

    @property
    def is_due(self) -> bool:
        """Whether to call `prepare`."""
        return self._next < 0 and self._num_bytes - self._head_bytes >= max(MIN_BYTES, self._head_bytes)

    @property
    def is_prepared(self) -> bool:
        """Whether a new one waits for `replace`."""
        return self._next >= 0

    def begin(self, head: JournalHead) -> None:
        """Replace any journal by one with this head. It is on the disk on return."""
        self.prepare(head)
        os.fsync(self._next)
        self.replace()
        flush(self._path.parent)

    def prepare(self, head: JournalHead) -> None:
        """Write a new journal beside the old one; what is appended from now on goes to both."""
        if self._next >= 0:  # it is written again
            os.close(self._next)
        self._next = os.open(self._beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        data = frame(encode(head))
        try:
            append_whole(self._next, data, self._beside)
        except (OSError, NoSpaceError):
            os.close(self._next)
            self._next = -1
            self._beside.unlink(missing_ok=True)
            raise
        self._next_head_bytes = self._next_bytes = len(data)

    def replace(self) -> None:
        """Replace the old journal by that of `prepare`, which must have been flushed."""
        self._beside.replace(self._path)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._next = self._next, -1
        self._head_bytes, self._num_bytes = self._next_head_bytes, self._next_bytes

    def resume(self, num_bytes: int) -> None:
        """Continue after the complete records that `read_journal` found. A new journal that a dead process has begun is
        removed."""
        self._beside.unlink(missing_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._file, num_bytes)
        self._head_bytes, self._num_bytes = 0, num_bytes

    def append(self, inputs: Iterable[AnyInput]) -> None:
        """Write inputs in one call. The operating system has them on return."""
        data = b"".join(frame(encode(given)) for given in inputs)
        append_whole(self._file, data, self._path)
        self._num_bytes += len(data)
        if self._next >= 0:
            append_whole(self._next, data, self._beside)
            self._next_bytes += len(data)

    def flusher(self) -> Callable[[], None]:
        """A function for any thread that flushes everything so far to the disk."""
        files, directory = [os.dup(file) for file in (self._file, self._next) if file >= 0], self._path.parent

        def work() -> None:
            for file in files:
                os.fsync(file)
                os.close(file)
            flush(directory)

        return work

    def close(self) -> None:
        """Flush to the disk and write no more."""
        for file in (self._file, self._next):
            if file >= 0:
                os.fsync(file)
                os.close(file)
        self._file = self._next = -1


@dataclass(frozen=True, slots=True)
class FoundJournal:
    """The readable part of a journal."""

    head: JournalHead | None
    inputs: list[AnyInput]
    num_bytes: int
    """Size of the complete records."""
    fault: str
    """Why reading stopped, unless a death explains it."""


def read_journal(path: Path) -> FoundJournal:
    """Read up to the first record that is torn or damaged.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return FoundJournal(None, [], 0, f"{path} is not there")
    frames = read_frames(data)
    fault = f"{path} is damaged from byte {frames.num_bytes} of {len(data)} on" if frames.is_damaged else ""
    if not frames.payloads:
        return FoundJournal(None, [], 0, fault or f"{path} has no whole record in its {len(data)} bytes")
    try:
        head = decoder(JournalHead).decode(frames.payloads[0])
        decode_input = decoder(AnyInput).decode
        inputs = [decode_input(payload) for payload in frames.payloads[1:]]
    except msgspec.DecodeError as error:
        return FoundJournal(None, [], 0, f"{path} is not a journal of this version: {error}")
    return FoundJournal(head, inputs, frames.num_bytes, fault)
