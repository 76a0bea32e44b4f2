"""What processes print, in files of bounded size.

A process holds its file open, so a full one cannot be put away: it is copied to the older one (`older_path`), in the
place of the one before, and emptied. What is printed in the moment between the two is lost, and all of it where the
disk does not take the copy. The process appends, so it goes on at the beginning.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from darts_async.topology.run_files import older_path, output_path


def bound_outputs(logs_dir: Path, names: Iterable[str], max_bytes: int) -> None:
    """Bound what each of these processes has printed: both of its files together."""
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
