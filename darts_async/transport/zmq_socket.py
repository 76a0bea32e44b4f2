"""One ZeroMQ socket that never blocks, with every unsafe default replaced.

The binding side is a ROUTER, the connecting side a DEALER. The ROUTER chooses a new routing id for each connection. So
a restarted or reconnected peer is never refused as a duplicate, no peer can take over the connection of another by
claiming its routing id, and a new id shows that a connection was lost.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from urllib.parse import urlsplit

import zmq

from darts_async.config import TransportConfig
from darts_async.errors import TransportError
from darts_async.transport.authentication import Handshakes
from darts_async.transport.keys import RunKeys

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

# Operations on enums are slow, and these are on the hot path.
NOBLOCK, POLLIN, MORE = int(zmq.NOBLOCK), int(zmq.POLLIN), int(zmq.NOBLOCK) | int(zmq.SNDMORE)

WILDCARD_HOSTS = ("", "*", "0.0.0.0", "::")

FRAME_SLACK_BYTES = 1 << 16
"""libzmq drops the connection over a frame that is larger than the largest message by this much."""

QUEUE_SLACK = 64
"""Space in the socket's queues for envelopes without a message, in addition to a full window."""

RECONNECT_S = 0.1
"""First wait before connecting again; doubles up to one heartbeat."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A received message: the connection (empty on the connecting side), the owner of its key, the frames."""

    route: bytes
    user_id: str | None
    frames: list[bytes]


class Sent(Enum):
    """The result of sending a frame."""

    TAKEN = auto()
    FULL = auto()
    UNREACHABLE = auto()


class Wire:
    """A socket of a link. `routes`: its frames are addressed to connections (ROUTER), and its arrivals come with the
    name that the authenticator gave to the key of the connection."""

    def __init__(self, socket: Socket, *, routes: bool) -> None:
        self._socket = socket
        self.routes = routes
        self.fd = int(socket.getsockopt(zmq.FD))
        self._handshakes: Handshakes | None = None

    def watch_handshakes(self, link: str, loop: asyncio.AbstractEventLoop) -> None:
        """Log the connections that fail before they are authenticated."""
        self._handshakes = Handshakes(self._socket, link, loop)

    @property
    def address(self) -> str:
        """The address of the socket, with its real port."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def has_input(self) -> bool:
        """Whether there is input. Check this also after sending: the file descriptor signals changes, and a send may
        consume the signal of input."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & POLLIN)

    def receive(self) -> Arrival | None:
        """The next received message, if any."""
        try:
            parts = [self._socket.recv(NOBLOCK, copy=False)]
        except zmq.Again:
            return None
        while parts[-1].more:  # the parts of a message arrive together
            parts.append(self._socket.recv(NOBLOCK, copy=False))
        frames = [part.bytes for part in parts]
        if self.routes:
            return Arrival(frames[0], str(parts[-1].get("User-Id")), frames[1:])
        return Arrival(b"", None, frames)

    def send(self, route: bytes, frames: tuple[bytes, ...]) -> Sent:
        """Hand frames to the socket, all or none."""
        *before, last = (route, *frames) if self.routes else frames
        try:
            for part in before:  # the first part fails if there is no space for the message
                self._socket.send(part, MORE)
            self._socket.send(last, NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.UNREACHABLE
        return Sent.TAKEN

    def close(self) -> None:
        """Close the socket. Queued messages are sent in the background for up to `linger_s`."""
        if self._handshakes is not None:
            self._handshakes.close()
        self._socket.close()


def open_router(context: Context, address: str, keys: RunKeys, domain: str, config: TransportConfig) -> Wire:
    """Bind `address` as the CURVE server of `domain`. Raises `TransportError` if that fails."""
    socket = _new_socket(context, zmq.ROUTER, keys, config)
    socket.router_mandatory = 1
    socket.curve_server = 1
    socket.zap_domain = domain.encode()
    _attach(socket, socket.bind, address)
    return Wire(socket, routes=True)


def open_dealer(context: Context, address: str, keys: RunKeys, server_key: str, config: TransportConfig) -> Wire:
    """Connect to `address`, whose owner must hold the secret of `server_key`."""
    socket = _new_socket(context, zmq.DEALER, keys, config)
    socket.immediate = 1
    socket.curve_serverkey = server_key.encode()
    _attach(socket, socket.connect, address)
    return Wire(socket, routes=False)


def _new_socket(context: Context, kind: int, keys: RunKeys, config: TransportConfig) -> Socket:
    heartbeat_ms, dead_after_ms = int(config.heartbeat_s * 1000), int(config.dead_after_s * 1000)
    socket = context.socket(kind)
    socket.curve_publickey, socket.curve_secretkey = keys.public_key.encode(), keys.secret_key.encode()
    socket.heartbeat_ivl = heartbeat_ms
    socket.heartbeat_timeout = dead_after_ms
    socket.heartbeat_ttl = dead_after_ms
    socket.handshake_ivl = dead_after_ms
    socket.reconnect_ivl = int(RECONNECT_S * 1000)
    socket.reconnect_ivl_max = max(heartbeat_ms, int(RECONNECT_S * 1000))
    socket.maxmsgsize = config.max_message_bytes + FRAME_SLACK_BYTES
    socket.sndhwm = socket.rcvhwm = config.window + QUEUE_SLACK
    socket.linger = int(config.linger_s * 1000)
    return socket


def _attach(socket: Socket, attach: Callable[[str], object], address: str) -> None:
    """Refuses addresses that listen on every interface."""
    url, reason = urlsplit(address), "it is not a tcp://HOST:PORT of one interface (network.host)"
    try:
        if url.scheme == "tcp" and (url.hostname or "") not in WILDCARD_HOSTS:
            attach(address)
            return
    except zmq.ZMQError as error:
        reason = zmq.strerror(error.errno or 0)
    socket.close()
    raise TransportError(f"cannot use {address}: {reason}")
