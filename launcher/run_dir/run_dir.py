"""The directory of a run: what it was asked to do, what it did, and how it ended.

    config.yaml      the resolved settings, every default written out
    config.begun.yaml  the same as the last life began with it: see `changed_settings`
    plan.json        processes and links
    nodes/           of each node: pid and start time of its keeper, its agent and its processes
    state.json       running | finished | stopped | failed, and why
    run.lock         held by the launcher of the run
    metrics.jsonl    one line per optimiser step or evaluation; lines of one step belong together; `resumed` where
                     another life of the run begins
    events.jsonl     one line for each process that started, ended, was found hanging or serves again
    control.sock     where the running launcher takes requests; only the owner of the directory gets there
    summary.json     the totals
    keys/            one key pair per process
    ledger.msgpack   what became of each sample
    shaper.journal   where the shaper stands
    checkpoints/     where the learner stands
    logs/            what each process printed, and its structured log; NAME.old.* is what was before
    trace/           what each process did and when: see `darts_async.trace`
    trace.json       the same for Perfetto, once `darts-launch trace` has been called
    model/           the trained model, at the end

Files that are rewritten are replaced atomically, also when the power goes: a reader sees the old one or the new one.
Those that grow are on the disk about a second after they were written.

Logs, traces, journal and checkpoints are bounded, by `telemetry.log_max_mb`, `telemetry.trace_max_mb`, what is in
flight and `learner.keep_checkpoints`. Three files are the record of the run and grow with it: `ledger.msgpack` by less
than 100 bytes a sample, `metrics.jsonl` by about 2 KB a step, `events.jsonl` with each start and end of a process. So
ten million samples, of which 256 are trained on in a step, are 1 GB of ledger and 80 MB of metrics. A shaper that takes
a run up again reads the ledger as bytes, 130 a sample in memory; `audit` and `report` keep about 1 KB a sample.
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
    """How the run stands. Times are seconds since 1970."""

    status: RunStatus
    reason: str
    started_at_s: float
    ended_at_s: float | None
    launcher_pid: int
    life: int = 1
    """Which life of the run this is of."""
    directory: str = ""
    """Where `darts-launch` was called: relative paths of the settings begin there."""
    inode: int = 0
    """Of the run directory that this was written in: see `inode_of`."""


def inode_of(run_dir: Path) -> int:
    """What tells a run directory from a copy of it, also from one that has taken its place. A rename leaves it as it
    is. Raises `OSError`."""
    return run_dir.stat().st_ino


def run_dir_name(name: str, number: int = 1) -> str:
    """`NAME-YYYYmmdd-HHMMSS` of this moment; numbered when that name has been used before."""
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return stamp if number == 1 else f"{stamp}-{number}"


def create_run_dir(config: RunConfig) -> Path:
    """Make a directory that did not exist, with `logs/` in it; readable by the user alone, for the keys."""
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
    """Settings and plan, as every process will read them."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_file(run_dir / CONFIG_FILE, text.encode())
    replace_file(run_dir / BEGUN_FILE, text.encode())
    replace_file(run_dir / PLAN_FILE, encode_plan(plan))


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Say how the run stands."""
    replace_file(run_dir / STATE_FILE, msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def read_record(run_dir: Path) -> RunRecord:
    """How the run stands. Raises `OSError` or `msgspec.DecodeError`."""
    return msgspec.json.decode((run_dir / STATE_FILE).read_bytes(), type=RunRecord)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Lines of text, all or none of them; they are with the operating system on return.

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
    """The totals of the run."""
    replace_file(run_dir / SUMMARY_FILE, msgspec.json.format(msgspec.json.encode(summary)) + b"\n")


def final_model_path(run_dir: Path) -> Path | None:
    """The trained model in Hugging Face format, if the learner has written it."""
    path = run_dir / MODEL_DIR
    return path if (path / "config.json").is_file() else None
