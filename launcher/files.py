"""Files that are rewritten while others read them."""

import os
from pathlib import Path

from darts_async.disk import is_no_space, room_of
from darts_async.errors import NoSpaceError


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there: a reader sees the old one or the new one.

    Raises:
        NoSpaceError: the disk is full; the old one is there, and nothing of the new one.
        OSError: it cannot be written for another reason.
    """
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if not is_no_space(error):
            raise
        raise NoSpaceError(f"{path.name} cannot be written: {room_of(path)}") from error
