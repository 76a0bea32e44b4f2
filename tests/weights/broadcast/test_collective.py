"""One broadcast group over real gloo: what ends a wait, and what is left behind."""

import asyncio
import errno
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager

import psutil
import pytest
import torch

from darts_async.errors import ConfigError, DeadlineError, WeightUpdateError
from darts_async.protocol import StoreValue
from darts_async.weights.broadcast.close_gloo_sockets import addresses_in, sever
from darts_async.weights.broadcast.collective import CONNECT_LIMIT_S, Collective, GroupSpec
from darts_async.weights.broadcast.gloo_listener import refuse_strangers
from darts_async.weights.broadcast.relay_store import RelayStore

LONG_S = 60.0
"""A deadline that a test never waits for."""


class Ranks:
    """A group of which all members are in this process."""

    def __init__(self, world_size: int, *, deadline_s: float = LONG_S) -> None:
        loop = asyncio.get_running_loop()
        self.stores = [
            RelayStore(1, lambda value, rank=rank: self.relay(rank, value), loop, deadline_s=deadline_s)  # type: ignore[misc]
            for rank in range(world_size)
        ]
        self.members = [
            Collective(GroupSpec(1, rank, world_size, "gloo", "127.0.0.1", deadline_s), store, loop)
            for rank, store in enumerate(self.stores)
        ]

    def relay(self, sender: int, value: StoreValue) -> None:
        for rank, store in enumerate(self.stores):
            if rank != sender:
                store.put(value.key, value.value)

    def form(self, rank: int) -> "asyncio.Future[None]":
        return outcome_of(self.members[rank].form)

    def broadcast(self, rank: int, buffer: torch.Tensor, *, deadline_s: float = LONG_S) -> "asyncio.Future[None]":
        member = self.members[rank]
        deadline = time.monotonic() + deadline_s
        return outcome_of(lambda done: member.submit(lambda: member.post(buffer, deadline).wait(), done))


def outcome_of(begin: Callable[[Callable[[Future[None]], None]], None]) -> "asyncio.Future[None]":
    result: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(outcome: Future[None]) -> None:
        if error := outcome.exception():
            result.set_exception(error)
        else:
            result.set_result(None)

    begin(done)
    return result


@asynccontextmanager
async def formed(world_size: int) -> AsyncIterator[Ranks]:
    before = set(psutil.Process().net_connections("inet"))
    ranks = Ranks(world_size)
    try:
        async with asyncio.timeout(LONG_S):
            await asyncio.gather(*map(ranks.form, range(world_size)))
            yield ranks
    finally:
        for member in ranks.members:
            await member.close(LONG_S)
    assert threads_left() == []
    assert set(psutil.Process().net_connections("inet")) <= before


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weights-")]


def is_refused(address: tuple[str, int]) -> bool:
    """Whether a connection of a stranger, which takes no time at loopback, does not come about."""
    with socket.socket() as stranger:
        stranger.settimeout(0.02)
        return stranger.connect_ex(address) == errno.EAGAIN


def large(value: int) -> torch.Tensor:
    """More than the kernel takes for a peer that does not read."""
    return torch.full((32 << 20,), value, dtype=torch.uint8)


async def test_rank_0_fills_the_buffers_of_the_others() -> None:
    async with formed(3) as ranks:
        buffers = [torch.full((1000,), 7 if rank == 0 else 0, dtype=torch.uint8) for rank in range(3)]
        await asyncio.gather(*(ranks.broadcast(rank, buffer) for rank, buffer in enumerate(buffers)))
        assert all(bool((buffer == 7).all()) for buffer in buffers)


@pytest.mark.parametrize("rank", [0, 1])
async def test_abort_frees_a_thread_whose_peer_never_calls(rank: int) -> None:
    async with formed(2) as ranks:
        waiting = ranks.broadcast(rank, large(1))
        queued = ranks.broadcast(rank, large(1))
        ranks.members[rank].abort("the test gives up")
        with pytest.raises(WeightUpdateError):
            await waiting
        with pytest.raises(WeightUpdateError, match="the test gives up"):
            await queued


async def test_no_stranger_gets_into_a_formed_group_and_none_costs_a_descriptor() -> None:
    """Each connection to gloo's port would cost a descriptor that only the end of the group gives back."""
    async with formed(3) as ranks:
        ports = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        addresses = {address for store in ranks.stores for address in addresses_in(store.own_values())}
        listening = [port for port in ports if port in addresses]
        assert len(listening) == 3
        before = psutil.Process().num_fds()
        for address in listening * 2:
            assert is_refused(address)
        assert psutil.Process().num_fds() == before
        buffers = [torch.full((1000,), 7 if rank == 0 else 0, dtype=torch.uint8) for rank in range(3)]
        await asyncio.gather(*(ranks.broadcast(rank, buffer) for rank, buffer in enumerate(buffers)))
        assert all(bool((buffer == 7).all()) for buffer in buffers)


async def test_only_the_listening_sockets_of_the_group_are_shut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as other:
        assert refuse_strangers({ours.getsockname()}) == 1
        with socket.create_connection(other.getsockname()):
            pass
        assert is_refused(ours.getsockname())


async def test_the_end_of_a_peer_frees_a_thread_that_waits_for_it() -> None:
    async with formed(2) as ranks:
        waiting = ranks.broadcast(1, large(0))
        await ranks.members[0].close(LONG_S)
        with pytest.raises(WeightUpdateError, match="rank 1 of 2"):
            await waiting


async def test_a_broadcast_ends_at_its_deadline() -> None:
    async with formed(2) as ranks:
        with pytest.raises(DeadlineError, match=r"epoch 1 \(rank 1 of 2\).*deadline"):
            await ranks.broadcast(1, large(0), deadline_s=0.05)


async def test_joining_ends_at_the_deadline_and_names_who_is_missing() -> None:
    ranks = Ranks(2, deadline_s=0.05)
    with pytest.raises(DeadlineError, match="here/1"):
        await ranks.form(0)
    with pytest.raises(WeightUpdateError, match="was not formed"):
        await ranks.broadcast(0, large(0))
    for member in ranks.members:
        await member.close(LONG_S)


async def test_abort_frees_a_thread_that_joins() -> None:
    ranks = Ranks(2)
    joining = ranks.form(0)
    await asyncio.sleep(0)
    ranks.members[0].abort("never mind")
    with pytest.raises(WeightUpdateError, match="never mind"):
        await joining
    for member in ranks.members:
        await member.close(LONG_S)
        assert member.ended


@pytest.mark.slow
async def test_abort_at_any_moment_of_joining_leaves_nothing_behind() -> None:
    for num_turns in range(0, 40, 5):
        async with AsyncExitStack() as stack:
            ranks = Ranks(2)
            for member in ranks.members:
                stack.push_async_callback(member.close, 2 * CONNECT_LIMIT_S)
            joining = [ranks.form(rank) for rank in range(2)]
            for _ in range(num_turns):
                await asyncio.sleep(0)
            ranks.members[0].abort("never mind")
        outcomes = await asyncio.gather(*joining, return_exceptions=True)
        assert all(error is None or isinstance(error, WeightUpdateError) for error in outcomes)
    assert threads_left() == []


async def test_closing_says_which_thread_hangs() -> None:
    (member, _) = Ranks(2).members
    release = threading.Event()

    def hang() -> None:
        release.wait(LONG_S)

    hanging = outcome_of(lambda done: member.submit(hang, done))
    with pytest.raises(DeadlineError, match="rank 0 of 2"):
        await member.close(0.01)
    release.set()
    await hanging
    await member.close(LONG_S)
    assert member.ended


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this build has NCCL")
async def test_without_nccl_the_error_names_the_setting() -> None:
    loop = asyncio.get_running_loop()
    store = RelayStore(1, lambda _: None, loop, deadline_s=1.0)
    member = Collective(GroupSpec(1, 0, 2, "nccl", "127.0.0.1", 1.0), store, loop)
    with pytest.raises(ConfigError, match=r"weights\.backend is nccl"):
        await outcome_of(member.form)
    await member.close(LONG_S)


def test_addresses_are_found_in_opaque_values() -> None:
    ipv4 = struct.pack("=H", socket.AF_INET) + (4711).to_bytes(2, "big") + socket.inet_aton("10.1.2.3")
    ipv6 = struct.pack("=H", socket.AF_INET6) + (99).to_bytes(2, "big") + bytes(4) + socket.inet_pton(10, "fe80::1")
    found = addresses_in([b"\xff" * 7 + ipv4 + b"\xff" * 9, b"\xff" + ipv6])
    assert {("10.1.2.3", 4711), ("fe80::1", 99)} <= found
    assert addresses_in([b"", b"\xff" * 200]) == set()


def test_only_connections_of_the_named_listeners_are_cut() -> None:
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        cut, kept = (stack.enter_context(socket.create_connection(s.getsockname())) for s in (ours, theirs))
        _, still_open = (stack.enter_context(server.accept()[0]) for server in (ours, theirs))
        assert sever({ours.getsockname()}) == 2
        assert cut.recv(1) == b""
        kept.sendall(b"x")
        assert still_open.recv(1) == b"x"
