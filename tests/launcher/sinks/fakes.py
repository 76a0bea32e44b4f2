"""Sinks of a user's, which write what they get to a file of the run directory, or fail."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from launcher.sinks.sink import Memory


class Collects:
    """Keeps what it gets."""

    def __init__(self, run_dir: Path, config: RunConfig, memory: Memory) -> None:
        self.file = (run_dir / "collected.jsonl").open("a")
        self.run_dir = run_dir

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        (self.run_dir / "closed").touch()


class Refuses(Collects):
    """Takes no line."""

    def write(self, line: dict[str, Any]) -> None:
        raise ConnectionError("no server")


class Leaves(Collects):
    """Leaves Python."""

    def write(self, line: dict[str, Any]) -> None:
        raise SystemExit(3)


class Hangs(Collects):
    """Waits."""

    def write(self, line: dict[str, Any]) -> None:
        time.sleep(3600)


class DiesOnce(Collects):
    """Is killed at its third line, the first time."""

    def write(self, line: dict[str, Any]) -> None:
        if line["step"] == 2 and not (self.run_dir / "died").exists():
            (self.run_dir / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(line)
        self.flush()


class CannotBeMade(Collects):
    """Lacks something."""

    def __init__(self, run_dir: Path, config: RunConfig, memory: Memory) -> None:
        raise KeyError("API_KEY")

    @staticmethod
    def check(config: RunConfig) -> None:
        """Says so before."""
        raise ConfigError("API_KEY is not set")
