"""Weights & Biases: each line of the metrics is one row of the run's history.

W&B drops a row whose own step is not above that of the row before. So the number of the line is W&B's step, which makes
a line that comes again harmless, and the step of the optimiser is a metric of its own, `step`, against which all others
are drawn. A follower continues after the last row that the service has. Offline, this is what the files of the run
have. Where a step comes again, W&B shows both values.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from launcher.sinks.sink import Memory, point_of, settings_for

_HEADER_BYTES: Final = 7
"""Of a file with W&B's records, before the first."""
_BLOCK_BYTES: Final = 32 << 10
_CHUNK: Final = struct.Struct("<IHB")
"""Checksum, length, and whether it is a complete record (1), or the first (2), a middle (3) or the last (4) part."""


class WandbSink:
    """Writes a run named like the run directory, whose id is `Memory.key`. Its files are in `wandb/` there."""

    def __init__(self, run_dir: Path, config: RunConfig, memory: Memory) -> None:
        """Begin the run, or continue it. Raises `wandb.Error`, also if the service cannot be reached."""
        mode = _mode(config)
        written = _last_row(run_dir, memory.key)
        self._run = wandb.init(
            project=config.telemetry.wandb.project or os.environ.get("WANDB_PROJECT") or "darts-async",
            entity=config.telemetry.wandb.entity,
            name=run_dir.name,
            id=memory.key,
            resume="allow",
            dir=run_dir,
            mode=mode,
            config=settings_for(config),
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,  # of the machine of the launcher, which may not be that of the processes
            ),
        )
        memory.num_lines = written if mode == "offline" else max(0, self._run.step - 1)
        self._num_lines = memory.num_lines
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def check(config: RunConfig) -> None:
        """Raises `ConfigError` if W&B is to be online and has no key, or one of the wrong form. Nothing is sent."""
        if _mode(config) == "offline":
            return
        try:
            wandb.login(verify=False)
        except (wandb.Error, ValueError) as error:
            advice = "set WANDB_API_KEY, or call `wandb login`, or set telemetry.wandb.mode: offline"
            raise ConfigError(f"telemetry.sinks has 'wandb', but it has no key: {error}; {advice}") from error

    def write(self, line: dict[str, Any]) -> None:
        """One row."""
        self._num_lines += 1
        if (point := point_of(line)) is not None:
            self._run.log({"step": point.step, **point.metrics}, step=self._num_lines, commit=True)

    def flush(self) -> None:
        """No effect. The next one asks what has arrived."""

    def close(self) -> None:
        """Wait until everything has been sent."""
        self._run.finish()


def _mode(config: RunConfig) -> Literal["online", "offline"]:
    match config.telemetry.wandb.mode or os.environ.get("WANDB_MODE", "online"):
        case "online":
            return "online"
        case "offline":
            return "offline"
        case mode:
            raise ConfigError(f"telemetry.sinks has 'wandb', but WANDB_MODE is {mode!r}; use online or offline")


def _last_row(run_dir: Path, key: str) -> int:
    """The highest row in the files of this run, of which each follower has left one; 0 without any."""
    files = (run_dir / "wandb").glob(f"*run-*-{key}/run-{key}.wandb")
    rows = (Record.FromString(data).history.step.num for file in files for data in records_of(file.read_bytes()))
    return max(rows, default=0)


def records_of(data: bytes) -> Iterator[bytes]:
    """The complete records of a `.wandb` file, which is a log of LevelDB: a kill tears the last one."""
    at = _HEADER_BYTES
    parts: list[bytes] = []
    while at + _CHUNK.size <= len(data):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _CHUNK.size:  # too short for a chunk: filled with zeros
            at += left
            continue
        _, length, kind = _CHUNK.unpack_from(data, at)
        part = data[at + _CHUNK.size : at + _CHUNK.size + length]
        if kind not in (1, 2, 3, 4) or len(part) < length:
            return
        parts = [part] if kind in (1, 2) else [*parts, part]
        if kind in (1, 4):
            yield b"".join(parts)
        at += _CHUNK.size + length
