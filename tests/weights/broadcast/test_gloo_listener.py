"""Peers without the keys of a run at every socket of it: refused, logged, and nothing of the run notices."""

import errno
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from darts_async.transport import load_keys
from tests.support.launched import LaunchedRun, listening

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

INTERFACE = "127.0.0.3"
"""Of this machine too, and nobody else's: what is bound elsewhere shows."""


@contextmanager
def intruder(
    context: "zmq.Context[Any]", address: str, server_key: bytes, public: bytes, secret: bytes
) -> Iterator[None]:
    """A ZeroMQ peer that says something, with these keys if there are any."""
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    if server_key:
        dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = server_key, public, secret
    dealer.connect(address)
    dealer.send_multipart([b"\x93", b"let me in"])
    try:
        yield
    finally:
        dealer.close()


def log_of(run: LaunchedRun) -> list[dict[str, Any]]:
    lines = [line for path in run.run_dir.glob("logs/*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def are_refused(run: LaunchedRun, links: list[dict[str, Any]]) -> bool:
    """Whether each hub has logged strangers without a handshake on each of its links, and strangers with one at all:
    these are a line a second at most."""
    lines = log_of(run)
    by_handshake = {line["link"] for line in lines if line["event"] == "handshake_failed"}
    by_key = {line["process"] for line in lines if line["event"] == "connection_refused"}
    of_all = {link["name"] for link in links}
    return by_handshake == of_all and by_key == {"shaper/0", "learner/0", "launcher"}


def test_strangers_at_every_socket_are_refused_and_logged_and_the_run_listens_on_its_interface_alone(
    tmp_path: Path,
) -> None:
    sections = {
        "network": {"host": INTERFACE},
        "roles": {"generator": {"replicas": 2}},
        "learner": {"steps": 400, "checkpoint_every": 1000},
        "telemetry": {"status_every_s": 0.1},
    }
    with LaunchedRun(tmp_path, "scripted.yaml", sections) as run, ExitStack() as intruders:
        run.wait_for_steps(3)
        links = json.loads((run.run_dir / "plan.json").read_text())["links"]
        context = intruders.enter_context(zmq.Context())
        own, other = zmq.curve_keypair(), zmq.curve_keypair()
        for link in links:
            hub = load_keys(run.run_dir / "keys", link["hub"]).public_key.encode()
            for server_key in (b"", other[0], hub):  # none, of another run, the right one; its own key is nobody's
                intruders.enter_context(intruder(context, link["address"], server_key, *own))
        ports = listening(run)
        known = {(INTERFACE, int(link["address"].rsplit(":", 1)[1])) for link in links}
        assert known <= ports
        assert {host for host, _ in ports} == {INTERFACE}, "nothing listens elsewhere, the sockets of gloo included"
        assert ports - known, "there are some"
        for address in ports - known:
            with socket.socket() as stranger:
                stranger.settimeout(0.05)
                assert stranger.connect_ex(address) == errno.EAGAIN, "gloo's port gives no answer"
        for host, port in known:
            half_open = intruders.enter_context(socket.create_connection((host, port), timeout=5.0))
            babbler = intruders.enter_context(socket.create_connection((host, port), timeout=5.0))
            babbler.sendall(b"GET / HTTP/1.1\r\nHost: run\r\n\r\n" * 40)
            assert half_open
        run.wait_until(lambda: are_refused(run, links))
        steps = len(run.lines("metrics.jsonl"))
        run.wait_for_steps(steps + 20)
        assert not run.events("ended"), "nobody has died of it"
        assert run.verb("down").returncode == 0
        assert run.end() == 130, run.output
        run.assert_clean()
        assert are_refused(run, links)


def knock(address: tuple[str, int], number: int) -> None:
    """Connect and close, as a scan of ports does. At loopback a connection is there at once, or does not come."""
    for _ in range(number):
        with socket.socket() as stranger:
            stranger.setblocking(False)
            stranger.connect_ex(address)


def test_a_thousand_connections_to_the_ports_of_gloo_cost_a_run_nothing(tmp_path: Path) -> None:
    """Each of them used to cost a descriptor: of the few that are allowed here there would soon be none left."""
    sections = {"roles": {"generator": {"replicas": 2}}, "learner": {"steps": 60, "checkpoint_every": 1000}}
    limited = ("bash", "-c", 'ulimit -n 300; exec "$@"', "limited")
    with LaunchedRun(tmp_path, "scripted.yaml", sections, prefix=limited) as run:
        run.wait_for_steps(3)
        links = {link["address"] for link in json.loads((run.run_dir / "plan.json").read_text())["links"]}
        of_gloo = {(host, port) for host, port in listening(run) if f"tcp://{host}:{port}" not in links}
        assert len(of_gloo) == 3, "one of each member of the group"
        for address in sorted(of_gloo):
            knock(address, 1000)
        assert run.end() == 0, run.output
        assert not run.events("ended"), "nothing has died"
        run.assert_clean()
