"""Collects what all links of one process receive.

`receive` returns the events that have arrived. They count as handled at the next call of `receive` (or `acknowledge`):
then their senders are told, at most a tick later (see `session`), and get new credit. If a process dies first, its next
incarnation receives the messages again. So make the results of all events durable before the next call.

A mailbox holds at most `window` messages per peer; senders without credit wait.
"""

import asyncio
import contextlib
from typing import Protocol

from msgspec import Struct

from darts_async.protocol import Message


class _LinkEvent(Struct, frozen=True):
    link: str  # the name given to `bind_link` or `connect_link`
    peer: str
    incarnation: int


class PeerUp(_LinkEvent, frozen=True):
    """The peer answers. A new incarnation has no memory of what the previous one received."""


class PeerDown(_LinkEvent, frozen=True):
    """The peer is silent, has closed its link, or was replaced by a newer incarnation. It may return, even as the same
    incarnation unless it `is_gone`."""

    reason: str
    is_gone: bool = True


class Received(_LinkEvent, frozen=True):
    """A message, in order and once for each pair of incarnations."""

    message: Message
    seq: int = 0  # of the messages of that incarnation of the peer


class Unreadable(_LinkEvent, frozen=True):
    """The peer has sent a frame that is not a message of the link. The frame is lost, so later messages are unreliable.
    Announced once for each incarnation."""

    reason: str


Event = PeerUp | PeerDown | Received | Unreadable


class Acknowledger(Protocol):
    """The part of a link that a mailbox needs."""

    def acknowledge(self, peer: str, incarnation: int, seq: int) -> None:
        """Messages of `peer` up to this one have been handled."""


class Mailbox:
    """Merges the links of one process, in order of arrival. One consumer."""

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self._events: list[Event] = []
        self._receipts: dict[tuple[Acknowledger, str], tuple[int, int]] = {}
        self._unacknowledged: dict[tuple[Acknowledger, str], tuple[int, int]] = {}

    async def receive(self, timeout_s: float) -> list[Event]:
        """Acknowledge the events of the last call, then return all that have arrived since, waiting up to `timeout_s`
        for the first one. Empty if there was none."""
        self.acknowledge()
        if not self._events:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
        events, self._events = self._events, []
        self._unacknowledged, self._receipts = self._receipts, {}
        return events

    def acknowledge(self) -> None:
        """Acknowledge what the last `receive` returned. Needed only by a process that will not call it again."""
        receipts, self._unacknowledged = self._unacknowledged, {}
        for (link, peer), (incarnation, seq) in receipts.items():
            link.acknowledge(peer, incarnation, seq)

    def announce(self, event: PeerUp | PeerDown | Unreadable) -> None:
        """Add an event that is not a message. Called by links."""
        self._events.append(event)
        self._arrived.set()

    def deliver(self, event: Received, link: Acknowledger) -> None:
        """Add a message, to be acknowledged to `link`. Called by links."""
        self._receipts[link, event.peer] = (event.incarnation, event.seq)
        self._events.append(event)
        self._arrived.set()
