"""Writes and reads files with one JSON object per line, `metrics.jsonl` and `events.jsonl`, and flushes them.

No line is lost to a full disk. A kill may tear the last line, and a disk may damage any line. A damaged line is skipped
and counted.
"""

import asyncio
import contextlib
import json
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
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
    parsed = [parsed_line(line) for line in data[:end].splitlines()]
    good = [line for line in parsed if line is not None]
    return Lines(good, len(parsed) - len(good), begin + end)


def whole_lines(path: Path) -> Lines:
    """The same, and cut off a torn last line from the file. Raises `OSError`."""
    lines = read_lines(path)
    if path.exists() and path.stat().st_size > lines.num_bytes:
        os.truncate(path, lines.num_bytes)
    return lines


def parsed_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line, or None if the line is damaged."""
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
