"""Weights of an update, received by vLLM's workers: the generator's side.

Each worker is a rank of the broadcast group. It is told here what the learner says, and says what came of it, over a
socket in a directory that only this user can enter; so the rendezvous never leaves the authenticated links, and nothing
of it passes through vLLM. What all workers have answered is one answer to the learner.

Staged weights are put in use while vLLM is paused between two steps, by one call. A direct update pauses vLLM from the
offer to the commit. If it breaks in between, the weights in use are torn: vLLM stays paused, its samples with it, until
an update, of this learner or of the next, has got through. In both cases what cannot be mended is an `EngineError`.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import structlog

from darts_async.config import WeightsConfig
from darts_async.errors import DeadlineError, EngineError
from darts_async.generator.engine_pause import Hold
from darts_async.generator.events import StepEvents
from darts_async.generator.vllm.worker_hub import Answers, WorkerLinks
from darts_async.protocol import EpochFormed, StoreValue, UpdateAborted, UpdateFailed, UpdateOffered
from darts_async.weights.receiving.member import Command, Report
from darts_async.weights.receiving.receiving_rank import TRANSFER_BACKSTOP

CONNECT_S: Final = 30.0
CALL_S: Final = 10.0
"""What a call to the workers may take beyond what it waits for."""

log = structlog.get_logger()


class WorkerEngine(Protocol):
    """What is needed of the engine (see `engine.VllmEngine`)."""

    @property
    def num_workers(self) -> int:
        """Processes, or GPUs, that the model is spread over."""

    async def call_workers(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        """Call a method of the worker extension on each worker."""

    def paused(self, *, clear_cache: bool) -> AbstractAsyncContextManager[None]:
        """Hold vLLM between two steps."""

    def take(self) -> StepEvents:
        """What was decoded before the pause."""

    async def set_policy_version(self, policy_version: int) -> None:
        """Say which weights are in use."""


def worker_transfer(engine: WorkerEngine, hold: Hold, interface: str, config: WeightsConfig) -> "WorkerTransfer":
    """As the settings want it.

    Args:
        hold: stops the engine's owner between two steps.
        interface: local address that the collective's sockets bind to.
    """
    kind = DirectTransfer if config.receive == "direct" else StagedTransfer
    return kind(engine, hold, interface, config)


class WorkerTransfer:
    """What both ways have in common: see the module, and `Transfer`."""

    def __init__(self, engine: WorkerEngine, hold: Hold, interface: str, config: WeightsConfig) -> None:
        self._engine = engine
        self._hold = hold
        self._interface = interface
        self._config = config
        self._num_workers = engine.num_workers  # the engine is closed before this is
        self._links = WorkerLinks(engine.num_workers, self._heard)
        self._answers = Answers(engine.num_workers)
        self._report: Callable[[Report], None] | None = None

    @property
    def num_ranks(self) -> int:
        """One for each worker."""
        return self._num_workers

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        """Listen, and have the workers connect.

        Raises:
            EngineError, DeadlineError: they do not.
        """
        self._report = report
        path = await self._links.open()
        is_direct = self._config.receive == "direct"
        init_info = {"socket_path": str(path), "interface": self._interface, "is_direct": is_direct}
        await self._engine.call_workers("darts_connect", init_info, deadline_s=CONNECT_S)
        await self._links.all_connected(CONNECT_S)

    def handle(self, command: Command) -> None:
        """Pass it on to every worker."""
        match command:
            case EpochFormed(first_rank=first_rank):
                for number in range(self.num_ranks):
                    self._links.tell(number, msgspec.structs.replace(command, first_rank=first_rank + number))
                return
            case UpdateOffered():
                self._answers.begin()
        for number in range(self.num_ranks):
            self._links.tell(number, command)

    @abstractmethod
    async def apply(self, policy_version: int) -> float:
        """See `Transfer`."""

    async def close(self, deadline_s: float) -> None:
        """See `Transfer`. The workers leave the group by themselves when their links end."""
        await self._links.close(deadline_s)

    def _heard(self, number: int, message: Report) -> None:
        assert self._report is not None
        if isinstance(message, StoreValue):
            for other in range(self.num_ranks):
                if other != number:
                    self._links.tell(other, message)
            self._report(message)
        elif (answer := self._answers.add(number, message)) is not None:
            self._report(answer)


class StagedTransfer(WorkerTransfer):
    """Received beside the running model."""

    async def apply(self, policy_version: int) -> float:
        """See `Transfer`."""
        async with self._hold() as still, self._engine.paused(clear_cache=self._config.reprefill):
            still.deliver(self._engine.take())
            try:
                await self._engine.call_workers("darts_use", policy_version, deadline_s=self._config.deadline_s)
            except DeadlineError as error:
                raise EngineError(f"version {policy_version} is half in use: {error}") from error
            await self._engine.set_policy_version(policy_version)
            still.policy_version = policy_version
        return still.stall_s


@dataclass(frozen=True, slots=True, eq=False)
class _Commit:
    version: int
    stall_s: "asyncio.Future[float]"


class DirectTransfer(WorkerTransfer):
    """Received into the model, while the engine stands still."""

    def __init__(self, engine: WorkerEngine, hold: Hold, interface: str, config: WeightsConfig) -> None:
        super().__init__(engine, hold, interface, config)
        self._news = asyncio.Event()
        self._offer: UpdateOffered | None = None  # the last one, unless it was given up or is in use
        self._commit: _Commit | None = None

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        """See `WorkerTransfer`."""
        await super().open(report, tasks)
        tasks.create_task(self._run(), name="direct updates")

    def handle(self, command: Command) -> None:
        """An offer is passed on once the engine stands still."""
        if isinstance(command, UpdateOffered):
            self._offer = command
            self._news.set()
            return
        if isinstance(command, UpdateAborted | EpochFormed):
            self._offer = None
        super().handle(command)

    async def apply(self, policy_version: int) -> float:
        """See `Transfer`."""
        self._commit = commit = _Commit(policy_version, asyncio.get_running_loop().create_future())
        self._news.set()
        return await commit.stall_s

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._offer is None:
                continue
            async with self._hold() as still, self._engine.paused(clear_cache=self._config.reprefill):
                still.deliver(self._engine.take())
                if self._offer is None:
                    continue  # given up on the way here: nothing was touched
                commit = await self._until_committed()
                await self._engine.set_policy_version(commit.version)
                still.policy_version = commit.version
            commit.stall_s.set_result(still.stall_s)

    async def _until_committed(self) -> _Commit:
        """Load what is offered, again and again if need be: from the first tensor on there is no way back."""
        loaded: UpdateOffered | None = None
        while self._commit is None:
            if self._offer is not None and self._offer is not loaded:
                loaded = self._offer
                await self._load(loaded)
                continue
            self._news.clear()
            try:
                async with asyncio.timeout(self._config.torn_limit_s):
                    await self._news.wait()
            except TimeoutError:
                limit = f"{self._config.torn_limit_s:g} s (weights.torn_limit_s)"
                raise EngineError(
                    f"an update straight into the model was not completed, and no other got through for {limit}"
                ) from None
        commit, self._commit, self._offer = self._commit, None, None
        return commit

    async def _load(self, offer: UpdateOffered) -> None:
        super().handle(offer)
        version, deadline_s = offer.policy_version, TRANSFER_BACKSTOP * offer.deadline_s + CALL_S
        outcomes = await self._engine.call_workers("darts_receive", version, deadline_s=deadline_s)
        errors = [error for error in outcomes if error]
        if errors:
            log.warning("weights_torn", policy_version=version, errors=errors)
            if offer is self._offer and self._report is not None:
                self._report(UpdateFailed(offer.epoch, version, errors[0]))
