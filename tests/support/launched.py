"""Whole runs of `darts-launch` as a user starts them, faults and kills in them, and proof that nothing is left."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from darts_async.faults import VARIABLE
from launcher.nodes.scratch import all_of, owner_of, sweep
from tests import ROOT

CONFIGS = ROOT / "launcher" / "configs"
DEADLINE_S = 120.0


class LaunchedRun:
    """A run in a directory of its own; its temporary files go there too. Use as a context manager.

    Args:
        base: name of a shipped configuration.
        sections: settings that are put over it.
        faults: for the environment of its processes.
        prefix: what the command line of the launcher is put behind.
    """

    def __init__(
        self, tmp_path: Path, base: str, sections: dict[str, Any], faults: str = "", prefix: tuple[str, ...] = ()
    ) -> None:
        self._home = tmp_path
        self._prefix = prefix
        self._faults = faults
        self._temporary = tmp_path / "temporary"
        self._temporary.mkdir()
        settings = _merged(yaml.safe_load((CONFIGS / base).read_text()), sections)
        config = tmp_path / "cluster.yaml"
        config.write_text(yaml.safe_dump(settings))
        self.process = self._launched(str(config))

    def _launched(self, *words: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self._temporary), VARIABLE: self._faults}
        command = [*self._prefix, sys.executable, "-m", "launcher", *words]
        with (self._home / "output.txt").open("a") as output:
            return subprocess.Popen(command, cwd=self._home, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def resume(self, *options: str) -> None:
        """`darts-launch resume`, once the launcher before has ended."""
        assert self.process.poll() is not None, "it goes on"
        self.process = self._launched("resume", *options, str(self.run_dir))

    def start_over(self) -> None:
        """`darts-launch` again, where the launcher has died before there was a run to resume."""
        assert self.process.poll() is not None, "it goes on"
        for path in (self._home / "runs").glob("*"):
            shutil.rmtree(path)
        self.process = self._launched(str(self._home / "cluster.yaml"))

    @property
    def has_begun(self) -> bool:
        """Whether there is a run that can be resumed."""
        return any((self._home / "runs").glob("*/state.json"))

    def processes(self) -> list[psutil.Process]:
        """The launcher, the keeper, the agent and all that these have started."""
        node = json.loads((self.run_dir / "nodes" / "local.json").read_text())
        pids = [record["pid"] for record in (node["keeper"], node["agent"], *node["processes"])]
        return [psutil.Process(pid) for pid in (self.process.pid, *pids)]

    def kill_all(self) -> None:
        """SIGKILL to the launcher and to every process of the run, as a power failure would."""
        self.process.kill()
        self.process.wait(DEADLINE_S)
        mark = str(self.run_dir)
        everyone = [p for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or [])]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, DEADLINE_S)

    def __enter__(self) -> "LaunchedRun":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # a test failed: the kernel ends the others with the launcher
            self.process.kill()
            self.process.wait(DEADLINE_S)
        sweep()  # what a killed keeper has left, for which no other comes

    @property
    def run_dir(self) -> Path:
        """The directory of the run, once there is one."""
        [found] = (self._home / "runs").iterdir()
        return found

    @property
    def output(self) -> str:
        """What the launcher has printed."""
        return (self._home / "output.txt").read_text()

    def verb(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`darts-launch WORDS`, from another process, where the run was started."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "launcher", *words]
        return subprocess.run(
            command, cwd=self._home, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """The same, while others go on. What it prints goes where the run's output goes."""
        return self._launched(*words)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of a JSON file of the run, none if it is not there yet."""
        return [
            json.loads(line)
            for path in self._home.glob(f"runs/*/{name}")
            for line in path.read_text().splitlines(keepends=True)
            if line[-1:] == "\n"
        ]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, in order."""
        return [line for line in self.lines("events.jsonl") if line["type"] == kind]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Until something holds, of a run that goes on."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not holds():
            assert self.process.poll() is None, f"the run has ended:\n{self.output}"
            assert time.monotonic() < deadline_s, f"it does not come:\n{self.output}"
            time.sleep(0.02)

    def wait_for_steps(self, number: int) -> None:
        """Until so many steps are taken."""
        self.wait_until(lambda: sum(line["type"] == "step" for line in self.lines("metrics.jsonl")) >= number)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """A signal to the present incarnation of a process, whose number is returned."""
        started = next(line for line in reversed(self.events("started")) if line["process"] == name)
        os.kill(started["pid"], number)
        return int(started["incarnation"])

    def wait_for_service(self, name: str, incarnation: int) -> None:
        """Until this incarnation does its work."""
        self.wait_until(
            lambda: any((e["process"], e["incarnation"]) == (name, incarnation) for e in self.events("serves"))
        )

    def end(self) -> int:
        """Wait for the end. Returns the exit code, after making sure that nothing is left."""
        code = self.process.wait(DEADLINE_S)
        self._assert_nothing_is_left()
        return code

    def assert_clean(self) -> dict[str, Any]:
        """The audit finds nothing and the tokens add up to what the engines decoded. Returns the summary."""
        audit = self.verb("audit", str(self.run_dir))
        assert audit.returncode == 0, audit.stdout
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        assert summary["tokens"]["accounted"] == summary["tokens"]["decoded"]
        return summary

    def _assert_nothing_is_left(self) -> None:
        mark = str(self.run_dir)
        processes = [p.pid for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or [])]
        assert not processes
        pids = {line["pid"] for line in self.events("started")}
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        assert not [path for path in Path("/dev/shm").iterdir() if any(f"_{pid}_" in path.name for pid in pids)]
        for link in json.loads((self.run_dir / "plan.json").read_text())["links"]:
            host, port = link["address"].removeprefix("tcp://").rsplit(":", 1)
            assert not self._is_listened_to(host, int(port)), f"somebody listens on {link['address']}"
        assert not (self.run_dir / "control.sock").exists()
        # torch makes an empty directory for its compiler, one per user and machine, when it is imported
        assert [path.name for path in self._temporary.rglob("*") if not path.name.startswith("torchinductor")] == []
        assert not [path for owner in self._owners() for path in all_of(owner)]

    def _owners(self) -> list[str]:
        """Of the temporary files of each node's processes."""
        nodes = (self._home / "runs").glob("*/nodes/*.json")
        return [owner_of(path.parent.parent, path.stem) for path in nodes]

    def _is_listened_to(self, host: str, port: int) -> bool:
        """Asked where the launcher ran: elsewhere the address may be somebody else's."""
        if not self._prefix:
            with socket.socket() as probe:
                return probe.connect_ex((host, port)) == 0
        code = f"import socket, sys; sys.exit(socket.socket().connect_ex(('{host}', {port})) == 0)"
        return (
            subprocess.run([*self._prefix, sys.executable, "-c", code], check=False, timeout=DEADLINE_S).returncode != 0
        )


def listening(run: LaunchedRun) -> set[tuple[str, int]]:
    """Where the processes of the run listen just now."""
    mark = str(run.run_dir)
    processes = [p for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or [])]
    processes.append(psutil.Process(run.process.pid))
    found = set()
    for process in processes:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
                found.add((connection.laddr.ip, connection.laddr.port))
    return found


def _merged(settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = settings.keys() & over.keys()
    nested = {key: _merged(settings[key], over[key]) for key in both if isinstance(over[key], dict)}
    return settings | over | nested
