"""The network identity of a process: its name and incarnation, its keys, its ZeroMQ context and all its links."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import structlog
import zmq

from darts_async.config import TransportConfig
from darts_async.errors import TransportError
from darts_async.faults import present
from darts_async.transport.authentication import Authenticator
from darts_async.transport.codec import MessageCodec
from darts_async.transport.inbox import NOTHING_HEARD, Heard
from darts_async.transport.keys import RunKeys
from darts_async.transport.link import Link
from darts_async.transport.mailbox import Mailbox
from darts_async.transport.session import Session
from darts_async.transport.unreliable import UnreliableWire
from darts_async.transport.zmq_socket import Wire, open_dealer, open_router

log = structlog.get_logger()


class Endpoint:
    """Creates links that deliver into one mailbox. Create and close it inside a running event loop. The incarnation
    grows at each restart of the process. Peers then send again what was not acknowledged."""

    def __init__(self, name: str, incarnation: int, keys: RunKeys, config: TransportConfig, mailbox: Mailbox) -> None:
        if keys.name != name:
            raise TransportError(f"endpoint {name!r} was given the keys of {keys.name!r}")
        if incarnation < 0:
            raise TransportError(f"incarnation {incarnation} of {name!r} is negative")
        self.name = name
        self.incarnation = incarnation
        self._keys = keys
        self._config = config
        self._mailbox = mailbox
        self._links: list[Link] = []
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = Authenticator(self._context, self._loop)

    def bind_link(
        self,
        *,
        name: str,
        address: str,
        receives: Any,
        sends: Any,
        allowed: Mapping[str, str],
        heard: Mapping[str, Heard] | None = None,
    ) -> Link:
        """Wait at `address` for the peers in `allowed`, `{peer name: public key}`. `receives` and `sends` are classes
        or unions. `heard`, {peer: `Heard`}, is what an earlier incarnation of this process has stored. Raises
        `TransportError` if the address is taken."""
        self._authenticator.allow(name, allowed)
        wire = open_router(self._context, address, self._keys, name, self._config)
        wire.watch_handshakes(name, self._loop)
        return self._open(name, wire, allowed, receives, sends, heard or {})

    def connect_link(self, *, name: str, address: str, peer: str, peer_key: str, receives: Any, sends: Any) -> Link:
        """Connect to `peer`, which listens at `address` and has the secret of `peer_key`, again and again."""
        wire = open_dealer(self._context, address, self._keys, peer_key, self._config)
        return self._open(name, wire, [peer], receives, sends, {})

    async def close(self) -> None:
        """Close all links (see `Link.close`) and free the context, within `2 * linger_s`. Events that the mailbox has
        returned are not acknowledged: a process may end because it could not handle them. For a clean end call
        `Mailbox.acknowledge` first."""
        async with asyncio.TaskGroup() as group:
            for link in self._links:
                group.create_task(link.close(), name=f"close {self.name} {link.name}")
        self._authenticator.close()
        await asyncio.to_thread(self._context.term)

    def _open(
        self, name: str, wire: Wire, peers: Iterable[str], receives: Any, sends: Any, heard: Mapping[str, Heard]
    ) -> Link:
        me, now_s = (self.name, self.incarnation), self._loop.time()
        sessions = [Session(*me, peer, self._config, now_s, heard.get(peer, NOTHING_HEARD)) for peer in peers]
        if faults := tuple(fault for fault in present().links if fault.concerns(name)):
            log.warning("link_faults", link=name, faults=[str(fault) for fault in faults])
            wire = UnreliableWire(wire, faults, f"{self.name} {name}")
        codec = MessageCodec(receives=receives, sends=sends, max_message_bytes=self._config.max_message_bytes)
        link = Link(name, wire, sessions, codec, self._config, self._mailbox)
        self._links.append(link)
        return link
