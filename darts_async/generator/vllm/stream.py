"""Messages over a local stream socket: the number of frames, their sizes, the frames (see `transport.codec`)."""

import asyncio
import struct

from darts_async.errors import ProtocolError
from darts_async.protocol import GeneratorToWorker, Message, WorkerToGenerator
from darts_async.transport.codec import MessageCodec

MAX_MESSAGE_BYTES = 1 << 26
"""A manifest of a million tensors fits."""


def worker_codec() -> MessageCodec:
    """Of a worker's end."""
    return MessageCodec(receives=GeneratorToWorker, sends=WorkerToGenerator, max_message_bytes=MAX_MESSAGE_BYTES)


def generator_codec() -> MessageCodec:
    """Of the generator's end."""
    return MessageCodec(receives=WorkerToGenerator, sends=GeneratorToWorker, max_message_bytes=MAX_MESSAGE_BYTES)


def write_message(stream: asyncio.StreamWriter, codec: MessageCodec, message: Message) -> None:
    """Queue a message. What is queued is bounded by the protocol: a worker is told a handful of messages per update."""
    frames = codec.encode(message)
    stream.write(struct.pack(f"=B{len(frames)}I", len(frames), *map(len, frames)) + b"".join(frames))


async def read_message(stream: asyncio.StreamReader, codec: MessageCodec) -> Message | None:
    """The next message; None at the end of the stream, in the middle of a message or not.

    Raises:
        ProtocolError: the data are not a message.
    """
    try:
        (num_frames,) = await stream.readexactly(1)
        sizes = struct.unpack(f"={num_frames}I", await stream.readexactly(4 * num_frames))
        if sum(sizes) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {sum(sizes)} bytes, the limit is {MAX_MESSAGE_BYTES}")
        return codec.decode([await stream.readexactly(size) for size in sizes])
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
