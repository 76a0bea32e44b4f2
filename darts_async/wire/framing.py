"""Records in a file or messages in a pipe: each has its length and two CRC-32 before it, so that damage is seen.

    | length | CRC-32 of the length | CRC-32 of the payload | payload |     numbers: 32 bits, little-endian

A file that ends inside a record is *torn*: a writer died, or a disk lost the tail. A file with a wrong checksum is
*damaged*, and all that follows is lost. The length has its own checksum: without it, a flipped bit there would look
like a torn tail, and all later records would be dropped silently.
"""

from array import array
from dataclasses import dataclass
from struct import Struct
from zlib import crc32

_HEAD = Struct("<III")
_LENGTH = Struct("<I")
HEAD_BYTES = _HEAD.size
"""What a frame adds to its payload."""


@dataclass(frozen=True, slots=True)
class Frames:
    """The records of a file that can be read."""

    data: memoryview
    begins: "array[int]"
    """The first byte of each."""
    num_bytes: int
    """Length of the complete records: what follows is torn or damaged."""
    is_damaged: bool
    """A checksum is wrong at `num_bytes`."""

    @property
    def payloads(self) -> list[memoryview]:
        """Views of the data. With millions of records, use `payload_at` one after the other."""
        return [payload_at(self.data, begin) for begin in self.begins]


def frame(payload: bytes) -> bytes:
    """One record as it is written.

    >>> len(frame(b"abc"))
    15
    """
    length = len(payload)
    return _HEAD.pack(length, crc32(_LENGTH.pack(length)), crc32(payload)) + payload


def payload_length(head: bytes | memoryview) -> int | None:
    """The length of the payload after a head; None if the head is damaged."""
    length, sum_of_length, _ = _HEAD.unpack(head)
    return int(length) if crc32(head[: _LENGTH.size]) == sum_of_length else None


def is_payload_of(head: bytes | memoryview, payload: bytes | memoryview) -> bool:
    """Whether the head was written for this payload."""
    return bool(crc32(payload) == _HEAD.unpack(head)[2])


def payload_at(data: memoryview, begin: int) -> memoryview:
    """The payload of the complete record that begins there, as a view."""
    (length,) = _LENGTH.unpack_from(data, begin)
    return data[begin + HEAD_BYTES : begin + HEAD_BYTES + length]


def read_frames(data: bytes | memoryview) -> Frames:
    """All records up to the first that is torn or damaged."""
    view, begin, begins = memoryview(data), 0, array("Q")
    while begin + HEAD_BYTES <= len(view):
        head = view[begin : begin + HEAD_BYTES]
        if (length := payload_length(head)) is None:
            return Frames(view, begins, begin, is_damaged=True)
        end = begin + HEAD_BYTES + length
        if end > len(view):
            break
        if not is_payload_of(head, view[begin + HEAD_BYTES : end]):
            return Frames(view, begins, begin, is_damaged=True)
        begins.append(begin)
        begin = end
    return Frames(view, begins, begin, is_damaged=False)
