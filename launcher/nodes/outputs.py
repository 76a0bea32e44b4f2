"""Bounds the size of the files with the output of processes.

A process keeps its file open, so a full file is not renamed: it is copied over the older file (`older_path`) and
emptied. Output between these two operations is lost; if the disk has no space for the copy, all of the file is lost.
The process appends, so it continues at the beginning.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from darts_async.topology.run_files import older_path, output_path


def bound_outputs(logs_dir: Path, names: Iterable[str], max_bytes: int) -> None:
    """Bound the output of each of these processes, both of its files together."""
    for name in names:
        _bound(output_path(logs_dir, name), max_bytes // 2)


def _bound(path: Path, max_bytes: int) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError:
        return
    if num_bytes <= max_bytes:
        return
    older = older_path(path)
    try:
        with path.open("rb") as file, older.open("wb") as copy:
            file.seek(-max_bytes, os.SEEK_END)
            shutil.copyfileobj(file, copy)
    except OSError:
        older.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, 0)
