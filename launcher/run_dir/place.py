"""Tells a run directory from its copies, and from another that was put in its place."""

import errno
from pathlib import Path


def inode_of(run_dir: Path) -> int:
    """What tells a run directory from its copies, and stays through a rename. Raises `OSError`."""
    return run_dir.stat().st_ino


def check_place(run_dir: Path, inode: int) -> None:
    """Raises `OSError` if the run directory with this inode has been moved or removed; another one may be there."""
    if inode_of(run_dir) != inode:
        raise FileNotFoundError(errno.ENOENT, "another directory is in its place", str(run_dir))
