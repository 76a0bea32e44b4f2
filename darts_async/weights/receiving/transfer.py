"""The interface of the part of a generator that receives and applies weights.

A transfer is the part of a generator that is in the broadcast group: in this process (`LocalTransfer`), or in the
worker processes of an engine (`darts_async.generator.vllm.weights`), where each worker is a rank. It gets commands and
reports their results. `Member` converses with the learner and recognises late messages.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import torch

from darts_async.protocol import UpdateCommitted
from darts_async.weights.receiving.member import Command, Report
from darts_async.weights.receiving.receiving_rank import Rank
from darts_async.weights.receiving.staging import Staging


class Transfer(Protocol):
    """All methods are called on one event loop. Every command belongs to the group of the last `EpochFormed`."""

    @property
    def num_ranks(self) -> int:
        """Its number of ranks in the broadcast group."""

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        """Get ready for commands. `report` is called on the event loop; errors in `tasks` end the generator."""

    def handle(self, command: Command) -> None:
        """Join a group, receive and hold an update, or leave the group. Returns at once.

        `UpdateReady` and `UpdateStaged` are reported once all ranks have reached this point. `UpdateFailed` is reported
        when a rank cannot continue, and the group must be left. `apply` follows `UpdateCommitted`, whatever comes in
        between.
        """

    async def apply(self, policy_version: int) -> float:
        """Use the committed weights from the next step boundary on. Returns how long decoding paused, in seconds.

        Raises:
            WeightUpdateError: it failed, and the weights in use are unchanged.
            EngineError: it failed, and the weights in use are torn.
        """

    async def close(self, deadline_s: float) -> None:
        """Leave the group, and release all threads, sockets and memory. Raises `DeadlineError` if a thread hangs."""


class LocalTransfer:
    """One rank, in this process.

    Args:
        interface: local address that the collective's sockets bind to.
        apply: copies the tensors into the engine at a step boundary, stamps later tokens with the version, and returns
            how long decoding paused, in seconds. The tensors are only valid until it returns. A `WeightUpdateError`
            means that the weights in use are unchanged.
    """

    num_ranks = 1

    def __init__(self, interface: str, apply: Callable[[dict[str, torch.Tensor], int], Awaitable[float]]) -> None:
        self._interface = interface
        self._apply = apply
        self._rank: Rank | None = None
        self._committed: Staging | None = None

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        self._rank = Rank(self._interface, report)

    def handle(self, command: Command) -> None:
        assert self._rank is not None, "it was opened"
        if isinstance(command, UpdateCommitted):
            self._committed = self._rank.take(command)
        else:
            self._rank.handle(command)

    async def apply(self, policy_version: int) -> float:
        assert self._rank is not None
        assert self._committed is not None
        staging, self._committed = self._committed, None
        try:
            return await self._apply(staging.tensors, policy_version)
        finally:
            self._rank.give_back(staging)

    async def close(self, deadline_s: float) -> None:
        if self._rank is not None:
            await self._rank.close(deadline_s)
