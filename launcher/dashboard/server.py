"""The HTTP server of the dashboard: threads of the standard library, on the loopback interface.

A connection carries one request. Everything that a client may do wrong harms only itself:

    it sends nothing, or byte by byte     it is cut `HEAD_TIMEOUT_S` after it has connected
    its request is too long               it is cut at `MAX_HEAD_BYTES`
    it does not read what it asked for    it is cut when a write has taken `WRITE_TIMEOUT_S`
    it opens many connections             those beyond `MAX_CONNECTIONS` are refused with status 503

Which requests are answered is decided in `access`. The page may load nothing but its own files
(Content-Security-Policy), may not be shown inside another page, and no cache keeps it.
"""

import contextlib
import io
import secrets
import socket
import socketserver
import sys
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from darts_async.errors import ConfigError
from launcher.dashboard.access import RefusedError, read_request
from launcher.dashboard.answers import Answer, Answers, Stream
from launcher.dashboard.runs import ShownRuns
from launcher.terminal import show_traceback

ADDRESS: Final = "127.0.0.1"
MAX_CONNECTIONS = 24
MAX_HEAD_BYTES = 1 << 14
HEAD_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0
_BEAT_EVERY = 15
"""After so many looks without news a comment is sent, so that a reader that is gone is noticed."""
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address has the token
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Connection": "close",
}


@dataclass(slots=True)
class _Connections:
    """Those that are open, at most `MAX_CONNECTIONS`."""

    _open: set[socket.socket] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, connection: socket.socket) -> bool:
        """Whether there was room."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                return False
            self._open.add(connection)
            return True

    def remove(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)

    def __len__(self) -> int:
        return len(self._open)

    def cut(self) -> None:
        """End all of them, whatever they wait for."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class DashboardServer(socketserver.ThreadingTCPServer):
    """Listens once it is made. `serve_forever` answers until `close`, which another thread or an interrupt calls.

    Raises:
        ConfigError: the port is not free.
    """

    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, runs: ShownRuns, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        self.answers = Answers(runs)
        self.is_closing = threading.Event()
        self._connections = _Connections()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"port {port} of {ADDRESS} cannot be used: {error.strerror}; --port names another"
            ) from error

    @property
    def url(self) -> str:
        """The address with the token."""
        return f"http://{ADDRESS}:{self.server_address[1]}/{self.token}/"

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    def close(self) -> None:
        """Cut all connections, wait for their threads, and free the port."""
        self.is_closing.set()
        self._connections.cut()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, if there is room."""
        if self._connections.add(request):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(0.0)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """The connection ends."""
        self._connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A mistake of ours ends one connection, and is shown."""
        error = sys.exception()
        if isinstance(error, Exception):
            show_traceback(error)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: DashboardServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        """Answer one request. A client that leaves or is cut is not an error."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            head = _read_head(self.connection)
            self.connection.settimeout(WRITE_TIMEOUT_S)
            self.rfile = io.BufferedReader(io.BytesIO(head))
            self.raw_requestline = self.rfile.readline(MAX_HEAD_BYTES)
            if self.raw_requestline and self.parse_request():
                self._answer()

    def _answer(self) -> None:
        try:
            hosts = self.headers.get_all("Host", [])
            answer = self.server.answers.to(read_request(self.command, self.path, hosts, self.server.token))
        except RefusedError as error:
            answer = Answer(str(error).encode(), "text/plain; charset=utf-8", error.status)
        except ConfigError as error:
            answer = Answer(str(error).encode(errors="replace"), "text/plain; charset=utf-8", 404)
        if isinstance(answer, Stream):
            self._head(200, "text/event-stream", None)
            self._send_news(answer)
        else:
            self._head(answer.status, answer.content_type, len(answer.body))
            self.wfile.write(answer.body)

    def _send_news(self, stream: Stream) -> None:
        """Send what is new about once a second, until the client leaves."""
        num_quiet = 0
        while not self.server.is_closing.is_set():
            is_quiet = True
            for message in stream.new():
                self.wfile.write(b"data: " + message + b"\n\n")
                is_quiet = False
            num_quiet = num_quiet + 1 if is_quiet else 0
            if num_quiet % _BEAT_EVERY == _BEAT_EVERY - 1:
                self.wfile.write(b":\n\n")
            if _has_left(self.connection, LOOK_EVERY_S):
                return
            self.connection.settimeout(WRITE_TIMEOUT_S)

    def _head(self, status: int, content_type: str, num_bytes: int | None) -> None:
        self.send_response_only(status)
        lengths = {} if num_bytes is None else {"Content-Length": str(num_bytes)}
        allow = {"Allow": "GET"} if status == 405 else {}
        for name, value in {"Date": formatdate(usegmt=True), "Content-Type": content_type, **lengths, **allow}.items():
            self.send_header(name, value)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Of a request that cannot be parsed: its text is not repeated."""
        self._head(code, "text/plain; charset=utf-8", 0)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: an address has the token."""


def _read_head(connection: socket.socket) -> bytes:
    """The request line and the headers. Raises `OSError` if they do not come in time, or are too long."""
    deadline_s = time.monotonic() + HEAD_TIMEOUT_S
    data = b""
    while b"\r\n\r\n" not in data:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or len(data) >= MAX_HEAD_BYTES:
            raise TimeoutError("the request is too slow or too long")
        connection.settimeout(left_s)
        part = connection.recv(MAX_HEAD_BYTES - len(data))
        if not part:
            raise ConnectionResetError("the client has left")
        data += part
    return data


def _has_left(connection: socket.socket, wait_s: float) -> bool:
    """Whether the client leaves within this time. A client that sends more than its request is treated as one."""
    connection.settimeout(wait_s)
    try:
        connection.recv(1)
    except TimeoutError:
        return False
    return True
