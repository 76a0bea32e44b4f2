"""Finds, measures and ends the descendants of a process.

A process whose parent has ended becomes a child of the nearest subreaper above it. So no descendant of a subreaper
escapes, even with new sessions and forks. When a subreaper has no child left, it has no descendant left.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")
_LISTS_CHILDREN = (_PROC / "thread-self" / "children").exists()
"""Some kernels are built without this file; then the parents of all processes are checked."""
_GONE = (FileNotFoundError, ProcessLookupError)
"""Errors which mean that a process has just ended."""


def become_subreaper() -> None:
    """Orphans below this process become its children. Does nothing on systems other than Linux."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error)}")


def descendants(pid: int, enough: int = sys.maxsize) -> list[int]:
    """All descendants of a process, the nearest first; of more than `enough` some, because a process that forks without
    end does so faster than its descendants are counted."""
    found, unseen = list[int](), [pid]
    while unseen and len(found) <= enough:
        children = [child for parent in unseen for child in _children(parent)]
        found += children
        unseen = children
    return found


def memory_bytes(pids: list[int], enough_bytes: int) -> int:
    """Memory of processes without file pages; shared pages count once.

    Exact only above `enough_bytes`, because the exact number is slow: the kernel counts page by page.
    """
    resident = sum(_read(pid, _resident_bytes) for pid in pids)
    return resident if resident <= enough_bytes else sum(_read(pid, _own_bytes) for pid in pids)


def kill_descendants(within_s: float) -> bool:
    """End and reap all descendants of this process, which is a subreaper. Returns whether none is left."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        for pid in descendants(os.getpid()):
            _kill(pid)
        if not _reap():
            return True
        time.sleep(0.002)
    return False


def kill_marked(variable: str, value: str) -> None:
    """End every process with this environment variable: the descendants of a killed subreaper."""
    entry = f"{variable}={value}".encode()
    for pid in _all_pids():
        try:
            is_marked = entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:  # of another user, or already ended
            continue
        if is_marked and pid != os.getpid():
            _kill(pid)


def kill_strays(known: Collection[int]) -> bool:
    """End the children that this process, a subreaper, has inherited from a killed one. Their own children follow in
    later calls. Returns whether there were any.

    Args:
        known: the children that this process has started.
    """
    strays = set(_children(os.getpid())) - set(known)
    for pid in strays:
        for each in (pid, *descendants(pid)):
            _kill(each)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return bool(strays)


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()] if _PROC.is_dir() else []


def _children(pid: int) -> list[int]:
    if not _LISTS_CHILDREN:
        return [child for child in _all_pids() if _parent_of(child) == pid]
    children = list[int]()
    threads = _PROC / str(pid) / "task"
    with contextlib.suppress(*_GONE):  # the process may end at any moment, and its threads before it
        for thread in os.listdir(threads):
            with contextlib.suppress(*_GONE):
                children += map(int, (threads / thread / "children").read_text().split())
    return children


def _parent_of(pid: int) -> int | None:
    try:
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except _GONE:
        return None


def _read(pid: int, measure: Callable[[Path], int]) -> int:
    try:
        return measure(_PROC / str(pid))
    except (*_GONE, PermissionError):
        return 0


def _resident_bytes(directory: Path) -> int:
    return int((directory / "statm").read_text().split()[1]) * _PAGE_BYTES


def _own_bytes(directory: Path) -> int:
    lines = (directory / "smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap() -> bool:
    """Reap ended children. Returns whether there are children left."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return True
        except ChildProcessError:
            return False
