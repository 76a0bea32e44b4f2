"""A link: one socket, one session per peer, one codec, on an asyncio loop.

The loop watches the socket's file descriptor, and each wake-up reads available frames, up to `MAX_FRAMES_PER_WAKEUP` so
that other work gets its turn. The descriptor is edge triggered, and any use of the socket may consume the edge, so the
socket is drained after every send.

No frame can harm more than its sender: frames that are malformed, of a wrong name or of an old incarnation are counted
in `refused`, logged and dropped. An unreadable message with a valid envelope counts as handled, because its sender
would otherwise repeat it forever. It is lost, and the process is told (`Unreadable`), so that it does not wait for it.

Closing: wait for acknowledgements until the deadline, say farewell, stop watching, close the socket (which sends its
last frames in the background, for a bounded time).
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import structlog

from darts_async.config import TransportConfig
from darts_async.errors import NonsenseError, ProtocolError, TransportError
from darts_async.protocol import Message
from darts_async.transport.authentication import Refusals
from darts_async.transport.codec import MessageCodec
from darts_async.transport.inbox import NO_INCARNATION
from darts_async.transport.mailbox import Mailbox, PeerDown, PeerUp, Received, Unreadable
from darts_async.transport.session import Delivered, Down, Envelope, Session, SessionEvent, Up
from darts_async.transport.zmq_socket import Arrival, Sent, Wire

MAX_FRAMES_PER_WAKEUP = 256
TICKS_PER_PERIOD = 4
"""How often timers are checked in the shortest period that they measure."""

_log = structlog.get_logger()
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
_encode_envelope = msgspec.msgpack.Encoder().encode


@dataclass
class _Peer:
    """A session and the connection that its frames take. Retired connections may still have frames queued; they must
    not take over again."""

    session: Session
    route: bytes | None
    retired: deque[bytes] = field(default_factory=lambda: deque(maxlen=8))
    unreadable_incarnation: int = NO_INCARNATION
    """The newest one that was announced as `Unreadable`."""

    def adopt(self, route: bytes, now_s: float) -> None:
        if route == self.route or route in self.retired:
            return
        self.retire()
        self.route = route
        self.session.reconnect(now_s)

    def retire(self) -> None:
        if self.route is not None:
            self.retired.append(self.route)
        self.route = None


class Link:
    """Made by `Endpoint.bind_link` and `Endpoint.connect_link`."""

    def __init__(
        self,
        name: str,
        wire: Wire,
        sessions: Iterable[Session],
        codec: MessageCodec,
        config: TransportConfig,
        mailbox: Mailbox,
    ) -> None:
        self.name = name
        self._wire = wire
        self._peers = {session.peer: _Peer(session, None if wire.routes else b"") for session in sessions}
        self._codec = codec
        self._config = config
        self._mailbox = mailbox
        self._refusals = Refusals("frame_refused")
        self._changed = asyncio.Event()
        self._is_closed = False
        self._is_shut = False
        self._is_drain_due = False
        self._blocked: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._tick_s = min(config.heartbeat_s, config.resend_after_s) / TICKS_PER_PERIOD
        self._loop.add_reader(wire.fd, self._drain)
        self._timer = self._loop.call_soon(self._tick)

    @property
    def address(self) -> str:
        """The address of the link, with its real port."""
        return self._wire.address

    @property
    def peers(self) -> dict[str, int]:
        """The peers that are up, with their incarnations."""
        return {name: peer.session.peer_incarnation for name, peer in self._peers.items() if peer.session.is_up}

    @property
    def refused(self) -> int:
        """Frames and messages refused so far."""
        return self._refusals.total

    def incarnation(self, peer: str) -> int:
        """The newest incarnation of `peer` that was heard, or `NO_INCARNATION`."""
        return self._find(peer).session.peer_incarnation

    def num_unacknowledged(self, peer: str) -> int:
        """Messages to `peer` that it has not handled yet, sent or not."""
        return len(self._find(peer).session.outbox)

    def send(self, peer: str, message: Message) -> None:
        """Queue a message and transmit as far as the peer's credit allows. A peer that is not up yet gets it later.
        Raises `TransportError`: unknown peer, full outbox, closed link; `ProtocolError`: not a message of this link, or
        too large."""
        target = self._find(peer)
        if self._is_closed:
            raise TransportError(f"link {self.name!r} is closed; cannot send {type(message).__name__} to {peer}")
        target.session.push(self._codec.encode(message))
        self._flush(target)
        self._drain_soon()

    def forget(self, peer: str) -> None:
        """Drop the unacknowledged messages to `peer`; those already under way may still arrive."""
        self._find(peer).session.forget()
        self._changed.set()

    def end(self, peer: str, incarnation: int, *, forget: bool) -> None:
        """This incarnation of `peer` has ended. `PeerDown` follows at once, unless that was known. Unacknowledged
        messages are dropped (`forget`), or kept for the next incarnation."""
        target = self._find(peer)
        for event in target.session.end(incarnation, forget=forget):
            self._publish(target.session, event, ())
        self._changed.set()

    async def close(self, linger_s: float | None = None) -> None:
        """Wait for acknowledgements of peers that are up, at most `linger_s` (default: transport.linger_s); then
        close."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(self._config.linger_s if linger_s is None else linger_s):
                while any(peer.session.is_worth_waiting_for for peer in self._peers.values()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            left = {name: len(peer.session.outbox) for name, peer in self._peers.items() if peer.session.outbox}
            _log.warning("link_closed_early", link=self.name, unacknowledged=left)
        finally:
            self._shut()

    def acknowledge(self, peer: str, incarnation: int, seq: int) -> None:
        """Messages of `peer` up to this one have been handled."""
        if self._is_shut:
            return
        target = self._peers[peer]
        target.session.acknowledge(incarnation, seq)
        if self._flush(target):
            self._drain_soon()

    def _drain(self) -> None:
        self._is_drain_due = False
        if self._is_shut:
            return
        now_s = self._loop.time()
        touched = set(self._blocked)
        for _ in range(MAX_FRAMES_PER_WAKEUP):
            arrival = self._wire.receive()
            if arrival is None:
                break
            touched |= self._accept(arrival, now_s)
        for name in touched:
            self._flush(self._peers[name])
        self._changed.set()
        if self._wire.has_input():
            self._drain_soon()

    def _tick(self) -> None:
        now_s = self._loop.time()
        for peer in self._peers.values():
            for event in peer.session.tick(now_s):
                self._publish(peer.session, event, ())
            self._flush(peer)
        self._changed.set()
        self._drain_soon()
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    def _accept(self, arrival: Arrival, now_s: float) -> set[str]:
        """Handle one arrival. Returns the peer that it concerned, unless it was refused."""
        try:
            envelope, peer = self._opened(arrival)
            events = self._heard(peer, envelope, len(arrival.frames) - 1, now_s)
        except ProtocolError as error:
            self._refusals.add(now_s, link=self.name, peer=arrival.user_id, error=str(error))
            return set()
        peer.adopt(arrival.route, now_s)
        for event in events:
            self._publish(peer.session, event, arrival.frames[1:])
        return {envelope.sender}

    def _opened(self, arrival: Arrival) -> tuple[Envelope, _Peer]:
        """The envelope of an arrival and its peer. If there is none, the owner of the key is at fault."""
        try:
            envelope = decode_envelope(arrival.frames[0])
            return envelope, self._claimed(envelope.sender, arrival.user_id)
        except ProtocolError as error:
            owner = self._peers.get(arrival.user_id or "") if self._wire.routes else next(iter(self._peers.values()))
            if owner is not None and owner.session.is_up:
                self._unreadable(owner, owner.session.peer_incarnation, str(error))
            raise

    def _heard(self, peer: _Peer, envelope: Envelope, num_more: int, now_s: float) -> list[SessionEvent]:
        """The events that follow from an envelope of this peer with `num_more` frames after it."""
        try:
            if envelope.seq is None and num_more and envelope.incarnation >= peer.session.peer_incarnation:
                raise NonsenseError(f"{num_more} frames after an envelope without a message")
            return peer.session.receive(envelope, now_s)
        except NonsenseError as error:
            self._unreadable(peer, envelope.incarnation, str(error))
            raise

    def _unreadable(self, peer: _Peer, incarnation: int, reason: str) -> None:
        if incarnation > peer.unreadable_incarnation:
            peer.unreadable_incarnation = incarnation
            self._mailbox.announce(Unreadable(self.name, peer.session.peer, incarnation, reason))

    def _claimed(self, name: str, user_id: str | None) -> _Peer:
        if self._wire.routes and user_id != name:
            raise ProtocolError(f"the key of {user_id} does not belong to {name[:80]!r}")
        peer = self._peers.get(name)
        if peer is None:
            raise ProtocolError(f"{name[:80]!r} is not a peer of this link")
        return peer

    def _publish(self, session: Session, event: SessionEvent, frames: Sequence[bytes]) -> None:
        match event:
            case Up(incarnation):
                self._mailbox.announce(PeerUp(self.name, session.peer, incarnation))
            case Down(incarnation, reason, is_gone):
                self._mailbox.announce(PeerDown(self.name, session.peer, incarnation, reason, is_gone))
            case Delivered():
                self._deliver(session, event, frames)

    def _deliver(self, session: Session, event: Delivered, frames: Sequence[bytes]) -> None:
        try:
            message = self._codec.decode(frames)
        except ProtocolError as error:
            session.refuse_last()
            self._refusals.add(self._loop.time(), link=self.name, peer=session.peer, error=str(error))
            self._unreadable(self._peers[session.peer], event.incarnation, str(error))
            return
        self._mailbox.deliver(Received(self.name, session.peer, event.incarnation, message, event.seq), self)

    def _flush(self, peer: _Peer) -> bool:
        """Transmit the frames of a session as far as the socket accepts them. Returns whether it was used."""
        session, is_used = peer.session, False
        self._blocked.discard(session.peer)
        now_s = self._loop.time()
        while peer.route is not None and (frame := session.next_frame()) is not None:
            envelope, payload = frame
            is_used = True
            match self._wire.send(peer.route, (_encode_envelope(envelope), *payload)):
                case Sent.TAKEN:
                    session.sent(envelope, now_s)
                case Sent.UNREACHABLE:
                    peer.retire()
                case Sent.FULL:
                    self._blocked.add(session.peer)
                    break
        return is_used

    def _drain_soon(self) -> None:
        """Check for input, because a use of the socket may have consumed the edge."""
        if not self._is_drain_due:
            self._is_drain_due = True
            self._loop.call_soon(self._drain)

    def _find(self, peer: str) -> _Peer:
        try:
            return self._peers[peer]
        except KeyError:
            raise TransportError(f"{peer!r} is not a peer of {self.name!r}; that has {sorted(self._peers)}") from None

    def _shut(self) -> None:
        for peer in self._peers.values():
            if peer.route is not None and peer.session.is_up:
                self._wire.send(peer.route, (_encode_envelope(peer.session.farewell()),))
        self._is_shut = True
        self._timer.cancel()
        self._loop.remove_reader(self._wire.fd)
        self._wire.close()


def decode_envelope(frame: bytes) -> Envelope:
    """The first frame of a transmission. Only raises `ProtocolError`, for any bytes."""
    try:
        return _envelope_decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed Envelope: {error}") from error
