"""Gives each process a directory for temporary files, which is removed when the process ends.

Otherwise the files of a killed process would stay forever (sockets of vLLM's engine core, files of a reward function).
`TMPDIR` points to the directory. The parent of the process holds a lock on it, and the kernel releases the lock when
the parent dies. So a directory without a lock belongs to no living process, whichever run it was made for: `sweep`
removes all of these. Every keeper sweeps when it starts, and every launcher when the keeper of its own machine has
ended. A pid in the name would not identify the owner: pids are reused, and containers that share a directory have equal
ones.

The name tells of which run and node a directory is.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LONGEST_BASE = 40
"""The path of a Unix socket has at most 107 bytes, of which vLLM needs 37."""
_SHORT_BASE = Path("/tmp")
_NAME = re.compile(r"darts-[0-9a-f]{8}-[a-z0-9_]{8}")


@dataclass(frozen=True, slots=True)
class Scratch:
    """A directory that this process holds."""

    path: Path
    _descriptor: int

    @classmethod
    def make(cls, owner: str) -> Self:
        """A new one; see `owner_of`. Raises `OSError`."""
        while True:
            path = Path(tempfile.mkdtemp(prefix=_prefix(owner), dir=_base()))
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # a sweep has been faster
                return cls(path, _hold(path, if_possible=True))

    def remove(self) -> None:
        """With all that is in it; what cannot be removed stays. Once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def owner_of(run_dir: Path, node: str) -> str:
    """The owner of the directories of a node's processes, as text."""
    return f"{run_dir.resolve()} {run_dir.stat().st_ino} {node}"


def sweep() -> None:
    """Remove the directories without a lock, as far as this user may."""
    for path in _all("darts-*"):
        if _NAME.fullmatch(path.name):
            with contextlib.suppress(OSError):  # it is held, gone, or of somebody else
                descriptor = _hold(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


def all_of(owner: str) -> list[Path]:
    """What there is of an owner, wherever it may be."""
    return sorted(_all(f"{_prefix(owner)}*"))


def _all(pattern: str) -> Iterator[Path]:
    return (path for base in {_base(), _SHORT_BASE} for path in base.glob(pattern))


def _hold(path: Path, *, if_possible: bool = False) -> int:
    """A descriptor with the lock of a directory; or without, `if_possible`, on a file system that knows no locks of
    directories: nothing is swept there. Raises `BlockingIOError` if another has the lock, and other `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.stat()  # one that was swept before the lock was taken is gone
    except OSError as error:
        if not if_possible or isinstance(error, (BlockingIOError, FileNotFoundError)):
            os.close(descriptor)
            raise
    return descriptor


def _prefix(owner: str) -> str:
    return f"darts-{hashlib.sha256(owner.encode()).hexdigest()[:8]}-"


def _base() -> Path:
    base = Path(tempfile.gettempdir())
    return base if len(str(base)) <= _LONGEST_BASE else _SHORT_BASE
