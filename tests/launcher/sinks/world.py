"""A run directory that has only metrics, and real followers of it that the test ends, kills and starts again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darts_async.config import RunConfig
from darts_async.machine.lifetime import PARENT_PID_VARIABLE
from darts_async.machine.spawn import module_command
from launcher.sinks.follower import memory_path, read_memory, write_memory
from tests import ROOT

DEADLINE_S = 120.0
BEGAN_S = 1_790_000_000.0


def step(number: int, **metrics: float) -> dict[str, Any]:
    """A line of a step, whose metrics are written with `__` for `/`."""
    return {"type": "step", "step": number, **{name.replace("__", "/"): value for name, value in metrics.items()}}


HISTORY: tuple[dict[str, Any], ...] = (
    {
        "type": "evaluation",
        "policy_version": 0,
        "newest_version": 0,
        "reward/mean": 0.25,
        "pass@1": 0.5,
        "rewards": [0.0],
    },
    step(0, reward__mean=0.1, length__mean=10.0),
    step(1, reward__mean=0.2, length__mean=11.0),
    step(0, weights__total_s=0.5),  # its second part comes late
    step(1, weights__total_s=0.6),
    step(2, reward__mean=0.3, length__mean=12.0),
    {"type": "resumed", "life": 2},
    step(1, reward__mean=0.7, length__mean=21.0),  # step 1 again
    step(2, reward__mean=0.8, length__mean=22.0),
    {
        "type": "evaluation",
        "policy_version": 3,
        "newest_version": 3,
        "reward/mean": 0.75,
        "pass@1": 1.0,
        "rewards": [1.0],
    },
)
"""What a run may leave: steps in parts, and steps that come again."""

STEP_REWARDS = [(0, 0.1), (1, 0.2), (2, 0.3), (1, 0.7), (2, 0.8)]
"""(step, reward/mean) as measured."""
LAST_STEP_REWARDS = [(0, 0.1), (1, 0.7), (2, 0.8)]
"""Where the later value replaces the earlier one."""
EVALUATIONS = [(0, 0.25), (3, 0.75)]


class FollowedRun:
    """A run with a follower for one sink. Use as a context manager."""

    def __init__(self, tmp_path: Path, sink: str, telemetry: dict[str, Any] | None = None) -> None:
        self.run_dir = tmp_path / "runs" / "arithmetic"
        self.sink = sink
        (self.run_dir / "logs").mkdir(parents=True)
        self._config = RunConfig.model_validate({"telemetry": {"sinks": [sink], **(telemetry or {})}})
        self._num_lines = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        own = {"TMPDIR": str(temporary), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        self.environment = os.environ | own | {"DO_NOT_TRACK": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}

    def __enter__(self) -> "FollowedRun":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """The launcher writes lines."""
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            for line in lines:
                self._num_lines += 1
                at = {"elapsed_s": float(self._num_lines), "unix_s": BEGAN_S + self._num_lines}
                file.write(json.dumps(line | at) + "\n")

    def start(self) -> subprocess.Popen[bytes]:
        """A follower that is told that more lines may come."""
        process = subprocess.Popen(
            module_command("launcher.sinks.follower", str(self.run_dir), self.sink),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment | {PARENT_PID_VARIABLE: str(os.getpid())},
        )
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(self._config.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        return process

    def follow_to_the_end(self) -> str:
        """A follower that takes everything and leaves; what it printed."""
        process = self.start()
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, output.decode()
        return output.decode()

    def kill_after(self, num_lines: int) -> None:
        """A follower that is killed once it has remembered so many lines."""
        process, deadline_s = self.start(), time.monotonic() + DEADLINE_S
        while self.num_taken < num_lines:
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline_s, f"{self.num_taken} of {num_lines} lines"
            time.sleep(0.02)
        process.kill()
        process.communicate()

    def forget(self, num_lines: int) -> None:
        """As if the follower had been killed after the last lines were flushed and before it remembered them."""
        memory = read_memory(self.run_dir, self.sink)
        memory.num_lines -= num_lines
        write_memory(self.run_dir, self.sink, memory)

    @property
    def num_taken(self) -> int:
        """Lines that the sink has taken, as its follower remembers."""
        return read_memory(self.run_dir, self.sink).num_lines if memory_path(self.run_dir, self.sink).exists() else 0

    @property
    def key(self) -> str:
        """The key of the run in the service."""
        return read_memory(self.run_dir, self.sink).key

    def read_back(self, code: str, *arguments: str) -> Any:
        """The JSON that a program prints: the service's own reader, in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def follow_with_a_kill(self, lines: Sequence[dict[str, Any]] = HISTORY) -> None:
        """All lines, with a follower that is killed on the way, and one that forgets two of the lines it had given."""
        self.append(lines[:4])
        self.kill_after(4)
        self.forget(2)
        self.append(lines[4:7])
        self.kill_after(7)
        self.append(lines[7:])
        self.follow_to_the_end()
        self.follow_to_the_end()  # which has nothing to do
        assert self.num_taken == len(lines)
