"""The directory of a program: made and locked, measured, and removed.

A worker that is killed leaves its directory. The kernel drops the lock with the process that had it, so a directory
without a lock has lost its worker: `remove_orphans` removes it.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

PREFIX = "darts-sandbox-"
_REMOVED_WITHIN_S = 10.0
_LOCKED_WITHIN_S = 60.0
"""A younger directory may be one that its worker has not locked yet."""
_BYTES_PER_ENTRY = 4096
"""What a file costs a file system even if it is empty. So no number of files makes the measurement long."""


@contextlib.contextmanager
def own_directory(place: str) -> Iterator[Path]:
    """A directory that is removed afterwards, whatever a program has left in it."""
    made = tempfile.TemporaryDirectory(prefix=PREFIX, dir=place, ignore_cleanup_errors=True)
    lock = os.open(made.name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(made.name)
    finally:
        os.close(lock)
        try:
            made.cleanup()
        except RecursionError:  # deeper than Python can follow
            _remove_deep(made.name)


def bytes_in(directory: Path, enough_bytes: int) -> float:
    """What files in a directory occupy; of more than `enough_bytes` some, and infinity if a program hides a part."""
    total, unseen = 0.0, [str(directory)]
    while unseen and total <= enough_bytes:
        try:
            with os.scandir(unseen.pop()) as entries:
                for entry in entries:
                    total += _BYTES_PER_ENTRY + _occupied(entry)
                    if total > enough_bytes:
                        break
                    if entry.is_dir(follow_symlinks=False):
                        unseen.append(entry.path)
        except FileNotFoundError:  # the program has just removed it
            continue
        except OSError:  # unreadable, or deeper than a path can be
            return float("inf")
    return total


def _occupied(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:
        return 0


def remove_orphans(places: Iterable[str]) -> int:
    """Remove the directories whose workers have ended, and return their number. Those of other users stay."""
    return sum(_remove_orphan(path) for place in set(places) for path in Path(place).glob(f"{PREFIX}*"))


def _remove_orphan(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it has just gone, or is of another user, or is a link
        return False
    try:
        if time.time() - os.fstat(lock).st_mtime < _LOCKED_WITHIN_S:
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            shutil.rmtree(path, ignore_errors=True)
        except RecursionError:
            _remove_deep(str(path))
    except BlockingIOError:  # its worker lives
        return False
    finally:
        os.close(lock)
    return not path.exists()


def _remove_deep(path: str) -> None:
    subprocess.run(["rm", "-rf", "--", path], check=False, timeout=_REMOVED_WITHIN_S)
