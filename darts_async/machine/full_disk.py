"""A file system that is full: how it is noticed, named and outlived.

A record is appended completely or not at all. A process that cannot go on without room either waits for it, off the
event loop (`Patience`), or ends with `NO_SPACE_EXIT_CODE`; the launcher then starts it again as soon as there is room.
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
"""How often it is looked whether there is room."""
RETRY_S = 30.0
"""When a write is tried again though no room was seen: a quota does not show."""
TRIAL_BYTES = 1 << 20
"""A file system that takes no file of this size has no room."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded")
"""What libraries that write files say, which raise errors of their own."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Room:
    """What is free on a file system; `mount` is its directory."""

    mount: Path
    free_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        free_mb, total_mb = self.free_bytes / 2**20, self.total_bytes / 2**20
        return f"no space left on {self.mount} ({free_mb:,.1f} of {total_mb:,.1f} MiB free)"


def room_of(path: Path) -> Room:
    """Of the file system that holds a file, or would hold it."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    found, device = os.statvfs(place), place.stat().st_dev
    inside = [place, *(parent for parent in place.parents if parent.stat().st_dev == device)]
    return Room(inside[-1], found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def has_room(directory: Path) -> bool:
    """Whether a directory takes a file of `TRIAL_BYTES`: it is tried, for a quota shows nowhere else."""
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
    """Whether an error comes of a full file system. A mistake of the user's never does."""
    if error is None or isinstance(error, PERMANENT_ERRORS):
        return False
    if isinstance(error, NoSpaceError) or (isinstance(error, OSError) and error.errno in _FULL):
        return True
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_no_space, error.exceptions))
    in_words = not isinstance(error, DartsError) and any(words in str(error) for words in _FULL_IN_WORDS)
    return in_words or is_no_space(error.__cause__)


def append_whole(descriptor: int, data: bytes, path: Path) -> None:
    """Append all of the data, or nothing of it: what was written of it is cut off again.

    Raises:
        NoSpaceError: the file system of `path`, the file, is full.
        OSError: it cannot be written for another reason.
    """
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
    """How a process waits for room. `hindrance` says what it waits for; it is empty while it does not."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: the longest wait."""
        self._timeout_s = timeout_s
        self.hindrance = ""

    def write(self, path: Path, write: Callable[[], T], undo: Callable[[], None]) -> T:
        """Call `write`, again and again while the file system of `path` is full. It blocks: not on the event loop.

        `undo` removes what a failed try has left, for others need that room meanwhile.

        Raises:
            NoSpaceError: there was no room in time.
        """
        deadline_s = time.monotonic() + self._timeout_s
        try:
            while True:
                try:
                    return write()
                except Exception as error:  # libraries wrap a full disk in their own; anything else is raised again
                    if not is_no_space(error):
                        raise
                    undo()
                    self._wait(path, deadline_s, error)
        finally:
            self.hindrance = ""

    def _wait(self, path: Path, deadline_s: float, error: Exception) -> None:
        """Until there is more room than what has just not been enough, or it may be worth another try."""
        room = room_of(path)
        not_enough_bytes, again_at_s = room.free_bytes, time.monotonic() + RETRY_S
        while room.free_bytes < not_enough_bytes + TRIAL_BYTES and time.monotonic() < again_at_s:
            self.hindrance = str(room)
            if time.monotonic() >= deadline_s:
                raise NoSpaceError(f"{room} for {self._timeout_s:g} s") from error
            time.sleep(POLL_S)
            room = room_of(path)
