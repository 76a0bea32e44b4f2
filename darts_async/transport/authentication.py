"""Decides which peers may connect: the ZAP handler of a process (ZeroMQ RFC 27).

Every bound link is a separate domain with its own set of public keys. libzmq asks this handler during each CURVE
handshake. The answer names the owner of the key, and libzmq adds that name to every message of the connection. Unknown
keys are refused and logged, and so are connections that fail before (`Handshakes`).
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from darts_async.errors import TransportError

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
_FAILED = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
MAX_EVENTS_PER_WAKEUP = 64
"""A peer that connects again and again does not block the loop."""
LOG_INTERVAL_S = 1.0
"""At most one line of refusals per interval; the next line has the number of omitted ones."""

_log = structlog.get_logger()


class Refusals:
    """Counts refusals, and logs them as `event` with a rate limit, so that a broken peer cannot fill the log."""

    def __init__(self, event: str) -> None:
        self.total = 0
        self._event = event
        self._logged_total = 0
        self._logged_s = float("-inf")

    def add(self, now_s: float, **context: Any) -> None:
        """Count one refusal, and log it unless one was just logged."""
        self.total += 1
        if now_s - self._logged_s < LOG_INTERVAL_S:
            return
        _log.error(self._event, left_out=self.total - self._logged_total - 1, **context)
        self._logged_total = self.total
        self._logged_s = now_s


class Authenticator:
    """Answers for all bound links of one context. Must exist before the first link is bound."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", loop: asyncio.AbstractEventLoop) -> None:
        self._domains: dict[str, dict[str, str]] = {}
        self._refusals = Refusals("connection_refused")
        self._loop = loop
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ADDRESS)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._answer_all)

    def allow(self, domain: str, allowed: Mapping[str, str]) -> None:
        """Admit the owners of these public keys, `{name: key}`, to the link `domain`."""
        names = {key: name for name, key in allowed.items()}
        if len(names) != len(allowed):
            raise TransportError(f"two peers of link {domain!r} have the same key: {sorted(allowed)}")
        self._domains[domain] = names

    def close(self) -> None:
        """Stop answering."""
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def owner(self, request: Sequence[bytes]) -> str | None:
        """The owner of the key in a ZAP request, if it may connect."""
        if len(request) != 7 or request[0] != ZAP_VERSION or request[5] != b"CURVE" or len(request[6]) != 32:
            return None
        domain = self._domains.get(request[2].decode(errors="replace"), {})
        return domain.get(z85.encode(request[6]).decode())

    def _answer_all(self) -> None:
        while True:
            try:
                request = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._reply(request), zmq.NOBLOCK)

    def _reply(self, request: Sequence[bytes]) -> list[bytes]:
        request_id = request[1] if len(request) > 1 else b""
        name = self.owner(request)
        if name is not None:
            return [ZAP_VERSION, request_id, b"200", b"OK", name.encode(), b""]
        domain, address = (part.decode(errors="replace") for part in [*request, b"", b"", b"", b""][2:4])
        self._refusals.add(self._loop.time(), link=domain, peer=address, error="its key is not of this link")
        return [ZAP_VERSION, request_id, b"400", b"unknown key", b"", b""]


class Handshakes:
    """Counts and logs connections to a bound socket that fail before their key is known: without a key, with a key for
    another server, or without ZeroMQ. libzmq closes them by itself. Close this before the socket."""

    def __init__(self, socket: "zmq.Socket[bytes]", link: str, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = socket
        self._link = link
        self._loop = loop
        self._refusals = Refusals("handshake_failed")
        self._events = socket.get_monitor_socket(_FAILED)
        self._events.linger = 0
        self._fd = int(self._events.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._take)
        loop.call_soon(self._take_if_open)  # the descriptor signals changes, and the first may be over

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._fd)
        self._socket.disable_monitor()
        self._events.close()

    def _take(self) -> None:
        for _ in range(MAX_EVENTS_PER_WAKEUP):
            try:
                parts = self._events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(parts)
            error = f"{zmq.Event(event['event']).name}: {event['value']!r}"
            self._refusals.add(self._loop.time(), link=self._link, error=error)
        self._loop.call_soon(self._take_if_open)

    def _take_if_open(self) -> None:
        if not self._events.closed:
            self._take()
