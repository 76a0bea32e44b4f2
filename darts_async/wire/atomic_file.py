"""Files that survive a power loss. A file is flushed before it gets its name, because the name may survive without the
contents, and its directory afterwards, because the old file may come back."""

import os
from pathlib import Path
from typing import Any

import msgspec

from darts_async.errors import NoSpaceError
from darts_async.machine.full_disk import is_no_space, room_of


def flush(path: Path) -> None:
    """Return when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it and move it there: a reader sees the old one or the new one, also after a
    power loss.

    Raises:
        NoSpaceError: the disk is full; the old one is there, and nothing of the new one.
        OSError: it cannot be written for another reason.
    """
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(data)
        flush(beside)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if not is_no_space(error):
            raise
        raise NoSpaceError(f"{path.name} cannot be written: {room_of(path)}") from error
    flush(path.parent)


def replace_json(path: Path, value: Any) -> None:
    """Replace a file by a struct as indented JSON. Raises what `replace_file` does."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
