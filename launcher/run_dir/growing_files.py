"""Files that grow: no line is lost to a full disk, and each is on the disk soon after it was written."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from darts_async.errors import NoSpaceError
from darts_async.wire.atomic_file import flush
from launcher.run_dir.run_dir import append_lines

FLUSH_EVERY_S = 1.0
MAX_UNWRITTEN: Final = 10_000
"""Lines of a file that are kept for a disk that is full; the oldest are left out beyond that."""


class JsonLines:
    """JSON objects, one per line. What the disk does not take is written before the next line, or by `settle`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: deque[str] = deque(maxlen=MAX_UNWRITTEN)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self._unwritten.append(json.dumps(line))
        self.settle()

    def settle(self) -> str:
        """Write what the disk did not take before. Returns why it still does not, or nothing."""
        try:
            if self._unwritten:
                append_lines(self._path, self._unwritten)
        except NoSpaceError as error:
            return str(error)
        self._unwritten.clear()
        return ""


@contextlib.asynccontextmanager
async def flushed(*paths: Path) -> AsyncIterator[None]:
    """Inside the block, a thread flushes these files to the disk about once a second; also at the end."""
    task = asyncio.create_task(_keep_flushed(paths), name="flush")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        _flush_all(paths)


async def _keep_flushed(paths: tuple[Path, ...]) -> None:
    while True:
        await asyncio.sleep(FLUSH_EVERY_S)
        await asyncio.to_thread(_flush_all, paths)


def _flush_all(paths: tuple[Path, ...]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # it does not exist yet, or the next write reports the error
            flush(path)
