"""Reads files with one JSON object per line, `metrics.jsonl` and `events.jsonl`, and flushes them while they grow.

A kill may tear the last line, and a disk may damage any line. A damaged line is skipped and counted.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts_async.wire.atomic_file import flush

FLUSH_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Lines:
    objects: list[dict[str, Any]]
    num_bad: int
    """Complete lines that are not a JSON object with a `type`, or whose `elapsed_s` is not a number."""
    num_bytes: int
    """Where the complete lines end, from the beginning of the file; the rest is torn."""


def read_lines(path: Path, begin: int = 0, max_bytes: int = -1) -> Lines:
    """All complete lines of a file after its first `begin` bytes; none if it does not exist. Raises `OSError`.

    With `max_bytes` only those that end within so many bytes.
    """
    try:
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(max_bytes)
    except FileNotFoundError:
        return Lines([], 0, 0)
    end = data.rfind(b"\n") + 1
    parsed = [_parsed(line) for line in data[:end].splitlines()]
    good = [line for line in parsed if line is not None]
    return Lines(good, len(parsed) - len(good), begin + end)


def whole_lines(path: Path) -> Lines:
    """The same, and cut off a torn last line from the file. Raises `OSError`."""
    lines = read_lines(path)
    if path.exists() and path.stat().st_size > lines.num_bytes:
        os.truncate(path, lines.num_bytes)
    return lines


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # also for bytes that are not text
        return None
    is_good = isinstance(value, dict) and isinstance(value.get("type"), str)
    return value if is_good and isinstance(value.get("elapsed_s", 0.0), int | float) else None


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
