"""The server of the dashboard, over real sockets: whom it answers, and that a bad client harms only itself."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from darts_async.errors import ConfigError
from launcher.commands.cli import app
from launcher.dashboard import server as server_module
from launcher.dashboard.answers import PAGE_FILES
from launcher.dashboard.runs import ShownRuns
from launcher.dashboard.server import DashboardServer
from launcher.run_dir.run_dir import RunRecord, write_record
from tests.launcher.analysis.test_rollouts import write
from tests.test_rollouts import rollout

DEADLINE_S = 20.0


def make_run(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("name: made\nseed: 7\n")
    write_record(run_dir, RunRecord("finished", "", 5.0, 9.0, 1))
    (run_dir / "metrics.jsonl").write_text('{"type": "step", "step": 0, "elapsed_s": 1.0, "learner/loss": 2.0}\n')
    write(run_dir, [rollout("7/0", text="<b>bold</b>", reward=1.0)])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A directory with two runs, and a file beside them that is not to be read."""
    (tmp_path / "runs").mkdir()
    for name in ("one", "two"):
        make_run(tmp_path / "runs" / name)
    (tmp_path / "config.yaml").write_text("secret: true\n")
    return tmp_path / "runs"


@pytest.fixture
def server(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DashboardServer]:
    monkeypatch.setattr(server_module, "LOOK_EVERY_S", 0.01)
    serving = DashboardServer(ShownRuns.at(runs))
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.shutdown()
    serving.close()
    thread.join(DEADLINE_S)


def connected(server: DashboardServer, words: bytes = b"") -> socket.socket:
    client = socket.create_connection(server.server_address[:2], DEADLINE_S)  # type: ignore[arg-type]
    client.sendall(words)
    return client


def rest_of(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    with client:
        parts = []
        try:
            while part := client.recv(1 << 16):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)


def get(server: DashboardServer, path: str, token: str | None = None, **headers: str) -> http.client.HTTPResponse:
    """A reply that has been read as a whole; its body is `data`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=DEADLINE_S)
    connection.request("GET", f"/{server.token if token is None else token}/{path}", headers=headers)
    reply = connection.getresponse()
    reply.data = reply.read()  # type: ignore[attr-defined]
    connection.close()
    return reply


def told(server: DashboardServer, path: str) -> Any:
    reply = get(server, path)
    assert reply.status == 200, reply.data  # type: ignore[attr-defined]
    return json.loads(reply.data)  # type: ignore[attr-defined]


def news(client: socket.socket) -> Iterator[dict[str, Any]]:
    """The messages of an event stream."""
    with client.makefile("rb") as lines:
        for line in lines:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def test_the_page_may_load_its_own_files_alone(server: DashboardServer) -> None:
    for path, (_, kind) in PAGE_FILES.items():
        reply = get(server, path)
        assert (reply.status, reply.headers["Content-Type"]) == (200, kind)
        assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in reply.headers["Content-Security-Policy"]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert reply.headers["Cache-Control"] == "no-store"
        assert "Server" not in reply.headers
        assert "Access-Control-Allow-Origin" not in reply.headers


def test_it_listens_on_this_machine_alone_and_the_address_is_complete(server: DashboardServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/{server.token}/"
    assert len(server.token) >= 32


def test_each_start_has_a_token_of_its_own(server: DashboardServer, runs: Path) -> None:
    other = DashboardServer(ShownRuns.at(runs))
    other.close()
    assert other.token != server.token
    assert get(server, "", token=other.token).status == 403


@pytest.mark.parametrize("path", ["", "start", "updates?run=one", "style.css", "settings?run=one"])
def test_nothing_is_told_without_the_token_or_to_another_host(server: DashboardServer, path: str) -> None:
    for reply in (get(server, path, token="x"), get(server, path, Host="evil.example")):
        assert reply.status == 403
        assert server.token.encode() not in reply.data  # type: ignore[attr-defined]
        assert b"made" not in reply.data  # type: ignore[attr-defined]


def test_only_get_is_answered(server: DashboardServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=DEADLINE_S)
    connection.request("POST", f"/{server.token}/start", body="x" * 100)
    reply = connection.getresponse()
    assert (reply.status, reply.headers["Allow"]) == (405, "GET")
    connection.close()


@pytest.mark.parametrize(
    "path",
    [
        *(
            "../config.yaml",
            "../../config.yaml",
            "%2e%2e/config.yaml",
            "page.html",
            "page/page.html",
            "one/config.yaml",
        ),
        *("settings?run=..", "settings?run=.", "settings?run=", "settings?run=one/../..", "settings?run=%2Fetc"),
        *("samples?run=../runs/one&kind=train&number=3", "samples?run=one&kind=train&number=../3", "updates?run=three"),
        *("samples?run=one&kind=../train&number=3", "settings", "settings?run=one&run=two", "sample?run=one", "start/"),
    ],
)
def test_no_path_leads_out(server: DashboardServer, path: str) -> None:
    reply = get(server, path)
    assert reply.status in (400, 404)
    assert b"secret" not in reply.data  # type: ignore[attr-defined]


def test_runs_samples_and_settings_are_told(server: DashboardServer) -> None:
    start = told(server, "start")
    assert sorted(row["run"] for row in start["runs"]) == ["one", "two"]
    assert [chart["title"] for chart in start["charts"]][:2] == ["Reward", "Response length"]
    [group] = told(server, "samples?run=one&kind=train&number=3")
    assert group["samples"][0]["sample"] == "7/0"
    assert told(server, "sample?run=one&kind=train&number=3&sample=7/0")["text"] == "<b>bold</b>"
    reply = get(server, "settings?run=two")
    assert (reply.data, reply.headers["Content-Type"]) == (  # type: ignore[attr-defined]
        b"name: made\nseed: 7\n",
        "text/plain; charset=utf-8",
    )
    assert get(server, "samples?run=one&kind=train&number=4").status == 404


def test_what_is_new_in_several_runs_comes_as_it_happens(server: DashboardServer, runs: Path) -> None:
    words = f"GET /{server.token}/updates?run=one&run=two HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(server, words.encode()) as client:
        stream = news(client)
        first = [next(stream) for _ in range(7)]
        assert first[0]["runs"][0]["run"] == "two"
        assert [each["run"] for each in first[1:]] == ["one"] * 3 + ["two"] * 3
        with (runs / "two" / "metrics.jsonl").open("a") as file:
            file.write('{"type": "step", "step": 1, "elapsed_s": 2.0, "learner/loss": 1.5}\n')
        message = next(stream)
        assert (message["run"], message["points"]["learner/loss"]) == ("two", [[1], [1.5]])
        make_run(runs / "three")
        assert {row["run"] for row in next(stream)["runs"]} == {"one", "two", "three"}
    with pytest.raises(AssertionError, match="at most 8"):
        told(server, "updates?" + "&".join(f"run={number}" for number in range(9)))


def wait_until_idle(server: DashboardServer) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while server.num_connections:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_client_that_leaves_its_stream_is_noticed(server: DashboardServer) -> None:
    client = connected(server, f"GET /{server.token}/updates?run=one HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    next(news(client))
    client.close()
    wait_until_idle(server)


@pytest.mark.parametrize("words", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_a_client_that_is_silent_or_slow_is_cut(
    server: DashboardServer, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    monkeypatch.setattr(server_module, "HEAD_TIMEOUT_S", 0.05)
    assert rest_of(connected(server, words)) == b""
    assert get(server, "").status == 200


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut(
    server: DashboardServer, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT_S", 0.05)
    (runs / "one" / "config.yaml").write_text("x" * 30_000_000)
    client = connected(server, f"GET /{server.token}/settings?run=one HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    client.recv(1)
    wait_until_idle(server)
    assert len(rest_of(client)) < 30_000_000
    assert get(server, "").status == 200


@pytest.mark.parametrize(
    "words",
    [
        *(b"\x00" * 100 + b"\r\n\r\n", b"poem\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
        *(b"GET / HTTP/1.1\r\n: \xff\r\n\r\n", b"\r\n\r\n", b"GET /" + b"x" * (1 << 15)),
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    ],
    ids=["zeros", "poem", "version", "header", "empty", "too long", "many headers"],
)
def test_a_request_that_is_none_harms_nothing(
    server: DashboardServer, capsys: pytest.CaptureFixture[str], words: bytes
) -> None:
    said = rest_of(connected(server, words))
    assert said == b"" or b" 40" in said.splitlines()[0] or b" 43" in said.splitlines()[0] or b" 505 " in said
    assert get(server, "").status == 200
    assert capsys.readouterr().err == ""


def test_more_connections_than_there_is_room_for_are_refused(
    server: DashboardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    words = f"GET /{server.token}/updates?run=one HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    clients = [connected(server, words) for _ in range(2)]
    for client in clients:
        next(news(client))
    assert b" 503 " in rest_of(connected(server))
    for client in clients:
        client.close()
    wait_until_idle(server)
    assert get(server, "").status == 200


def test_a_mistake_of_ours_is_shown_and_ends_one_connection(
    server: DashboardServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("a mistake \x1b[2J")

    monkeypatch.setattr(server.answers, "to", fails)
    words = f"GET /{server.token}/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert rest_of(connected(server, words.encode())) == b""
    wait_until_idle(server)
    assert "RuntimeError: a mistake \\u001b[2J" in capsys.readouterr().err


def test_one_run_is_shown_alone(runs: Path) -> None:
    shown = ShownRuns.at(runs / "one")
    assert list(shown.found()) == ["one"]
    assert [row["status"] for row in shown.listed()] == ["finished"]
    (runs / "one" / "state.json").write_text("poem")
    assert [row["status"] for row in shown.listed()] == ["unknown"]


def test_a_place_without_a_run_is_named_with_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words, why in (([], "runs is not"), (["empty"], "there is no run in"), (["file"], "file is not a directory")):
        done = CliRunner().invoke(app, ["dashboard", *words])
        assert done.exit_code == 2
        assert why in done.stderr


def test_a_port_that_is_in_use_is_named_with_exit_code_2(server: DashboardServer, runs: Path) -> None:
    port = server.server_address[1]
    done = CliRunner().invoke(app, ["dashboard", str(runs), "--port", str(port)])
    assert done.exit_code == 2
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use; --port names another" in done.stderr
    assert CliRunner().invoke(app, ["dashboard", str(runs), "--port", "70000"]).exit_code == 2
    with pytest.raises(ConfigError, match="cannot be used"):
        DashboardServer(ShownRuns.at(runs), port)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order_also_where_a_shell_has_started_it_in_the_background(
    runs: Path, number: signal.Signals
) -> None:
    """A shell starts its background jobs with SIGINT ignored."""
    command = [sys.executable, "-m", "launcher", "dashboard", str(runs)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert serving.stdout is not None
    with serving.stdout:
        assert serving.stdout.readline().startswith("http://127.0.0.1:")
        serving.send_signal(number)
        assert serving.wait(60) == 0
