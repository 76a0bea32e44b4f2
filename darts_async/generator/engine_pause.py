"""Pauses the owner of an engine between two steps, so that another task can install weights.

    async with hold() as still:           # waits for the boundary; tokens decoded so far are on their way
        ...                               # only you call the engine
        still.policy_version = version    # what the next tokens are stamped with
    still.stall_s                         # how long it paused

An `EngineError` in the body means that the engine must not make another step: its owner is no longer woken.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from darts_async.generator.events import StepEvents
from darts_async.weights.receiving.transfer import LocalTransfer


class Stillness:
    """One pause. `deliver` sends what was decoded before it, which is still of the old version."""

    def __init__(self, deliver: Callable[[StepEvents], None]) -> None:
        self.deliver = deliver
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        self.policy_version: int | None = None
        self.stall_s = 0.0


Hold = Callable[[], AbstractAsyncContextManager[Stillness]]


def local_transfer(hold: Hold, interface: str, load: Callable[[dict[str, Any], int], Awaitable[None]]) -> LocalTransfer:
    """The transfer of an engine in this process; `load` copies tensors into it while its owner is paused."""

    async def apply(tensors: dict[str, Any], policy_version: int) -> float:
        async with hold() as still:
            await load(tensors, policy_version)
            still.policy_version = policy_version
        return still.stall_s

    return LocalTransfer(interface, apply)
