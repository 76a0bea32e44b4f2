"""Endpoints over loopback TCP with CURVE: delivery, restarts, authentication, hostile peers, credit."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop
import zmq
from structlog.testing import capture_logs

from darts_async import protocol as p
from darts_async.config import TransportConfig
from darts_async.errors import ProtocolError, TransportError
from darts_async.transport import (
    Endpoint,
    Event,
    Link,
    Mailbox,
    PeerDown,
    PeerUp,
    Received,
    RunKeys,
    Unreadable,
    create_run_keys,
    load_keys,
)
from darts_async.transport.codec import MessageCodec
from darts_async.transport.session import Envelope
from tests import ROOT

HUB, SPOKE, ROGUE = "shaper", "generator/0", "generator/1"
DEADLINE_S = 20.0
CONFIG = TransportConfig(
    window=8, heartbeat_s=0.1, dead_after_s=2.0, resend_after_s=0.2, linger_s=0.2, max_message_bytes=100_000
)

Keys = dict[str, RunKeys]

UNSAFE = re.compile(r"\b(import|from) (\w*pickle|dill)\b|\bpickle\.\w|send_pyobj|recv_pyobj")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    directory = tmp_path_factory.mktemp("run") / "keys"
    names = [HUB, SPOKE, ROGUE]
    create_run_keys(directory, names)
    return {name: load_keys(directory, name) for name in names}


class Node:
    """One process of the test: an endpoint, its link, its mailbox and everything it has received."""

    def __init__(self, endpoint: Endpoint, link: Link, mailbox: Mailbox) -> None:
        self.endpoint = endpoint
        self.link = link
        self.mailbox = mailbox
        self.events: list[Event] = []

    @property
    def messages(self) -> list[p.Message]:
        return [event.message for event in self.events if isinstance(event, Received)]

    async def until(self, is_done: Callable[["Node"], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_done(self):
                self.events += await self.mailbox.receive(0.05)

    async def until_received(self, num_messages: int) -> list[p.Message]:
        await self.until(lambda node: len(node.messages) >= num_messages)
        return self.messages

    async def until_event(self, kind: type[PeerUp] | type[PeerDown]) -> None:
        await self.until(lambda node: any(isinstance(event, kind) for event in node.events))

    def die(self) -> None:
        """As a killed process: nothing is acknowledged, nothing said."""
        self.link._is_closed = self.link._is_shut = True
        self.link._timer.cancel()
        self.link._loop.remove_reader(self.link._wire.fd)
        if self.link._wire._handshakes is not None:
            self.link._wire._handshakes.close()
        self.link._wire._socket.close(0)
        self.endpoint._authenticator.close()
        self.endpoint._context.term()


@asynccontextmanager
async def hub(
    keys: Keys,
    incarnation: int = 1,
    address: str = "tcp://127.0.0.1:0",
    heard: dict[str, tuple[int, int]] | None = None,
) -> AsyncIterator[Node]:
    mailbox = Mailbox()
    endpoint = Endpoint(HUB, incarnation, keys[HUB], CONFIG, mailbox)
    link = endpoint.bind_link(
        name="generators",
        address=address,
        receives=p.GeneratorToShaper,
        sends=p.ShaperToGenerator,
        allowed={SPOKE: keys[HUB].public_of(SPOKE)},
        heard=heard,
    )
    yield Node(endpoint, link, mailbox)
    await endpoint.close()


@asynccontextmanager
async def spoke(keys: Keys, address: str, incarnation: int = 1, name: str = SPOKE) -> AsyncIterator[Node]:
    mailbox = Mailbox()
    endpoint = Endpoint(name, incarnation, keys[name], CONFIG, mailbox)
    link = endpoint.connect_link(
        name="shaper",
        address=address,
        peer=HUB,
        peer_key=keys[name].public_of(HUB),
        receives=p.ShaperToGenerator,
        sends=p.GeneratorToShaper,
    )
    yield Node(endpoint, link, mailbox)
    await endpoint.close()


@asynccontextmanager
async def pair(keys: Keys) -> AsyncIterator[tuple[Node, Node]]:
    async with hub(keys) as a, spoke(keys, a.link.address) as b:
        await a.until_event(PeerUp)
        await b.until_event(PeerUp)
        yield a, b


def generate(sample_id: int) -> p.Generate:
    empty = np.array([], np.int32)
    return p.Generate(sample_id, np.arange(5, dtype=np.int32), empty, 1, p.SamplingParams(1.0, 1.0, 0, 8))


def ids(messages: list[p.Message]) -> list[int]:
    return [message.sample_id for message in messages if isinstance(message, p.Generate | p.Cancel | p.SampleFinished)]


async def round_trip(keys: Keys) -> None:
    async with pair(keys) as (a, b):
        a.link.send(SPOKE, generate(7))
        (command,) = await b.until_received(1)
        assert isinstance(command, p.Generate)
        assert command.prompt_tokens.tolist() == [0, 1, 2, 3, 4]
        b.link.send(HUB, p.SampleFinished(7, "stop", 3))
        assert await a.until_received(1) == [p.SampleFinished(7, "stop", 3)]
        a.mailbox.acknowledge()
        assert (a.link.peers, b.link.peers) == ({SPOKE: 1}, {HUB: 1})


async def test_array_messages_round_trip(keys: Keys) -> None:
    await round_trip(keys)


def test_round_trip_under_uvloop(keys: Keys) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(round_trip(keys))


async def test_messages_sent_before_the_peer_exists_reach_it_in_order(keys: Keys) -> None:
    async with hub(keys) as a:
        for sample_id in range(30):
            a.link.send(SPOKE, p.Cancel(sample_id))
        async with spoke(keys, a.link.address) as b:
            assert ids(await b.until_received(30)) == list(range(30))


async def test_receive_returns_nothing_after_its_timeout() -> None:
    assert await Mailbox().receive(0.0) == []


# --- restarts -------------------------------------------------------------------------------------------------


async def test_restarted_peer_gets_what_was_not_acknowledged(keys: Keys) -> None:
    async with hub(keys) as a:
        async with spoke(keys, a.link.address) as b:
            for sample_id in range(20):
                a.link.send(SPOKE, p.Cancel(sample_id))
            await b.until_received(1)
            num_handled = len(b.messages)
            b.mailbox.acknowledge()
            await a.until(lambda node: node.link.num_unacknowledged(SPOKE) <= 20 - num_handled)
            b.die()
        async with spoke(keys, a.link.address, incarnation=2) as again:
            assert ids(await again.until_received(20 - num_handled)) == list(range(num_handled, 20))
            await a.until(lambda node: len(node.events) >= 3)
            assert a.link.peers == {SPOKE: 2}
    ups_and_downs = [event for event in a.events if not isinstance(event, Received)]
    assert [type(event) for event in ups_and_downs] == [PeerUp, PeerDown, PeerUp]
    assert [event.incarnation for event in ups_and_downs] == [1, 1, 2]


async def test_forgotten_peer_starts_empty(keys: Keys) -> None:
    async with hub(keys) as a:
        a.link.send(SPOKE, p.Cancel(1))
        a.link.forget(SPOKE)
        a.link.send(SPOKE, p.Cancel(2))
        async with spoke(keys, a.link.address) as b:
            assert ids(await b.until_received(1)) == [2]


@pytest.mark.slow
async def test_restarted_hub_gets_what_was_not_acknowledged(keys: Keys) -> None:
    async with hub(keys) as a:
        address = a.link.address
        async with spoke(keys, address) as b:
            await b.until_event(PeerUp)
            for sample_id in range(5):
                b.link.send(HUB, p.SampleFinished(sample_id, "stop", 1))
            await a.until_received(1)
            a.die()
            async with hub(keys, incarnation=2, address=address) as again:
                assert ids(await again.until_received(5))[-1] == 4
                again.link.send(SPOKE, p.Cancel(9))
                assert ids(await b.until_received(1)) == [9]


@pytest.mark.slow
async def test_restarted_hub_does_not_get_again_what_it_has_kept(keys: Keys) -> None:
    async with hub(keys) as a:
        address = a.link.address
        async with spoke(keys, address) as b:
            await b.until_event(PeerUp)
            for sample_id in range(3):
                b.link.send(HUB, p.SampleFinished(sample_id, "stop", 1))
            await a.until_received(3)  # and the last of them are not acknowledged
            assert [event.seq for event in a.events if isinstance(event, Received)] == [0, 1, 2]
            for sample_id in range(3, 5):
                b.link.send(HUB, p.SampleFinished(sample_id, "stop", 1))
            a.die()
            async with hub(keys, incarnation=2, address=address, heard={SPOKE: (1, 3)}) as again:
                assert ids(await again.until_received(2)) == [3, 4]


@pytest.mark.slow
async def test_lost_connection_loses_and_repeats_nothing(keys: Keys) -> None:
    async with hub(keys) as a, spoke(keys, a.link.address) as b:
        for sample_id in range(100):
            b.link.send(HUB, p.SampleFinished(sample_id, "stop", 1))
            if sample_id % 30 == 10:
                await a.until_received(sample_id - 9)
                b.link._wire._socket.disconnect(a.link.address)
                b.link._wire._socket.connect(a.link.address)
        assert ids(await a.until_received(100)) == list(range(100))


@pytest.mark.slow
async def test_silent_peer_goes_down(keys: Keys) -> None:
    async with pair(keys) as (a, b):
        b.die()
        await a.until_event(PeerDown)
        assert a.link.peers == {}


async def test_closing_peer_goes_down_at_once_and_delays_no_one(keys: Keys) -> None:
    async with pair(keys) as (a, b):
        a.link.send(SPOKE, p.Cancel(1))
        await b.until_received(1)
        await b.endpoint.close()
        await a.until_event(PeerDown)
        (down,) = [event for event in a.events if isinstance(event, PeerDown)]
        assert down.reason == "it closed the link"


async def test_close_waits_for_acknowledgements(keys: Keys) -> None:
    async with pair(keys) as (a, b):
        for sample_id in range(30):
            a.link.send(SPOKE, p.Cancel(sample_id))
        async with asyncio.TaskGroup() as group:
            group.create_task(a.link.close(DEADLINE_S))
            group.create_task(b.until(lambda node: any(isinstance(event, PeerDown) for event in node.events)))
        assert ids(b.messages) == list(range(30))


async def test_close_gives_up_at_its_deadline_and_says_what_is_left(keys: Keys) -> None:
    async with hub(keys) as a:
        a.link.send(SPOKE, p.Cancel(1))
        with capture_logs() as logs:
            await a.link.close(0.01)
        (line,) = logs
        assert line["event"] == "link_closed_early"
        assert line["unacknowledged"] == {SPOKE: 1}
        with pytest.raises(TransportError, match="closed"):
            a.link.send(SPOKE, p.Cancel(1))


# --- credit ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_slow_consumer_stops_a_fast_sender(keys: Keys) -> None:
    async with pair(keys) as (a, b):
        for sample_id in range(50):
            a.link.send(SPOKE, p.Cancel(sample_id))
        outbox = a.link._peers[SPOKE].session.outbox
        async with asyncio.timeout(DEADLINE_S):
            while outbox.cursor < CONFIG.window:
                a.link._changed.clear()
                await a.link._changed.wait()
        assert outbox.end - outbox.cursor == 50 - CONFIG.window
        await b.until_received(50)
        assert ids(b.messages) == list(range(50))


async def test_mistakes_of_the_owner_are_named(keys: Keys) -> None:
    async with pair(keys) as (a, _):
        with pytest.raises(TransportError, match=r"'nobody' is not a peer of 'generators'"):
            a.link.send("nobody", p.Cancel(1))
        with pytest.raises(ProtocolError, match="SampleFinished is not a message that this link sends"):
            a.link.send(SPOKE, p.SampleFinished(1, "stop", 1))
        with pytest.raises(TransportError, match="Address already in use"):
            a.endpoint.bind_link(name="other", address=a.link.address, receives=p.Cancel, sends=p.Cancel, allowed={})
        with pytest.raises(TransportError, match="one interface"):
            a.endpoint.bind_link(name="other", address="tcp://*:0", receives=p.Cancel, sends=p.Cancel, allowed={})
        with pytest.raises(TransportError, match="keys of 'shaper'"):
            Endpoint("learner", 1, keys[HUB], CONFIG, Mailbox())


# --- hostile and broken peers ---------------------------------------------------------------------------------


class RawPeer:
    """A socket with keys of the run and no manners."""

    def __init__(self, address: str, own: RunKeys) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.curve_serverkey = own.public_of(HUB).encode()
        self.socket.curve_publickey = own.public_key.encode()
        self.socket.curve_secretkey = own.secret_key.encode()
        self.socket.connect(address)

    def send(self, envelope: Envelope | bytes, *frames: bytes) -> None:
        head = envelope if isinstance(envelope, bytes) else msgspec.msgpack.encode(envelope)
        self.socket.send_multipart([head, *frames])

    def close(self) -> None:
        self.context.destroy(linger=0)


def envelope(seq: int | None, sender: str = SPOKE, incarnation: int = 1) -> Envelope:
    return Envelope(sender, incarnation, 1, 0, 0, 100, 0, seq=seq)


def encoded(message: p.Message) -> tuple[bytes, ...]:
    return MessageCodec(receives=p.Cancel, sends=p.Message, max_message_bytes=1 << 20).encode(message)


async def test_malformed_frames_of_an_authenticated_peer_harm_nothing(keys: Keys) -> None:
    async with hub(keys) as a:
        raw = RawPeer(a.link.address, keys[SPOKE])
        with capture_logs() as logs:
            raw.send(b"")
            raw.send(b"\xff\x00garbage", b"more")
            raw.send(envelope(None, sender=ROGUE))
            raw.send(envelope(None), b"surplus")
            raw.send(envelope(0), b"\xc1not a message")
            raw.send(envelope(1), *encoded(p.Cancel(3)))
            raw.send(envelope(2), bytes(60_000), bytes(60_000))
            raw.send(envelope(3), *encoded(p.SampleFinished(3, "stop", 1)))
            assert ids(await a.until_received(1)) == [3]
        await a.mailbox.receive(0.0)
        assert a.link._peers[SPOKE].session.inbox.handled == 4, "refused messages are acknowledged too"
        assert a.link.refused == 7
        assert {line["event"] for line in logs} == {"frame_refused"}
        raw.close()


@pytest.mark.parametrize(
    ("nonsense", "words"),
    [
        ([(0, b"\xc1not a message")], "malformed message"),
        ([(0, *encoded(p.SampleFinished(3, "stop", 1)), b"surplus")], "1 array frames, of which the header uses 0"),
        ([(0, b"\x82")], "malformed message"),
        ([(None, b"surplus")], "1 frames after an envelope without a message"),
        ([(0, bytes(60_000), bytes(60_000))], "transport.max_message_bytes"),
        ([(0, b"\xc1"), (1, b"\xc1"), (2, b"\xc1")], "malformed message"),
    ],
)
async def test_what_cannot_be_read_is_announced_once_and_of_the_next_incarnation_again(
    keys: Keys, nonsense: list[tuple[Any, ...]], words: str
) -> None:
    """What the lost message said is not waited for."""
    async with hub(keys) as a:
        raw = RawPeer(a.link.address, keys[SPOKE])
        for incarnation in (1, 2):
            raw.send(envelope(None, incarnation=incarnation))
            for seq, *frames in nonsense:
                raw.send(envelope(seq, incarnation=incarnation), *frames)
            raw.send(envelope(len(nonsense), incarnation=incarnation), *encoded(p.SampleFinished(9, "stop", 1)))
            raw.send(envelope(0, incarnation=incarnation), *encoded(p.SampleFinished(9, "stop", 1)))
            await a.until_received(incarnation)
        told = [event for event in a.events if isinstance(event, Unreadable)]
        assert [(event.peer, event.incarnation) for event in told] == [(SPOKE, 1), (SPOKE, 2)]
        assert all(words in event.reason for event in told), told
        raw.close()


@pytest.mark.parametrize(
    "lie",
    [
        Envelope(SPOKE, 1, 1, 7, 7, 100, 0),
        Envelope(SPOKE, 1, 1, 0, 3, 100, 0),
        Envelope(SPOKE, 1, 1, 0, 0, 100, 5, seq=4),
        Envelope(ROGUE, 1, 1, 0, 0, 100, 0),
        b"\xc1no envelope",
    ],
)
async def test_an_envelope_that_cannot_be_true_is_laid_to_whose_key_it_came_with(
    keys: Keys, lie: Envelope | bytes
) -> None:
    async with hub(keys) as a:
        raw = RawPeer(a.link.address, keys[SPOKE])
        raw.send(envelope(None))
        await a.until_event(PeerUp)
        raw.send(lie)
        await a.until(lambda node: any(isinstance(event, Unreadable) for event in node.events))
        (told,) = [event for event in a.events if isinstance(event, Unreadable)]
        assert (told.peer, told.incarnation) == (SPOKE, 1)
        raw.close()


async def test_frames_of_an_incarnation_before_are_late_and_no_fault(keys: Keys) -> None:
    async with hub(keys) as a:
        raw = RawPeer(a.link.address, keys[SPOKE])
        raw.send(envelope(None, incarnation=2))
        raw.send(Envelope(SPOKE, 1, 1, 7, 7, 100, 0))
        raw.send(envelope(None, incarnation=1), b"surplus")
        raw.send(envelope(0, incarnation=2), *encoded(p.SampleFinished(9, "stop", 1)))
        await a.until_received(1)
        assert a.link.refused == 2
        assert not any(isinstance(event, Unreadable) for event in a.events)
        raw.close()


@pytest.mark.slow
async def test_broken_peer_does_not_disturb_the_others(keys: Keys) -> None:
    mailbox = Mailbox()
    endpoint = Endpoint(HUB, 1, keys[HUB], CONFIG, mailbox)
    link = endpoint.bind_link(
        name="generators",
        address="tcp://127.0.0.1:0",
        receives=p.GeneratorToShaper,
        sends=p.ShaperToGenerator,
        allowed={name: keys[HUB].public_of(name) for name in (SPOKE, ROGUE)},
    )
    a = Node(endpoint, link, mailbox)
    raw = RawPeer(link.address, keys[ROGUE])
    async with spoke(keys, link.address) as b:
        for sample_id in range(20):
            raw.send(envelope(None, sender=SPOKE, incarnation=99))
            raw.send(bytes(CONFIG.max_message_bytes + (1 << 18)))
            b.link.send(HUB, p.SampleFinished(sample_id, "stop", 1))
        assert ids(await a.until_received(20)) == list(range(20))
        assert link.peers == {SPOKE: 1}
        await a.until(lambda node: node.link.refused >= 1)
    raw.close()
    await endpoint.close()


async def test_repeated_messages_are_dropped(keys: Keys) -> None:
    async with hub(keys) as a:
        raw = RawPeer(a.link.address, keys[SPOKE])
        for seq in (0, 0, 1, 0, 1, 2):
            raw.send(envelope(seq), *encoded(p.SampleFinished(seq, "stop", 1)))
        assert ids(await a.until_received(3)) == [0, 1, 2]
        assert a.link.refused == 0
        raw.close()


async def test_unknown_key_is_refused_and_logged(keys: Keys) -> None:
    async with hub(keys) as a:
        with capture_logs() as logs:
            async with spoke(keys, a.link.address, name=ROGUE) as rogue:
                rogue.link.send(HUB, p.SampleFinished(1, "stop", 1))
                await a.until(lambda _: any(line["event"] == "connection_refused" for line in logs))
                assert rogue.link.peers == {}
                await rogue.link.close(0.0)
        (line,) = [line for line in logs if line["event"] == "connection_refused"][:1]
        assert line["link"] == "generators"
        assert line["log_level"] == "error"
        assert a.messages == []


def test_no_source_file_unpickles_what_comes_from_a_socket() -> None:
    root = ROOT
    sources = [path for part in ("darts_async", "launcher") for path in (root / part).rglob("*.py")]
    assert len(sources) > 10
    for path in sources:
        found = UNSAFE.search(path.read_text())
        assert found is None, f"{path} has {found}"
