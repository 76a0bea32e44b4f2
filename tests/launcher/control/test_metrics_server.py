"""The page for Prometheus: served to those who ask rightly, whatever others do meanwhile."""

import asyncio
import socket

import pytest

from launcher.control import metrics_server
from launcher.control.metrics_server import HOST, MAX_CLIENTS, MAX_REQUEST_BYTES, serving_metrics

PAGE = "# TYPE darts_run_completed_steps gauge\ndarts_run_completed_steps 3.0\n"


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def no_notes(text: str) -> None:
    raise AssertionError(text)


async def asked(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


def request(line: str = "GET /metrics HTTP/1.1", host: str = "localhost:9400") -> bytes:
    return f"{line}\r\nHost: {host}\r\nAccept: */*\r\n\r\n".encode()


async def test_a_scrape_gets_the_page(port: int) -> None:
    async with serving_metrics(port, lambda: PAGE, no_notes):
        head, _, body = (await asked(port, request())).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
        assert f"Content-Length: {len(PAGE)}".encode() in head
        assert body.decode() == PAGE
        head, _, body = (await asked(port, request("HEAD /metrics HTTP/1.1"))).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(PAGE)}".encode() in head
        assert body == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("GET / HTTP/1.1"), 404),
        (request("POST /metrics HTTP/1.1"), 405),
        (request("GET /metrics HTTP/1.1", host="evil.example"), 403),
        (request("GET /metrics HTTP/1.1", host="127.0.0.1.evil.example:9400"), 403),
        (request("GET /metrics"), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 2 * MAX_REQUEST_BYTES, 431),
    ],
)
async def test_other_requests_are_refused(sent: bytes, status: int, port: int) -> None:
    async with serving_metrics(port, lambda: PAGE, no_notes):
        answer = await asked(port, sent)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert PAGE.encode() not in answer


async def test_many_scrapes_cost_one_page(port: int) -> None:
    pages = iter(["the first\n"])
    async with serving_metrics(port, lambda: next(pages), no_notes):
        answers = [await asked(port, request()) for _ in range(3)]
    assert all(answer.endswith(b"the first\n") for answer in answers)


async def test_a_client_that_is_slow_or_leaves_holds_up_none(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_WITHIN_S", 0.05)
    async with serving_metrics(port, lambda: PAGE, no_notes):
        slow = [await asyncio.open_connection(HOST, port) for _ in range(MAX_CLIENTS)]
        for _, writer in slow:
            writer.write(b"GET /met")
        for reader, _ in slow:
            with pytest.raises((ConnectionResetError, AssertionError)):
                assert await reader.read() == b"reset"
        answer = await asked(port, request())
        assert answer.endswith(PAGE.encode())
        for _, writer in slow:
            writer.close()


async def test_too_many_clients_are_closed_at_once_and_the_end_closes_all(port: int) -> None:
    async with serving_metrics(port, lambda: PAGE, no_notes):
        waiting = [await asyncio.open_connection(HOST, port) for _ in range(MAX_CLIENTS)]
        refused = 0
        for _ in range(2):
            try:
                refused += await asked(port, request()) == b""
            except ConnectionResetError:
                refused += 1
        assert refused == 2
    for reader, writer in waiting:
        with pytest.raises((ConnectionResetError, AssertionError)):
            assert await reader.read() == b"reset"
        writer.close()


async def test_a_client_that_does_not_read_is_cut_off(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_WITHIN_S", 0.1)
    async with serving_metrics(port, lambda: "x" * 30_000_000, no_notes):
        with socket.create_connection((HOST, port)) as deaf:
            deaf.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(deaf, request())
            answer = await asked(port, request("GET / HTTP/1.1"))
            assert answer.startswith(b"HTTP/1.1 404")


async def test_a_port_that_is_taken_is_a_notice(port: int) -> None:
    notes: list[str] = []
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        async with serving_metrics(port, lambda: PAGE, notes.append):
            pass
    assert notes == [
        f"telemetry.prometheus_port: {port} cannot be bound (Address already in use); no metrics are served there"
    ]


async def test_port_0_serves_nothing() -> None:
    async with serving_metrics(0, lambda: PAGE, no_notes):
        pass
