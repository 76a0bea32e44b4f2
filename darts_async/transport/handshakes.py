"""Counts and logs connections that fail before their key is known: without a key, with a key for another server, or
without ZeroMQ. libzmq closes them by itself."""

import asyncio

import zmq
from zmq.utils.monitor import parse_monitor_message

from darts_async.transport.refusals import Refusals

_EVENTS = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
MAX_EVENTS_PER_WAKEUP = 64
"""Bound per wake-up, so that a peer that connects again and again does not block the loop."""


class Handshakes:
    """Watches a bound socket. Close it before the socket."""

    def __init__(self, socket: "zmq.Socket[bytes]", link: str, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = socket
        self._link = link
        self._loop = loop
        self._refusals = Refusals("handshake_failed")
        self._events = socket.get_monitor_socket(_EVENTS)
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
