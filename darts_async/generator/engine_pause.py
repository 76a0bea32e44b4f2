"""Pauses the owner of an engine between two steps, so that another task can install weights.

    async with hold() as pause:           # waits for the boundary; tokens decoded so far are on their way
        ...                               # only you call the engine
        pause.policy_version = version    # what the next tokens are stamped with
    pause.stall_s                         # how long it was

An `EngineError` in the body means that the engine must not make another step: its owner is no longer woken.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from darts_async.generator.engine import StepEvents
from darts_async.weights.receiving.transfer import LocalTransfer


class Pause:
    """One pause. `deliver` sends what was decoded before it, which is still of the old version."""

    def __init__(self, deliver: Callable[[StepEvents], None]) -> None:
        self.deliver = deliver
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        self.policy_version: int | None = None
        self.stall_s = 0.0


Hold = Callable[[], AbstractAsyncContextManager[Pause]]


def local_transfer(hold: Hold, interface: str, load: Callable[[dict[str, Any], int], Awaitable[None]]) -> LocalTransfer:
    """The transfer of an engine in this process; `load` copies tensors into it while its owner is paused."""

    async def apply(tensors: dict[str, Any], policy_version: int) -> float:
        async with hold() as pause:
            await load(tensors, policy_version)
            pause.policy_version = policy_version
        return pause.stall_s

    return LocalTransfer(interface, apply)
