"""Serves one page over HTTP at 127.0.0.1: the metrics for Prometheus.

It is in the launcher's loop, so no client may hold that up or take memory. A request has `REQUEST_WITHIN_S` in all,
for reading and for being answered, and `MAX_REQUEST_BYTES`. At most `MAX_CLIENTS` are served at a time, and others are
closed at once. Each connection takes one request. The page is made at most once in `FRESH_S`. A web page that a browser
of this machine shows cannot read it under another name, because the name in the request has to be that of this machine.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Final

HOST: Final = "127.0.0.1"
PATH: Final = "/metrics"
REQUEST_WITHIN_S: Final = 5.0
MAX_REQUEST_BYTES: Final = 8192
MAX_CLIENTS: Final = 8
FRESH_S: Final = 1.0
"""How long a page is served to those that ask again."""
_OWN_NAMES: Final = ("127.0.0.1", "localhost")
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
}


@contextlib.asynccontextmanager
async def serving_metrics(port: int, page: Callable[[], str], note: Callable[[str], None]) -> AsyncIterator[None]:
    """Serve inside the block; nothing with port 0. A port that cannot be bound is a note, and never ends the run."""
    if not port:
        yield
        return
    server = _Server(page)
    try:
        listener = await asyncio.start_server(server.serve, HOST, port, limit=MAX_REQUEST_BYTES)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        note(f"telemetry.prometheus_port: {port} cannot be bound ({reason}); no metrics are served there")
        yield
        return
    try:
        yield
    finally:
        listener.close()
        await server.close()


class _Server:
    def __init__(self, page: Callable[[], str]) -> None:
        self._page = page
        self._made = ""
        self._fresh_until_s = 0.0
        self._clients: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, in the task that asyncio has made for it."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= MAX_CLIENTS:
            writer.transport.abort()
            return
        self._clients.add(task)
        try:
            async with asyncio.timeout(REQUEST_WITHIN_S):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # too slow, or gone
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def close(self) -> None:
        """End those that are connected."""
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(431, "the request is too long\n")
        status = _status_of(head)
        return _response(
            status, self._newest() if status == 200 else f"{status} {_REASONS[status]}: GET {PATH}\n", head
        )

    def _newest(self) -> str:
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._fresh_until_s:
            self._made, self._fresh_until_s = self._page(), now_s + FRESH_S
        return self._made


def _status_of(head: bytes) -> int:
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return 400
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if fields.get("host", HOST).partition(":")[0] not in _OWN_NAMES:
        return 403
    if words[0] not in ("GET", "HEAD"):
        return 405
    return 200 if words[1].partition("?")[0] == PATH else 404


def _response(status: int, text: str, head: bytes = b"") -> bytes:
    body = text.encode()
    fields = (
        f"HTTP/1.1 {status} {_REASONS[status]}",
        "Content-Type: text/plain; version=0.0.4; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    )
    return "\r\n".join(fields).encode() + b"\r\n\r\n" + (b"" if head.startswith(b"HEAD ") else body)
