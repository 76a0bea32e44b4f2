"""A stream of typed messages between a keeper and its agent, over a socket that only these two have.

Each message is four bytes of length and as many of MessagePack. What was written before the writer died can still be
read; a message that was torn by its death is as good as not written.
"""

import asyncio
import contextlib
import socket
from struct import Struct as Layout
from typing import Any, Generic, TypeVar, cast

import msgspec

from darts_async.errors import ProtocolError, TransportError
from darts_async.protocol import Message

MAX_MESSAGE_BYTES = 16 << 20
MAX_UNREAD_BYTES = 64 << 20
"""More than this unread, and the other end hangs."""
_LENGTH = Layout("<I")

Receives = TypeVar("Receives", bound=Message)


class Channel(Generic[Receives]):
    """One end. `receives` is the union of what comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receives: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._encode = msgspec.msgpack.Encoder().encode

    @classmethod
    async def over(cls, end: socket.socket, receives: Any) -> "Channel[Receives]":
        """Take over one end of a socket pair."""
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, receives)

    async def receive(self) -> Receives | None:
        """The next message; None when there will be no more. Raises `ProtocolError` for what is none."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MAX_MESSAGE_BYTES:
                raise ProtocolError(f"a message of {length} bytes between keeper and agent")
            return cast(Receives, self._decoder.decode(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except msgspec.DecodeError as error:
            raise ProtocolError(f"not a message between keeper and agent of this version: {error}") from error

    def send(self, message: Message) -> None:
        """Queue a message; nothing if the other end is gone. Raises `TransportError` if it does not read."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            raise TransportError(f"{MAX_UNREAD_BYTES} bytes between keeper and agent have not been read")
        data = self._encode(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def close(self) -> None:
        """Write what is queued, and no more."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
