"""The directory of a run is made, and what the launcher alone writes into it. Its files: `topology.run_files`."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from darts_async.config import RunConfig
from darts_async.errors import NoSpaceError
from darts_async.machine.full_disk import append_whole, is_no_space, room_of
from darts_async.topology.plan import RunPlan, encode_plan
from darts_async.topology.run_files import (
    BEGUN_FILE,
    CONFIG_FILE,
    LOGS_DIR,
    MODEL_DIR,
    PLAN_FILE,
    STATE_FILE,
    SUMMARY_FILE,
)
from darts_async.wire.atomic_file import replace_file, replace_json

RunStatus = Literal["running", "finished", "stopped", "failed"]


class RunRecord(msgspec.Struct, frozen=True):
    """The state of the run. Times are seconds since 1970."""

    status: RunStatus
    reason: str
    started_at_s: float
    ended_at_s: float | None
    launcher_pid: int
    life: int = 1
    directory: str = ""
    """Where `darts-launch` was called. Relative paths of the settings begin there."""
    inode: int = 0
    """The inode of the run directory in which this was written: see `place.inode_of`."""


def run_dir_name(name: str, number: int = 1) -> str:
    """`NAME-YYYYmmdd-HHMMSS` of this moment, with a number if that name is in use."""
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return stamp if number == 1 else f"{stamp}-{number}"


def create_run_dir(config: RunConfig) -> Path:
    """Create a new directory with `logs/` in it. Only the user may read it, because of the keys."""
    runs_dir = config.runs_path
    runs_dir.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = runs_dir / run_dir_name(config.name, number)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
            continue
        (path / LOGS_DIR).mkdir()
        return path


def write_inputs(run_dir: Path, config: RunConfig, plan: RunPlan) -> None:
    """Write settings and plan, which every process reads."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_file(run_dir / CONFIG_FILE, text.encode())
    replace_file(run_dir / BEGUN_FILE, text.encode())
    replace_file(run_dir / PLAN_FILE, encode_plan(plan))


def write_record(run_dir: Path, record: RunRecord) -> None:
    replace_json(run_dir / STATE_FILE, record)


def read_record(run_dir: Path) -> RunRecord:
    """Read the state of the run. Raises `OSError` or `msgspec.DecodeError`."""
    return msgspec.json.decode((run_dir / STATE_FILE).read_bytes(), type=RunRecord)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append all of these lines or none; the operating system has them on return. Raises `NoSpaceError`."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if not is_no_space(error):
            raise
        raise NoSpaceError(f"{path.name} cannot be written: {room_of(path)}") from error
    try:
        append_whole(file, "".join(f"{line}\n" for line in lines).encode(), path)
    finally:
        os.close(file)


def write_summary(run_dir: Path, summary: msgspec.Struct) -> None:
    replace_json(run_dir / SUMMARY_FILE, summary)


def final_model_path(run_dir: Path) -> Path | None:
    """The trained model in Hugging Face format, if the learner has written it."""
    path = run_dir / MODEL_DIR
    return path if (path / "config.json").is_file() else None
