"""Decides which peers may connect: the ZAP handler of a process (ZeroMQ RFC 27).

Every bound link is a separate domain with its own set of public keys. libzmq asks this handler during each CURVE
handshake. The answer names the owner of the key, and libzmq adds that name to every message of the connection. Unknown
keys are refused and logged.
"""

import asyncio
from collections.abc import Mapping, Sequence

import zmq
from zmq.utils import z85

from darts_async.errors import TransportError
from darts_async.transport.refusals import Refusals

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"


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
