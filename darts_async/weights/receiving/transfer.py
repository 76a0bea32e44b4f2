"""Where the weights of an update arrive, and how they come into use.

A transfer is the part of a generator that is in the broadcast group: in this process (`LocalTransfer`), or in the
worker processes of an engine (`darts_async.generator.vllm.weights`), where each worker is a rank. It is told what the
learner said (`Command`) and says what came of it (`Report`); the conversation with the learner itself, and which
messages are out of date, is the business of `member`.
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
    """All methods are called on one event loop. Every command is of the group of the last `EpochFormed`."""

    @property
    def num_ranks(self) -> int:
        """Places in the broadcast group that it takes."""

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        """Get ready for commands. `report` is called on the event loop; errors in `tasks` end the generator."""

    def handle(self, command: Command) -> None:
        """Join a group, receive into side memory, hold on to what was received, leave the group. Returns at once.

        `UpdateReady` and `UpdateStaged` are reported once all ranks are as far; `UpdateFailed` when one cannot go on:
        the group is to be left. `UpdateCommitted` is followed by `apply`; what comes in between changes nothing to it.
        """

    async def apply(self, policy_version: int) -> float:
        """Use what was committed from the next step boundary on; returns for how long nothing was decoded, in seconds.

        Raises:
            WeightUpdateError: it could not be done; the weights in use are as they were.
            EngineError: it could not be done, and the weights in use are torn.
        """

    async def close(self, deadline_s: float) -> None:
        """Leave the group; no thread, socket or memory stays.

        Raises:
            DeadlineError: a thread hangs.
        """


class LocalTransfer:
    """One rank, in this process.

    Args:
        interface: local address that the collective's sockets bind to.
        apply: copies the tensors into the engine at a step boundary, stamps its tokens with the version from
            there on, and returns the time in seconds in which nothing was decoded. The tensors are only valid
            until it returns. A `WeightUpdateError` means that the weights in use are as they were.
    """

    def __init__(self, interface: str, apply: Callable[[dict[str, torch.Tensor], int], Awaitable[float]]) -> None:
        self._interface = interface
        self._apply = apply
        self._rank: Rank | None = None
        self._committed: Staging | None = None

    @property
    def num_ranks(self) -> int:
        """One."""
        return 1

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        """See `Transfer`."""
        self._rank = Rank(self._interface, report)

    def handle(self, command: Command) -> None:
        """See `Transfer`."""
        assert self._rank is not None, "it was opened"
        if isinstance(command, UpdateCommitted):
            self._committed = self._rank.take(command)
        else:
            self._rank.handle(command)

    async def apply(self, policy_version: int) -> float:
        """See `Transfer`."""
        assert self._rank is not None
        assert self._committed is not None
        staging, self._committed = self._committed, None
        try:
            return await self._apply(staging.tensors, policy_version)
        finally:
            self._rank.give_back(staging)

    async def close(self, deadline_s: float) -> None:
        """See `Transfer`."""
        if self._rank is not None:
            await self._rank.close(deadline_s)
