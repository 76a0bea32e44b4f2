"""Messages between processes of one machine."""

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from darts_async.errors import ProtocolError
from darts_async.protocol import Greet, UpdateStaged
from darts_async.reward.worker_messages import WorkItem
from darts_async.wire import channel
from darts_async.wire.channel import Channel, read_message, write_message
from darts_async.wire.encoding import decoder, encode
from darts_async.wire.framing import HEAD_BYTES, frame

SAID = (Greet(1), UpdateStaged(3, 7, np.arange(5, dtype=np.int64)), Greet(2))


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[socket.socket, "Channel[Any]"]]:
    """A raw end, and a channel at the other."""
    raw, theirs = socket.socketpair()
    with raw:
        opened: Channel[Any] = await Channel.over(theirs, Greet | UpdateStaged)
        yield raw, opened
        await opened.close()


async def test_what_one_end_sends_the_other_receives_arrays_included() -> None:
    raw, theirs = socket.socketpair()
    ours: Channel[Any] = await Channel.over(raw, Greet)
    other: Channel[Any] = await Channel.over(theirs, Greet | UpdateStaged)
    for message in SAID:
        ours.send(message)
    await ours.close()
    heard = [await other.receive() for _ in SAID]
    assert heard[::2] == list(SAID[::2])
    assert heard[1].checksums.tolist() == list(range(5))
    assert await other.receive() is None, "the other end is closed"
    other.send(Greet(9))  # nothing happens
    await other.close()


@given(st.integers(0, 200))
def test_a_torn_message_is_as_good_as_not_written(num_bytes: int) -> None:
    whole, torn = frame(encode(Greet(1))), frame(encode(WorkItem("a", "b", "{}", "stop", b"1234")))
    file = io.BytesIO(whole + torn[: min(num_bytes, len(torn) - 1)])
    assert read_message(file, decoder(Greet)) == Greet(1)
    assert read_message(file, decoder(WorkItem)) is None


async def test_a_torn_message_ends_a_channel() -> None:
    async with ends() as (raw, opened):
        raw.sendall(frame(encode(Greet(1)))[:-1])
        raw.shutdown(socket.SHUT_WR)
        assert await opened.receive() is None


@given(st.integers(0, 8 * HEAD_BYTES + 7))
def test_no_flipped_bit_is_taken_for_a_message(bit: int) -> None:
    data = bytearray(frame(encode(Greet(1))))
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    with pytest.raises(ProtocolError, match="damaged"):
        read_message(io.BytesIO(bytes(data)), decoder(Greet))


class Unknown(Struct, tag=True):
    """Of another version."""


async def test_a_message_of_another_version_is_refused() -> None:
    async with ends() as (raw, opened):
        raw.sendall(frame(encode(Unknown())))
        with pytest.raises(ProtocolError, match="of this version"):
            await asyncio.wait_for(opened.receive(), 10.0)


def test_a_message_that_is_too_large_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 8)
    file = io.BytesIO()
    write_message(file, WorkItem("a" * 100, "b", "{}", "stop", b""))
    file.seek(0)
    with pytest.raises(ProtocolError, match="more than 8"):
        read_message(file, decoder(WorkItem))
