"""Makes the child processes of vLLM end with this process.

vLLM's engine core is a child that does not notice when its parent is killed: it runs forever and keeps its GPU. While
`binding_children` is active, every child that is forked asks the kernel first thing to be killed with its parent, and
so do the workers that it forks in turn. (The kernel means the parent *thread*: start the engine from one that lives as
long as the engine.)

A forked child also inherits the pipe through which Python tells the parent's event loop of signals; a signal sent to
the child would be handled by the parent. The child lets go of it.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

from darts_async.machine.lifetime import die_with_parent

_NOBODY: Final = 0


class _Forks:
    """Bookkeeping of the hooks, which cannot be taken back once they are registered."""

    def __init__(self) -> None:
        self.are_bound = False
        self._forking_pid = _NOBODY
        os.register_at_fork(before=self._before, after_in_child=self._in_child)

    def _before(self) -> None:
        self._forking_pid = os.getpid()

    def _in_child(self) -> None:
        if self.are_bound:
            signal.set_wakeup_fd(-1)
            die_with_parent(self._forking_pid)


@cache
def _forks() -> _Forks:
    return _Forks()


@contextmanager
def binding_children() -> Iterator[None]:
    """Children forked meanwhile, by whatever thread, and their own forks die with their parents."""
    forks = _forks()
    forks.are_bound = True
    try:
        yield
    finally:
        forks.are_bound = False
