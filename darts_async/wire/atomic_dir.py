"""Writes directories that are complete or absent: beside their place, flushed to the disk, and then renamed.

A crash at any point leaves the old directory and no part of the new one. Later damage of a file is detected by its size
and its CRC-32.
"""

import shutil
import zlib
from pathlib import Path

import msgspec

from darts_async.wire.atomic_file import flush

_READ_BYTES = 1 << 22

_WRITING, _REMOVING = ".writing-", ".removing-"


def staging_beside(target: Path) -> Path:
    """The hidden directory beside `target` in which to write it."""
    return target.parent / f"{_WRITING}{target.name}"


def open_staging(target: Path) -> Path:
    """Create the staging directory. Files of a crashed run are removed."""
    staging = staging_beside(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def remove_staging(target: Path) -> None:
    """Remove the staging directory of `target`."""
    shutil.rmtree(staging_beside(target), ignore_errors=True)


def put_in_place(staging: Path) -> Path:
    """Flush a staged directory to the disk and rename it to its target, which is replaced."""
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
    """Hide a directory before it is removed, so that it is never seen half removed."""
    doomed = path.parent / f"{_REMOVING}{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    return path.rename(doomed)


def remove_leftovers(root: Path) -> None:
    """Remove what a crash has left half written or half removed. No other process may write there meanwhile."""
    for prefix in (_WRITING, _REMOVING):
        for path in root.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


class FileSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and checksum of a file."""

    num_bytes: int
    crc32: int


def file_sum(path: Path) -> FileSum:
    """Read a file, at about 1 GB/s; other threads run meanwhile."""
    crc32, num_bytes = 0, 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            crc32, num_bytes = zlib.crc32(piece, crc32), num_bytes + len(piece)
    return FileSum(num_bytes, crc32)
