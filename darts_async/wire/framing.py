"""Records in a file, messages in a pipe: each framed by its length and two CRC-32, so that no damage is taken for one.

    | length | CRC-32 of the length | CRC-32 of the payload | payload |     numbers: 32 bits, little-endian

A file that was written in order can end in three ways. At the end of a record: it is whole. In the middle of one: it is
*torn*, because a writer died or a disk lost the tail. Or a checksum is wrong: it is *damaged* from there on, and what
follows is as good as lost. The length has a checksum of its own because a flipped bit in it would otherwise pass for a
torn tail, and all records after it would be dropped without a word.
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
    """The records of a file, as far as they can be read."""

    data: memoryview
    begins: "array[int]"
    """The first byte of each."""
    num_bytes: int
    """Of the whole records: what follows is torn or damaged."""
    is_damaged: bool
    """A checksum is wrong at `num_bytes`."""

    @property
    def payloads(self) -> list[memoryview]:
        """Views of the data: of a file with millions of records, take one after the other by `payload_at`."""
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
    """Whether a payload is what the head was written for."""
    return bool(crc32(payload) == _HEAD.unpack(head)[2])


def payload_at(data: memoryview, begin: int) -> memoryview:
    """The payload of the whole record that begins there, as a view."""
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
