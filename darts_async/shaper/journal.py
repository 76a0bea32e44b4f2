"""The journal: where the shaper stood, and everything that has happened to it since.

One file of records, each four bytes of length and as many of MessagePack. The first is a `Head`, the others are inputs
in order. What has been written survives the death of the process (not a power cut), so

- inputs are written before anybody hears of what followed from them, and before they are acknowledged;
- a death can only tear the last record: reading stops there, and what it held comes again;
- the file is replaced by a new head at once, by renaming, when the inputs outweigh the head. So its size is bounded by
  that of what is in flight, and no more than twice the inputs is ever written.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from struct import Struct as Layout

import msgspec

from darts_async.disk import append_whole
from darts_async.errors import DataError
from darts_async.shaper.encoding import decoder, encode
from darts_async.shaper.standing import AnyInput, Head

MIN_BYTES = 1 << 18
"""Fewer bytes of inputs are not worth a new head."""
_LENGTH = Layout("<I")


class Journal:
    """Writes a journal. `begin` or `resume` comes first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_suffix(".new")
        self._file = -1
        self._head_bytes = 0
        self._num_bytes = 0

    @property
    def is_due(self) -> bool:
        """Whether to begin again."""
        return self._num_bytes - self._head_bytes >= max(MIN_BYTES, self._head_bytes)

    def begin(self, head: Head) -> None:
        """Start with this head, in place of what there was."""
        self.prepare(head)
        self.replace()

    def prepare(self, head: Head) -> None:
        """Write the new journal beside the old one."""
        self.close()
        self._file = os.open(self._beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self._num_bytes = 0
        self._write(_record(encode(head)))
        self._head_bytes = self._num_bytes

    def replace(self) -> None:
        """Put what `prepare` has written in the place of the old one."""
        self._beside.replace(self._path)

    def resume(self, num_bytes: int) -> None:
        """Go on behind the whole records of a journal that `read_journal` has read."""
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._file, num_bytes)
        self._head_bytes, self._num_bytes = 0, num_bytes

    def append(self, inputs: Iterable[AnyInput]) -> None:
        """Write inputs in one call; they are with the operating system on return."""
        self._write(b"".join(_record(encode(given)) for given in inputs))

    def close(self) -> None:
        """Write no more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, data: bytes) -> None:
        append_whole(self._file, data, self._path)
        self._num_bytes += len(data)


def read_journal(path: Path) -> tuple[Head, list[AnyInput], int]:
    """The head, the inputs in order, and the number of bytes that these take: behind them is a torn record at most.

    Raises:
        OSError: the file cannot be read.
        DataError: it is no journal of this version.
    """
    data = path.read_bytes()
    records = list(_records(memoryview(data)))
    try:
        if not records:
            raise DataError(f"{path} is empty: it is no journal of a shaper; move it away to start anew")
        head = decoder(Head).decode(records[0])
        decode_input = decoder(AnyInput).decode
        inputs = [decode_input(record) for record in records[1:]]
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} is no journal of this version: {error}; a run goes on with the version it began with"
        ) from error
    return head, inputs, sum(_LENGTH.size + len(record) for record in records)


def _record(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


def _records(data: memoryview) -> Iterator[memoryview]:
    begin = 0
    while begin + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, begin)
        begin += _LENGTH.size
        if begin + length > len(data):
            return
        yield data[begin : begin + length]
        begin += length
