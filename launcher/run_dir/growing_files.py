"""Files that grow: on the disk soon after they were written."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from darts_async.wire.atomic_file import flush

FLUSH_EVERY_S = 1.0


@contextlib.asynccontextmanager
async def flushed(*paths: Path) -> AsyncIterator[None]:
    """Inside, files that others append to are flushed to the disk about once a second, by a thread; and at the end."""
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
        with contextlib.suppress(OSError):  # it is not there yet; or the next line that is written says what is wrong
            flush(path)
