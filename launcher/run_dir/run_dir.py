"""The directory of a run: its settings, its records and its results.

    config.yaml      the resolved settings, with all defaults
    config.begun.yaml  the same file at the start of the last life: see `changed_settings`
    plan.json        processes and links
    nodes/           for each node: pid and start time of its keeper, its agent and its processes
    state.json       running | finished | stopped | failed, and why
    run.lock         held by the launcher of the run
    metrics.jsonl    one line per optimiser step or evaluation; lines of one step belong together; `resumed` at the
                     beginning of another life of the run
    events.jsonl     one line for each process that started, ended, was found hanging or serves again
    control.sock     where the running launcher takes requests, for the owner of the directory only
    summary.json     the totals
    keys/            one key pair per process
    ledger.msgpack   the outcome of each sample
    shaper.journal   the state of the shaper
    checkpoints/     the state of the learner
    logs/            the output and the structured log of each process; NAME.old.* is the older part
    trace/           what each process did and when: see `darts_async.trace`
    trace.json       the same for Perfetto, written by `darts-launch trace`
    model/           the trained model, at the end

Files that are rewritten are replaced atomically, also when the power fails: a reader sees the old or the new version.
Files that grow are flushed to the disk within about a second.

Logs, traces, journal and checkpoints are bounded, by `telemetry.log_max_mb`, `telemetry.trace_max_mb`, the samples in
flight and `learner.keep_checkpoints`. Three files grow with the run: `ledger.msgpack` by less than 100 bytes per
sample, `metrics.jsonl` by about 2 KB per step, `events.jsonl` with each start and end of a process. So ten million
samples with 256 per step are 1 GB of ledger and 80 MB of metrics. A shaper that resumes a run needs 130 bytes of memory
per sample to read the ledger; `audit` and `report` need about 1 KB per sample.
"""

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
from darts_async.topology import CONFIG_FILE, PLAN_FILE, RunPlan, encode_plan
from launcher.run_dir.growing_files import replace_file

BEGUN_FILE = "config.begun.yaml"
STATE_FILE = "state.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SUMMARY_FILE = "summary.json"
LOCK_FILE = "run.lock"
TRACE_FILE = "trace.json"
LOGS_DIR = "logs"
KEYS_DIR = "keys"
MODEL_DIR = "model"

RunStatus = Literal["running", "finished", "stopped", "failed"]


class RunRecord(msgspec.Struct, frozen=True):
    """The state of the run. Times are seconds since 1970."""

    status: RunStatus
    reason: str
    started_at_s: float
    ended_at_s: float | None
    launcher_pid: int
    life: int = 1
    """The number of the life."""
    directory: str = ""
    """Where `darts-launch` was called. Relative paths of the settings begin there."""
    inode: int = 0
    """The inode of the run directory in which this was written: see `inode_of`."""


def inode_of(run_dir: Path) -> int:
    """The number that distinguishes a run directory from its copies, even from one that has replaced it. A rename does
    not change it. Raises `OSError`."""
    return run_dir.stat().st_ino


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
    """Write the state of the run."""
    replace_file(run_dir / STATE_FILE, msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def read_record(run_dir: Path) -> RunRecord:
    """Read the state of the run. Raises `OSError` or `msgspec.DecodeError`."""
    return msgspec.json.decode((run_dir / STATE_FILE).read_bytes(), type=RunRecord)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines of text, all or none of them. The operating system has them on return.

    Raises:
        NoSpaceError: the disk is full.
    """
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
    """Write the totals of the run."""
    replace_file(run_dir / SUMMARY_FILE, msgspec.json.format(msgspec.json.encode(summary)) + b"\n")


def final_model_path(run_dir: Path) -> Path | None:
    """The trained model in Hugging Face format, if the learner has written it."""
    path = run_dir / MODEL_DIR
    return path if (path / "config.json").is_file() else None
