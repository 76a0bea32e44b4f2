"""Files that grow: on the disk soon after they were written."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from darts_async.wire.atomic_file import flush

FLUSH_EVERY_S = 1.0


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
