"""Waits on an event loop until a condition is true, with a deadline."""

import asyncio
from collections.abc import Callable

from darts_async.errors import DeadlineError


class Changes:
    """Wakes all waiters whenever something has changed."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, is_true: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
        """Wait for a condition. Raises `DeadlineError`, with `what` was waited for, after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not is_true():
                    await self._changed.wait()
        except TimeoutError as error:
            raise DeadlineError(f"waited {timeout_s:g} s for {what()}") from error
