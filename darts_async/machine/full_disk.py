"""Detects, reports and survives a full file system.

A record is appended completely or not at all. A process that needs space either waits for it, outside the event loop
(`Patience`), or ends with `NO_SPACE_EXIT_CODE`; the launcher then restarts it as soon as there is space.
"""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from darts_async.errors import PERMANENT_ERRORS, DartsError, NoSpaceError

POLL_S = 0.5
"""How often to check for space."""
RETRY_S = 30.0
"""When to try a write again even without visible space, because a quota is invisible."""
TRIAL_BYTES = 1 << 20
"""A file system is full if it has no space for a file of this size."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded")
"""Texts in the errors of libraries that write files."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Room:
    """The free space of a file system; `mount` is its directory."""

    mount: Path
    free_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        free_mb, total_mb = self.free_bytes / 2**20, self.total_bytes / 2**20
        return f"no space left on {self.mount} ({free_mb:,.1f} of {total_mb:,.1f} MiB free)"


def room_of(path: Path) -> Room:
    """The free space of the file system of a file, which need not exist."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    found, device = os.statvfs(place), place.stat().st_dev
    inside = [place, *(parent for parent in place.parents if parent.stat().st_dev == device)]
    return Room(inside[-1], found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def has_room(directory: Path) -> bool:
    """Whether a directory has space for a file of `TRIAL_BYTES`. It tries, because a quota shows nowhere else."""
    trial = directory / f".room-{os.getpid()}"
    try:
        descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, TRIAL_BYTES)
        finally:
            os.close(descriptor)
            trial.unlink()
    except OSError as error:
        return not is_no_space(error)
    return True


def is_no_space(error: BaseException | None) -> bool:
    """Whether a full file system caused an error. A user's mistake never counts."""
    if error is None or isinstance(error, PERMANENT_ERRORS):
        return False
    if isinstance(error, NoSpaceError) or (isinstance(error, OSError) and error.errno in _FULL):
        return True
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_no_space, error.exceptions))
    in_words = not isinstance(error, DartsError) and any(words in str(error) for words in _FULL_IN_WORDS)
    return in_words or is_no_space(error.__cause__)


def append_whole(descriptor: int, data: bytes, path: Path) -> None:
    """Append all of the data or none: a partial write is cut off again. Raises `NoSpaceError` if the file system of
    `path`, the file, is full, and `OSError` for another reason."""
    num_bytes, left = os.fstat(descriptor).st_size, memoryview(data)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        os.ftruncate(descriptor, num_bytes)
        if not is_no_space(error):
            raise
        raise NoSpaceError(f"{path.name} cannot be written: {room_of(path)}") from error


class Patience:
    """Waits for space. `hindrance` says what the process waits for; it is empty otherwise."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: the longest wait."""
        self._timeout_s = timeout_s
        self.hindrance = ""

    def write(self, path: Path, write: Callable[[], T], undo: Callable[[], None]) -> T:
        """Call `write` repeatedly while the file system of `path` is full. It blocks, so do not call it on the loop.

        `undo` removes the remains of a failed try, because other processes need the space.

        Raises:
            NoSpaceError: there was no space in time.
        """
        deadline_s = time.monotonic() + self._timeout_s
        try:
            while True:
                try:
                    return write()
                except Exception as error:  # libraries wrap a full disk in their own errors; others are raised again
                    if not is_no_space(error):
                        raise
                    undo()
                    self._wait(path, deadline_s, error)
        finally:
            self.hindrance = ""

    def _wait(self, path: Path, deadline_s: float, error: Exception) -> None:
        """Wait until there is more space than at the last failure, or until the next try is due."""
        room = room_of(path)
        not_enough_bytes, again_at_s = room.free_bytes, time.monotonic() + RETRY_S
        while room.free_bytes < not_enough_bytes + TRIAL_BYTES and time.monotonic() < again_at_s:
            self.hindrance = str(room)
            if time.monotonic() >= deadline_s:
                raise NoSpaceError(f"{room} for {self._timeout_s:g} s") from error
            time.sleep(POLL_S)
            room = room_of(path)
