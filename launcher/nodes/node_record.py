"""The record of a keeper and its processes on disk, `nodes/NODE.json`, and the keeper's lock.

A process is the recorded one if both its pid and its start time match, because pids are reused. It belongs to *this*
run only if the record was written in this run directory and the arguments of the process name it: a copy of the
directory of a live run has records of foreign processes.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from darts_async.topology.run_files import NODES_DIR
from darts_async.wire.atomic_file import replace_json
from launcher.nodes.supervisor import ProcessRecord, end_session
from launcher.run_dir.place import check_place, inode_of

_SAME_START_WITHIN_S = 1.0
"""Tolerance of start times: the kernel counts from boot, whose time is only known to a fraction of a second."""


class NodeRecord(msgspec.Struct, frozen=True):
    """A keeper, its agent and its processes. `life` is the number of the launcher's start."""

    life: int
    inode: int
    """Inode of the run directory in which this was written."""
    keeper: ProcessRecord
    agent: ProcessRecord | None = None
    agent_incarnation: int = 0
    """The newest incarnation of the node's agent, across keepers."""
    processes: list[ProcessRecord] = []


def record_path(run_dir: Path, node: str) -> Path:
    return run_dir / NODES_DIR / f"{node}.json"


def write_node_record(run_dir: Path, node: str, record: NodeRecord) -> None:
    """Replace the record of a node. Raises `NoSpaceError`, and `OSError` if this is not the run directory any more."""
    check_place(run_dir, record.inode)
    path = record_path(run_dir, node)
    path.parent.mkdir(exist_ok=True)
    replace_json(path, record)


def read_node_record(run_dir: Path, node: str) -> NodeRecord | None:
    """The record of the last keeper of a node in this directory. None if it is unreadable, or came here with a copy."""
    try:
        record = msgspec.json.decode(record_path(run_dir, node).read_bytes(), type=NodeRecord)
        return record if record.inode == inode_of(run_dir) else None
    except (OSError, msgspec.DecodeError):
        return None


def find_process(run_dir: Path, record: ProcessRecord) -> psutil.Process | None:
    """The recorded process, if it runs on this machine, for this run directory."""
    try:
        process = psutil.Process(record.pid)
        is_same = abs(process.create_time() - record.started_at_s) <= _SAME_START_WITHIN_S
        return process if is_same and runs(process) and _serves(process, run_dir) else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _serves(process: psutil.Process, run_dir: Path) -> bool:
    words = process.cmdline()
    if "--run-dir" not in words[:-1]:
        return False
    named = Path(process.cwd(), words[words.index("--run-dir") + 1])
    try:
        return named.samefile(run_dir)
    except OSError:
        return False


def runs(process: psutil.Process) -> bool:
    """Whether the process is alive; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def end_leftovers(run_dir: Path, record: NodeRecord) -> None:
    """End the processes of an earlier keeper that the kernel has not ended."""
    for left in (*record.processes, *([record.agent] if record.agent else [])):
        if find_process(run_dir, left) is not None:
            await end_session(left.pid)


@contextlib.contextmanager
def locked(run_dir: Path, node: str) -> Iterator[bool]:
    """Whether this process is the only keeper of the node, until it leaves the block."""
    descriptor = os.open(run_dir / NODES_DIR / f"{node}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
