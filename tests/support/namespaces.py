"""Several nodes on one machine: Linux network namespaces with addresses of their own, joined by a switch that is one
too, and a real sshd in each but the first. Nothing outside is touched, and nothing is left, nor of an owner that was
killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PREFIX = "darts"
DEADLINE_S = 20.0
_SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def why_not() -> str | None:
    """Why there can be no nodes here; None if there can."""
    if shutil.which("ip") is None:
        return "network namespaces are made by `ip`, of the package iproute2"
    if not Path(_SSHD).exists() or shutil.which("ssh-keygen") is None:
        return "nodes are reached over sshd, of the package openssh-server"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces are not permitted here: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return None


@dataclass(frozen=True)
class Node:
    """A namespace with an address and an sshd."""

    name: str
    namespace: str
    address: str
    known_hosts: Path
    identity_file: Path

    def command(self, *words: str) -> list[str]:
        """A command line that runs there."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def settings(self) -> dict[str, object]:
        """For `nodes` of a run."""
        ssh = {"identity_file": str(self.identity_file), "known_hosts": str(self.known_hosts), "timeout_s": 10.0}
        return {"name": self.name, "host": self.address, "ssh": ssh}

    def pids(self) -> list[int]:
        """The processes there, sshd included."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace).split()]


class Network:
    """The nodes and their switch."""

    def __init__(self, nodes: list[Node], switch: str) -> None:
        self.nodes = nodes
        self._switch = switch

    def cut(self, node: Node) -> None:
        """Nothing goes to a node or comes from it."""
        self._port(node, "down")

    def heal(self, node: Node) -> None:
        """The link is as it was."""
        self._port(node, "up")

    def kill(self, node: Node) -> None:
        """Every process of a node dies at once."""
        _kill_all(node.namespace)

    def _port(self, node: Node, state: str) -> None:
        _run("ip", "netns", "exec", self._switch, "ip", "link", "set", f"port{self.nodes.index(node)}", state)


@contextlib.contextmanager
def network(directory: Path, count: int) -> Iterator[Network]:
    """Nodes `a`, `b`, ... The first is the one on which a run is started."""
    _remove_leftovers()
    base = f"{PREFIX}-{os.getpid()}"
    switch, names = f"{base}-switch", [f"{base}-{number}" for number in range(count)]
    subnet = f"198.18.{os.getpid() % 250}"  # of the range that is set aside for testing networks (RFC 2544)
    try:
        _make_switch(switch)
        for number, name in enumerate(names):
            _join(switch, name, number, f"{subnet}.{number + 1}")
        identity = directory / "identity"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(identity))
        known_hosts = directory / "known_hosts"
        nodes = [
            Node(chr(ord("a") + number), name, f"{subnet}.{number + 1}", known_hosts, identity)
            for number, name in enumerate(names)
        ]
        with contextlib.ExitStack() as daemons:
            keys = [daemons.enter_context(_sshd(directory, node)) for node in nodes[1:]]
            known_hosts.write_text("".join(keys))
            yield Network(nodes, switch)
    finally:
        for name in (*names, switch):
            _remove(name)


def _make_switch(switch: str) -> None:
    _run("ip", "netns", "add", switch)
    for words in ("link add bridge type bridge", "link set bridge up", "link set lo up"):
        _run("ip", "netns", "exec", switch, "ip", *words.split())


def _join(switch: str, name: str, number: int, address: str) -> None:
    """A namespace with an interface whose other end is a port of the switch."""
    _run("ip", "netns", "add", name)
    port = f"port{number}"
    _run(*f"ip -n {switch} link add {port} type veth peer name eth0 netns {name}".split())
    for words in (f"-n {switch} link set {port} master bridge", f"-n {switch} link set {port} up"):
        _run("ip", *words.split())
    for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
        _run("ip", "-n", name, *words.split())


@contextlib.contextmanager
def _sshd(directory: Path, node: Node) -> Iterator[str]:
    """A daemon that listens at the address of a node. Yields the line for `known_hosts`."""
    home = directory / f"sshd-{node.name}"
    home.mkdir()
    key = home / "host_key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    (home / "authorized_keys").write_text(node.identity_file.with_suffix(".pub").read_text())
    (home / "config").write_text(
        f"ListenAddress {node.address}\nHostKey {key}\nAuthorizedKeysFile {home / 'authorized_keys'}\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\nLogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    with (home / "log").open("w") as log:
        command = node.command(_SSHD, "-D", "-e", "-f", str(home / "config"))
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_for_banner(node, daemon, home / "log")
        yield f"{node.address} {key.with_suffix('.pub').read_text()}"
    finally:
        daemon.kill()
        daemon.wait(DEADLINE_S)


def _wait_for_banner(node: Node, daemon: "subprocess.Popen[bytes]", log: Path) -> None:
    code = f"import socket; print(socket.create_connection(('{node.address}', 22), 1).recv(4))"
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s and daemon.poll() is None:
        probe = subprocess.run(node.command("python3", "-c", code), capture_output=True, text=True, check=False)
        if "SSH" in probe.stdout:
            return
        time.sleep(0.05)
    raise AssertionError(f"no sshd at {node.address}: {log.read_text()}")


def _remove_leftovers() -> None:
    """Namespaces of processes that are gone."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if name.startswith(f"{PREFIX}-") and owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove(name)


def _remove(name: str) -> None:
    if name in _run("ip", "netns", "list").split():
        _kill_all(name)
        _run("ip", "netns", "del", name)


def _kill_all(namespace: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while pids := [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]:
        assert time.monotonic() < deadline_s, f"{pids} in {namespace} do not die"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
