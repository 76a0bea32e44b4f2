"""Reads the logs of processes as lines for people, and follows them.

A process has a structured log and a file of its output. Both are bounded: a full file replaces the older file
(`older_path`). A reader that follows a log first reads the older file to its end.

A process keeps the file of its output open, so `bound_outputs` copies a full file over the older one and empties it.
Output between these two operations is lost; without space for the copy, all of the file is lost. The process appends,
so it continues at the beginning.
"""

import contextlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from darts_async.topology.run_files import log_path, older_path, output_path
from launcher.terminal import printable

_CHUNK_BYTES = 1 << 20
_TAIL_BYTES = 16_384
_LAST_WORDS_LINES = 50
_LAST_WORDS_CHARS = 300
_FRESH_S = 60.0
"""Lines that a process printed longer ago do not explain its end."""


@dataclass(slots=True)
class LogTail:
    """The end of one log, which grows and need not exist yet."""

    path: Path
    label: str
    _inode: int | None = None
    _offset: int = 0
    _torn: bytes = field(default=b"")

    def new_lines(self) -> Iterator[str]:
        """The complete lines since the last call, at most a chunk of each file."""
        for path in (older_path(self.path), self.path):
            for line in self._read(path, is_older=path != self.path):
                yield from self._shown(line)

    def skip_to_last(self, num_lines: int) -> list[str]:
        """Read the log to its end, and return its last lines."""
        kept: deque[str] = deque(maxlen=num_lines)
        read_to: tuple[int | None, int] | None = None
        while read_to != (self._inode, self._offset):
            read_to = self._inode, self._offset
            kept.extend(self.new_lines())
        return list(kept)

    def _read(self, path: Path, *, is_older: bool) -> list[bytes]:
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if is_older and self._inode not in (None, found.st_ino):
                    return []  # already read
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset, self._torn = found.st_ino, 0, b""
                file.seek(self._offset)
                data = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        if len(self._torn) > _CHUNK_BYTES:  # the line may never end
            lines, self._torn = [*lines, self._torn], b""
        return lines

    def _shown(self, line: bytes) -> Iterator[str]:
        for part in readable_line(line.decode(errors="replace")).splitlines():
            if part.strip():
                yield f"{self.label}  {printable(part).rstrip()}"


def log_tails(logs_dir: Path, names: tuple[str, ...]) -> list[LogTail]:
    width = max(map(len, names))
    return [
        LogTail(path_of(logs_dir, name), name.ljust(width)) for name in names for path_of in (log_path, output_path)
    ]


def last_lines(logs_dir: Path, name: str, count: int) -> list[str]:
    """The last lines a process left: of its structured log, then of its output, without empty ones."""
    lines = _tail(log_path(logs_dir, name), count)
    logged = [part for line in lines for part in readable_line(line).splitlines()]
    return [printable(line) for line in (logged + _tail(output_path(logs_dir, name), count))[-count:]]


def last_words(logs_dir: Path, name: str) -> str:
    """Why a process that has just ended did so, by what it printed last: on one line, and empty if it said nothing."""
    path = output_path(logs_dir, name)
    try:
        if time.time() - path.stat().st_mtime > _FRESH_S:
            return ""
    except OSError:
        return ""
    lines = _tail(path, _LAST_WORDS_LINES)
    said = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]
    plain = [line.strip(" |") for line in lines if line.strip(" |+-^~")]  # of a group: framed
    return printable((said or plain or [""])[-1])[:_LAST_WORDS_CHARS]


def readable_line(line: str) -> str:
    """A line of the structured log as `level event key=value`."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(fields, dict):
        return line
    head = [str(fields.pop(key)) for key in ("level", "event") if key in fields]
    rest = [f"{key}={value}" for key, value in fields.items() if key not in ("timestamp", "process")]
    return " ".join(head + rest)


def _tail(path: Path, count: int) -> list[str]:
    """The last lines of a log, if necessary with the end of the older file before them."""
    text = "".join(_end_of(each) for each in (older_path(path), path))
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


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
