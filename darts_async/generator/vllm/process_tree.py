"""Makes the child processes of vLLM end with this process.

vLLM's engine core does not notice when its parent is killed: it runs forever and keeps its GPU. While
`binding_children` is active, every forked child first asks the kernel to be killed with its parent, and so do the
workers that it forks. (The kernel means the parent *thread*: start the engine from one that lives as long.)

A forked child also inherits the pipe through which Python reports signals to the parent's event loop. The child closes
it, because otherwise the parent would handle signals that are sent to the child.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from darts_async.machine.lifetime import die_with_parent


class _Forks:
    """The state of the hooks, which cannot be unregistered."""

    def __init__(self) -> None:
        self.are_bound = False
        self._forking_pid = 0
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
    """Children that any thread forks meanwhile, and their own forks, die with their parents."""
    forks = _forks()
    forks.are_bound = True
    try:
        yield
    finally:
        forks.are_bound = False
