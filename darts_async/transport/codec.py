"""Encodes and decodes the messages of one link.

A message is a MessagePack header followed by one raw buffer per array. In the header an array is the pair
`[dtype, index of its buffer]`. Buffers are numbered in the order of the header, so a message has exactly one encoding
and every buffer is used exactly once.

Both directions are checked. For any bytes, `decode` only raises `ProtocolError`. `encode` refuses what the receiver
would refuse (an array of the wrong type or rank, a message that is too large), so that an error is raised at its cause.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from darts_async.errors import ProtocolError
from darts_async.protocol import Message

Payload = tuple[bytes, ...]
"""The frames of one message: the header, then the arrays."""


class MessageCodec:
    """Encodes the messages that a link sends and decodes those that it receives, each a class or a union.
    `max_message_bytes` bounds the sum of all frames of a message, both ways."""

    def __init__(self, *, receives: Any, sends: Any, max_message_bytes: int) -> None:
        self._sends = sends
        self._max_message_bytes = max_message_bytes
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._detach)
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(receives, dec_hook=self._attach)
        self._buffers: list[bytes] = []
        self._unread: list[bytes] = []
        self._num_read = 0

    def encode(self, message: Message) -> Payload:
        """The frames of `message`. Arrays are copied, so the caller may change them later."""
        kind = type(message)
        if not isinstance(message, self._sends):
            raise ProtocolError(f"{kind.__name__} is not a message that this link sends ({_name(self._sends)})")
        for field, dtype in _array_fields(kind):
            _check_array(getattr(message, field), dtype, f"{kind.__name__}.{field}")
        self._buffers = []
        header = self._encoder.encode(message)
        payload = (header, *self._buffers)
        self._check_size(payload)
        return payload

    def decode(self, frames: Sequence[bytes]) -> Message:
        """The message in `frames`; its arrays are read-only views of them. Raises `ProtocolError`."""
        if not frames:
            raise ProtocolError("a message without a header")
        self._check_size(frames)
        self._unread = list(frames[1:])
        self._num_read = 0
        try:
            message: Message = self._decoder.decode(frames[0])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"malformed message: {error}") from error
        if self._num_read != len(self._unread):
            raise ProtocolError(f"{len(self._unread)} array frames, of which the header uses {self._num_read}")
        return message

    def _check_size(self, frames: Sequence[bytes]) -> None:
        num_bytes = sum(map(len, frames))
        if num_bytes > self._max_message_bytes:
            raise ProtocolError(
                f"a message of {num_bytes} bytes, but transport.max_message_bytes is {self._max_message_bytes}"
            )

    def _detach(self, value: object) -> tuple[str, int]:
        if not isinstance(value, np.ndarray):
            raise ProtocolError(f"cannot send a {type(value).__name__}")
        self._buffers.append(value.tobytes())
        return value.dtype.str, len(self._buffers) - 1

    def _attach(self, annotation: type, value: object) -> np.ndarray[Any, Any]:
        if not (isinstance(value, list) and len(value) == 2):
            raise ValueError("an array must be [dtype, frame index]")
        name, index = value
        element = _element_of(annotation)
        if name != element.name:
            raise ValueError(f"an array of {str(name)[:16]!r} where {element.name!r} is due")
        if type(index) is not int or index != self._num_read or index >= len(self._unread):
            raise ValueError(f"array frame {str(index)[:16]} where {self._num_read} of {len(self._unread)} is due")
        frame = self._unread[index]
        if len(frame) % element.num_bytes:
            raise ValueError(f"{len(frame)} bytes are not a multiple of the size of {element.name!r}")
        self._num_read += 1
        return np.frombuffer(frame, element.dtype)


def _check_array(array: object, dtype: np.dtype[Any], place: str) -> None:
    if not isinstance(array, np.ndarray):
        raise ProtocolError(f"{place} is a {type(array).__name__}, not an array")
    if array.dtype != dtype or array.ndim != 1:
        raise ProtocolError(f"{place} is {array.dtype}{list(array.shape)}, but must be one row of {dtype}")


@cache
def _array_fields(kind: type[Message]) -> tuple[tuple[str, np.dtype[Any]], ...]:
    hints = get_type_hints(kind)
    return tuple((name, _element_of(hint).dtype) for name, hint in hints.items() if get_origin(hint) is np.ndarray)


class _Element(NamedTuple):
    """The elements of an array, little-endian on every machine."""

    dtype: np.dtype[Any]
    name: str
    num_bytes: int


@cache
def _element_of(annotation: Any) -> _Element:
    """The elements of an `NDArray[...]` annotation."""
    _shape, element = get_args(annotation)
    dtype = np.dtype(get_args(element)[0]).newbyteorder("<")
    return _Element(dtype, dtype.str, dtype.itemsize)


def _name(union: Any) -> str:
    return " | ".join(kind.__name__ for kind in get_args(union) or (union,))
