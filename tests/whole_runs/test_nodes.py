"""Whole runs on several nodes: network namespaces with addresses of their own, each reached over a real sshd."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.launched import ROOT, LaunchedRun
from tests.support.namespaces import Network, Node, network, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

RESTART = {"backoff": {"initial_s": 0.1, "max_s": 1.0}, "intensity": {"max": 50}}
FAST = {
    "transport": {"heartbeat_s": 0.3, "dead_after_s": 2.0, "resend_after_s": 0.5},
    "telemetry": {"status_every_s": 0.1},
    "network": {"lease_s": 3.0},
}
LISTENERS = """
import json, psutil
found = [(c.laddr.ip, c.laddr.port, c.pid) for c in psutil.net_connections() if c.status == "LISTEN" or c.type == 2]
print(json.dumps([row for row in found if row[1] != 22]))
"""


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Network]:
    with network(tmp_path, 2) as found:
        yield found


@pytest.fixture
def three_nodes(tmp_path: Path) -> Iterator[Network]:
    with network(tmp_path, 3) as found:
        yield found


def spread(found: Network, roles: dict[str, dict[str, Any]], **learner: Any) -> dict[str, Any]:
    """A run on all the nodes."""
    return FAST | {
        "nodes": [node.settings() for node in found.nodes],
        "roles": {role: {"restart": RESTART} | settings for role, settings in roles.items()},
        "learner": learner,
    }


def launched(tmp_path: Path, found: Network, sections: dict[str, Any]) -> LaunchedRun:
    home = tmp_path / "home"
    home.mkdir()
    return LaunchedRun(home, "scripted.yaml", sections, prefix=tuple(found.nodes[0].command()))


def listeners(node: Node) -> list[tuple[str, int, int]]:
    """Address, port and process of everything that listens on a node, sshd excepted."""
    shown = subprocess.run(node.command(sys.executable, "-c", LISTENERS), capture_output=True, text=True, check=True)
    return [tuple(row) for row in json.loads(shown.stdout)]


def test_a_run_over_ssh_ends_as_any_other_and_listens_at_the_addresses_of_its_nodes_alone(
    tmp_path: Path, two_nodes: Network
) -> None:
    a, b = two_nodes.nodes
    roles = {
        "shaper": {"nodes": ["a"]},
        "learner": {"nodes": ["a"]},
        "reward": {"nodes": ["b"]},
        "generator": {"replicas": 2, "nodes": ["a", "b"]},
    }
    with launched(tmp_path, two_nodes, spread(two_nodes, roles, steps=60, checkpoint_every=20)) as run:
        run.wait_for_steps(2)
        for node in (a, b):
            found = listeners(node)
            assert found, "the learner's links and every member's half of a collective"
            assert {address for address, _, _ in found} == {node.address}
        run.kill("generator/1")
        assert run.end() == 0, run.output
        assert [event["process"] for event in run.events("ended")] == ["generator/1"]
        nodes = {event["process"]: run_node(run, event["process"]) for event in run.events("started")}
        assert (nodes["generator/0"], nodes["generator/1"], nodes["reward/0"]) == ("a", "b", "b")
        run.assert_clean()


def run_node(run: LaunchedRun, process: str) -> str:
    plan = json.loads((run.run_dir / "plan.json").read_text())
    return str(next(spec["node"] for spec in plan["processes"] if spec["name"] == process))


def test_a_link_is_cut_and_healed_and_a_node_is_removed_and_the_run_goes_on(
    tmp_path: Path, three_nodes: Network
) -> None:
    _, b, c = three_nodes.nodes
    roles = {
        "shaper": {"nodes": ["a"]},
        "learner": {"nodes": ["a"]},
        "reward": {"replicas": 2, "nodes": ["a", "b"]},
        "generator": {"replicas": 3, "nodes": ["a", "b", "c"]},
    }
    with launched(tmp_path, three_nodes, spread(three_nodes, roles, steps=100_000, checkpoint_every=50)) as run:
        run.wait_for_steps(3)
        three_nodes.cut(b)
        run.wait_until(lambda: bool(run.events("node_silent")))
        three_nodes.heal(b)
        run.wait_until(lambda: node_states(run)["b"] == "up")
        assert run.events("ended") == [], "shorter than the lease: nobody noticed more than a silence"

        three_nodes.cut(b)
        run.wait_until(lambda: {event["process"] for event in run.events("ended")} == {"generator/1", "reward/1"})
        run.wait_for_steps(len(run.lines("metrics.jsonl")) + 3)
        three_nodes.heal(b)
        for name in ("generator/1", "reward/1"):
            run.wait_for_service(name, 2)

        three_nodes.kill(c)
        run.wait_until(lambda: node_states(run)["c"] == "lost")
        run.wait_for_steps(len(run.lines("metrics.jsonl")) + 3)
        assert c.pids() == []
        down = run.verb("down")
        assert down.returncode == 0, down.stderr
        assert run.end() == 130, run.output
        run.assert_clean()


def node_states(run: LaunchedRun) -> dict[str, str]:
    shown = run.verb("status", "--json")
    return {node["name"]: node["state"] for node in json.loads(shown.stdout)["nodes"]} if shown.stdout else {}


def test_the_launcher_is_killed_and_its_nodes_end_when_their_lease_does(tmp_path: Path, two_nodes: Network) -> None:
    _, b = two_nodes.nodes
    roles = {"shaper": {"nodes": ["a"]}, "learner": {"nodes": ["a"]}, "reward": {"nodes": ["b"]}, "generator": {}}
    with launched(tmp_path, two_nodes, spread(two_nodes, roles, steps=100_000)) as run:
        run.wait_for_steps(2)
        pids = set(b.pids())
        run.process.kill()
        run.process.wait(30)
        left = pids
        while len(left) > 1:  # its sshd
            left = pids & set(b.pids())


BAD = [
    ("host", {"host": "198.18.255.250"}, "cannot be reached"),
    ("known_hosts", {}, "is not the known one"),
    ("identity", {}, "refuses the user"),
    ("python", {"python": "/no/such/python"}, "there is no /no/such/python"),
    ("module", {"python": "/usr/bin/python3"}, "has no darts_async"),
    ("workdir", {"workdir": "/no/such/directory"}, "there is no directory /no/such/directory"),
    ("old", {}, "is older than Python 3.11"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD, ids=[kind for kind, _, _ in BAD])
def test_a_node_that_cannot_be_used_is_named_before_anything_is_started(
    tmp_path: Path, two_nodes: Network, kind: str, change: dict[str, Any], message: str
) -> None:
    node = two_nodes.nodes[1].settings() | change
    assert isinstance(node["ssh"], dict)
    if kind == "known_hosts":
        other = tmp_path / "other"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
        (tmp_path / "wrong").write_text(f"{two_nodes.nodes[1].address} {other.with_suffix('.pub').read_text()}")
        node["ssh"] |= {"known_hosts": str(tmp_path / "wrong")}
    if kind == "identity":
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "mine")], check=True)
        node["ssh"] |= {"identity_file": str(tmp_path / "mine")}
    if kind == "old":
        node["python"] = str(script(tmp_path / "old", 'echo "Unknown option: -P" >&2; exit 2'))
    node["ssh"] |= {"timeout_s": 5.0}
    sections = spread(two_nodes, {"generator": {"nodes": ["b"]}}, steps=5) | {
        "nodes": [two_nodes.nodes[0].settings(), node]
    }
    roles = sections["roles"] | {role: {"nodes": ["a"]} for role in ("shaper", "learner", "reward")}
    with launched(tmp_path, two_nodes, sections | {"roles": roles}) as run:
        assert run.process.wait(60) == 2
        words = " ".join(run.output.split())
        assert message in words, run.output
        assert "nodes: b" in words
        assert list((tmp_path / "home").glob("runs/*")) == []


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_agent_that_dies_at_once_on_another_node_fails_the_run_at_once_with_its_last_words(
    tmp_path: Path, two_nodes: Network
) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError('the wheel does not fit this machine')\n")
    node = two_nodes.nodes[1].settings() | {"env": {"PYTHONPATH": f"{tmp_path}:{ROOT}"}}
    roles = {role: {"nodes": ["a"]} for role in ("shaper", "learner", "reward")} | {"generator": {"nodes": ["b"]}}
    sections = spread(two_nodes, roles, steps=5) | {"nodes": [two_nodes.nodes[0].settings(), node]}
    with launched(tmp_path, two_nodes, sections) as run:
        assert run.process.wait(120) == 1
        assert "the wheel does not fit this machine" in run.output
        assert len(two_nodes.nodes[1].pids()) == 1, "its sshd"


def test_a_node_with_other_versions_is_named_with_both(tmp_path: Path, two_nodes: Network) -> None:
    answer = {"python": "3.99.1", "versions": {"torch": "1.0", "darts-async": "0.0.1"}, "sees_shared_file": False}
    answer |= {"gpus": [], "unbound": {}, "missing_paths": [], "missing_modules": []}
    fake = script(tmp_path / "python", f"echo '{json.dumps(answer)}'")
    node = two_nodes.nodes[1].settings() | {"python": str(fake)}
    roles = {role: {"nodes": ["a"]} for role in ("shaper", "learner", "reward")} | {"generator": {"nodes": ["b"]}}
    sections = spread(two_nodes, roles, steps=5) | {"nodes": [two_nodes.nodes[0].settings(), node]}
    with launched(tmp_path, two_nodes, sections) as run:
        assert run.process.wait(60) == 2
        words = " ".join(run.output.split())
        assert "b has Python 3.99.1, but this machine has" in words
        assert "b has torch 1.0, but this machine has" in words
        assert "b does not see the directory" in words
