"""Messages between two processes of one machine, over pipes or a local socket that only these two have.

Each message is one frame (see `framing`) of MessagePack (see `encoding`). After the death of a writer all its complete
messages can be read.
"""

import asyncio
import contextlib
import socket
from typing import Any, BinaryIO, Generic, TypeVar, cast

import msgspec

from darts_async.errors import ProtocolError, TransportError
from darts_async.wire.encoding import decoder, encode
from darts_async.wire.framing import HEAD_BYTES, frame, is_payload_of, payload_length

MAX_MESSAGE_BYTES = 1 << 26
"""Enough for a manifest of a million tensors, or a long prompt with its metadata."""
MAX_UNREAD_BYTES = 1 << 26
"""The other end hangs if it leaves more than this unread."""

Receives = TypeVar("Receives")


class Channel(Generic[Receives]):
    """One end, for an event loop. `receives` is the union of what comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receives: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder(receives)

    @classmethod
    async def over(cls, end: socket.socket, receives: Any) -> "Channel[Receives]":
        """Take over one end of a socket pair."""
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, receives)

    async def receive(self) -> Receives | None:
        """The next message; None if there will be no more. Raises `ProtocolError` for an invalid one."""
        try:
            head = await self._reader.readexactly(HEAD_BYTES)
            payload = await self._reader.readexactly(_length_after(head))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return cast(Receives, _decoded(head, payload, self._decoder))

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message, unless the other end is gone. Raises `TransportError` if that does not read."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            raise TransportError(f"{MAX_UNREAD_BYTES} bytes to another process of this machine have not been read")
        self._writer.write(frame(encode(message)))

    async def close(self) -> None:
        """Write what is queued, then close."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def read_message(file: BinaryIO, decode: "msgspec.msgpack.Decoder[Receives]") -> Receives | None:
    """The next message of a pipe, for a process without an event loop; None at its end, also inside a message. Raises
    `ProtocolError` if what arrived is not a message."""
    head = file.read(HEAD_BYTES)
    payload = file.read(_length_after(head)) if len(head) == HEAD_BYTES else b""
    if len(head) < HEAD_BYTES or len(payload) < _length_after(head):
        return None
    return _decoded(head, payload, decode)


def write_message(file: BinaryIO, message: msgspec.Struct) -> None:
    """Write a message into a pipe, and flush it."""
    file.write(frame(encode(message)))
    file.flush()


def _length_after(head: bytes) -> int:
    length = payload_length(head)
    if length is None or length > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {length} bytes: more than {MAX_MESSAGE_BYTES}, or its head is damaged")
    return length


def _decoded(head: bytes, payload: bytes, decode: "msgspec.msgpack.Decoder[Receives]") -> Receives:
    if not is_payload_of(head, payload):
        raise ProtocolError(f"a message of {len(payload)} bytes is damaged")
    try:
        return decode.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message of this version: {error}") from error
