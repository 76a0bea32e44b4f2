"""A server with the interface of a judge, whose replies are given."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from darts_async.reward.judge import Reply


def saying(text: str) -> Reply:
    """A chat completion."""
    return Reply(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())


@contextmanager
def judge_server(
    replies: Iterator[tuple[int, str]],
    headers: tuple[tuple[str, str], ...] = (),
    *,
    models: tuple[int, bytes] = (200, b""),
) -> Iterator[str]:
    """Its address. Each POST gets the next reply, a text: with status 200 it is what the judge says. Each GET gets
    `models`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(*models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                status, text = next(replies)
            self._reply(status, saying(text).body if status == 200 else text.encode())

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}/v1"
        finally:
            http.shutdown()
            thread.join()
