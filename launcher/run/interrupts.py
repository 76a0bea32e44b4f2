"""Catches the signals that end a run in order: Ctrl-C, SIGTERM, and SIGHUP (the terminal was closed).

They are caught until all processes of the run have ended, so a late signal does no harm. If SIGHUP is ignored
(`nohup`), it stays ignored.

A run does not fail because its terminal or pipe is gone, or because its output is on a full disk: the output is lost.
"""

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GONE = (errno.EPIPE, errno.EIO)
_MOST = 16


class CaughtSignals:
    """Signals that have arrived, in order; at most a few."""

    def __init__(self) -> None:
        self._unheard = deque[signal.Signals](maxlen=_MOST)
        self._hear: Callable[[signal.Signals], None] = self._unheard.append

    def come(self, number: signal.Signals) -> None:
        self._hear(number)

    def tell(self, hear: Callable[[signal.Signals], None]) -> None:
        """Report the signals that have arrived, and from now on each signal at once."""
        self._hear = hear
        while self._unheard:
            hear(self._unheard.popleft())

    def keep(self) -> None:
        """From now on keep signals for the next caller that asks for them."""
        self._hear = self._unheard.append

    def ignore(self) -> None:
        self._hear = lambda number: None


@contextlib.contextmanager
def caught_signals(*, ignored_afterwards: bool = False) -> Iterator[CaughtSignals]:
    """Inside the block, none of them ends the process; nor later on, if `ignored_afterwards`."""
    loop, caught = asyncio.get_running_loop(), CaughtSignals()
    is_under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in _ENDING if not (is_under_nohup and number == signal.SIGHUP)]
    for number in numbers:
        loop.add_signal_handler(number, caught.come, number)
    try:
        yield caught
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            if ignored_afterwards:
                signal.signal(number, signal.SIG_IGN)


def reason_of(number: signal.Signals) -> str:
    """Why the run was stopped, in words."""
    names = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP (the terminal was closed)"}
    return f"stopped by {names.get(number, number.name)}"


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Inside the block, writing to standard output and standard error never fails."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Outliving(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Outliving:
    """A stream that discards its output once its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:  # otherwise the interpreter fails to flush it at exit
                _discard(self._stream.fileno())


def _discard(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
