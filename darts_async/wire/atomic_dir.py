"""Directories that are complete or absent: written beside their place, flushed to the disk, renamed, old ones removed.

A crash at any point leaves what was there before, and no half of anything new. What happens to a file later is found by
its size and its CRC-32, which misses one in four thousand million accidents.
"""

import shutil
import zlib
from pathlib import Path

import msgspec

from darts_async.wire.atomic_file import flush

_READ_BYTES = 1 << 22

_WRITING, _REMOVING = ".writing-", ".removing-"


def staging_beside(target: Path) -> Path:
    """Where a directory that will be `target` is to be written: hidden, beside it."""
    return target.parent / f"{_WRITING}{target.name}"


def open_staging(target: Path) -> Path:
    """Make it, empty: what a crashed run left there is removed."""
    staging = staging_beside(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def remove_staging(target: Path) -> None:
    """Remove what was being written to become `target`."""
    shutil.rmtree(staging_beside(target), ignore_errors=True)


def put_in_place(staging: Path) -> Path:
    """Flush a staged directory to the disk and give it its name, replacing what has that name."""
    for path in (*staging.iterdir(), staging):
        flush(path)
    target = staging.parent / staging.name.removeprefix(_WRITING)
    replaced = set_aside(target) if target.exists() else None
    staging.rename(target)
    flush(target.parent)
    if replaced:
        shutil.rmtree(replaced)
    return target


def set_aside(path: Path) -> Path:
    """Hide a directory that is to be removed, so that it is never seen half removed."""
    doomed = path.parent / f"{_REMOVING}{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    return path.rename(doomed)


def remove_leftovers(root: Path) -> None:
    """Remove what a crash has left half written or half removed. Nothing else writes there meanwhile."""
    for prefix in (_WRITING, _REMOVING):
        for path in root.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


class FileSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file is known by."""

    num_bytes: int
    crc32: int


def file_sum(path: Path) -> FileSum:
    """Read a file, at about 1 GB/s; other threads run meanwhile."""
    crc32, num_bytes = 0, 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            crc32, num_bytes = zlib.crc32(piece, crc32), num_bytes + len(piece)
    return FileSum(num_bytes, crc32)
