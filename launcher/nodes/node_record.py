"""What a keeper leaves on disk of itself and of what it has started: `nodes/NODE.json`, and the lock that it holds.

A process is the recorded one if it has that pid and was started at that time: pids are used again. It is one of *this*
run only if the record was written in this run directory and the arguments of the process name it. A copy of the
directory of a live run holds records too, of processes that are none of its own.
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
from launcher.run_dir.run_dir import inode_of

_SAME_START_WITHIN_S = 1.0
"""The kernel counts from the boot, and the time of the boot is known to a fraction of a second."""


class NodeRecord(msgspec.Struct, frozen=True):
    """A keeper, its agent and its processes. `life` is which start of the launcher the keeper belongs to."""

    life: int
    inode: int
    """Of the run directory that this was written in."""
    keeper: ProcessRecord
    agent: ProcessRecord | None = None
    agent_incarnation: int = 0
    """Of the newest agent of this node that any keeper has started."""
    processes: list[ProcessRecord] = []


def record_path(run_dir: Path, node: str) -> Path:
    """Where a node's record is."""
    return run_dir / NODES_DIR / f"{node}.json"


def write_node_record(run_dir: Path, node: str, record: NodeRecord) -> None:
    """Replace the record of a node."""
    replace_json(record_path(run_dir, node), record)


def read_node_record(run_dir: Path, node: str) -> NodeRecord | None:
    """The record that the last keeper of a node has left in this directory; None without one that can be read, and
    for one that came here with a copy."""
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
    """Whether it has not ended; a zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def end_leftovers(run_dir: Path, record: NodeRecord) -> None:
    """End what an earlier keeper has started and the kernel has not ended with it."""
    for left in (*record.processes, *([record.agent] if record.agent else [])):
        if find_process(run_dir, left) is not None:
            await end_session(left.pid)


@contextlib.contextmanager
def locked(run_dir: Path, node: str) -> Iterator[bool]:
    """Whether this process is the one keeper of the node; it is until it leaves the block or ends."""
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
