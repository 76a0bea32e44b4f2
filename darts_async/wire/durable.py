"""Files that survive a power loss: what is written is with the operating system, and on the disk once it was flushed.

The order matters for renames: a file is flushed before it gets its name, or the name may survive without the contents,
and the directory is flushed after it, or the old file may come back.
"""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it and move it there: a reader sees the old one or the new one, also after a
    power loss."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    flush(path.parent)
