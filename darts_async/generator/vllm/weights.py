"""Weights of an update, received by vLLM's workers: the generator's part.

Each worker is a rank of the broadcast group. It hears what the learner says, and answers, over a socket in a directory
that only this user can enter. So the rendezvous never leaves the authenticated links, and does not pass through vLLM.
The answers of all workers are one answer to the learner.

Staged weights are put in use by one call, while vLLM is paused between two steps. A direct update pauses vLLM from the
offer to the commit. If it breaks in between, the weights in use are torn: vLLM and its samples stay paused until an
update, of this learner or of the next, is complete. What cannot be repaired is an `EngineError`.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog
from msgspec.structs import replace

from darts_async.config import WeightsConfig
from darts_async.errors import DeadlineError, EngineError
from darts_async.generator.engine import Hold, StepEvents
from darts_async.generator.vllm.worker_hub import Answers, WorkerLinks
from darts_async.protocol import EpochFormed, StoreValue, UpdateAborted, UpdateFailed, UpdateOffered
from darts_async.weights.receiving.member import Command, Report
from darts_async.weights.receiving.receiving_rank import TRANSFER_BACKSTOP

CONNECT_S: Final = 30.0
CALL_S: Final = 10.0
"""Time for a call to the workers, in addition to what it waits for."""

log = structlog.get_logger()


class WorkerEngine(Protocol):
    """The part of `engine.VllmEngine` that an update needs."""

    @property
    def num_workers(self) -> int: ...

    async def call_workers(self, method: str, *args: Any, deadline_s: float) -> list[Any]: ...

    def paused(self, *, clear_cache: bool) -> AbstractAsyncContextManager[None]: ...

    def take(self) -> StepEvents: ...

    async def set_policy_version(self, policy_version: int) -> None: ...


def worker_transfer(engine: WorkerEngine, hold: Hold, interface: str, config: WeightsConfig) -> "WorkerTransfer":
    """The transfer that the settings ask for. Arguments are those of `Engine.weight_transfer`."""
    kind = DirectTransfer if config.receive == "direct" else StagedTransfer
    return kind(engine, hold, interface, config)


class WorkerTransfer:
    """A `Transfer` to the workers of an engine: what both kinds share."""

    def __init__(self, engine: WorkerEngine, hold: Hold, interface: str, config: WeightsConfig) -> None:
        self._engine = engine
        self._hold = hold
        self._interface = interface
        self._config = config
        self.num_ranks = engine.num_workers  # the engine is closed before this is
        self._links = WorkerLinks(engine.num_workers, self._heard)
        self._answers = Answers(engine.num_workers)
        self._report: Callable[[Report], None] | None = None

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        """Listen, and have the workers connect. Raises `EngineError` or `DeadlineError` if they do not."""
        self._report = report
        path, is_direct = await self._links.open(), self._config.receive == "direct"
        init_info = {"socket_path": str(path), "interface": self._interface, "is_direct": is_direct}
        await self._engine.call_workers("darts_connect", init_info, deadline_s=CONNECT_S)
        await self._links.all_connected(CONNECT_S)

    def handle(self, command: Command) -> None:
        """Pass it on to every worker."""
        if isinstance(command, UpdateOffered):
            self._answers.begin()
        for number in range(self.num_ranks):
            if isinstance(command, EpochFormed):
                self._links.tell(number, replace(command, first_rank=command.first_rank + number))
            else:
                self._links.tell(number, command)

    @abstractmethod
    async def apply(self, policy_version: int) -> float:
        """Put weights in use; how long no token was decoded, in seconds."""

    async def close(self, deadline_s: float) -> None:
        """End the links. Workers then leave the group by themselves."""
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
    """Weights are received beside the running model."""

    async def apply(self, policy_version: int) -> float:
        """Put staged weights in use."""
        async with self._hold() as pause, self._engine.paused(clear_cache=self._config.reprefill):
            pause.deliver(self._engine.take())
            try:
                await self._engine.call_workers("darts_use", policy_version, deadline_s=self._config.deadline_s)
            except DeadlineError as error:
                raise EngineError(f"version {policy_version} is half in use: {error}") from error
            await self._engine.set_policy_version(policy_version)
            pause.policy_version = policy_version
        return pause.stall_s


@dataclass(frozen=True, slots=True, eq=False)
class _Commit:
    version: int
    stall_s: "asyncio.Future[float]"


class DirectTransfer(WorkerTransfer):
    """Weights are received into the model, while the engine is paused."""

    def __init__(self, engine: WorkerEngine, hold: Hold, interface: str, config: WeightsConfig) -> None:
        super().__init__(engine, hold, interface, config)
        self._news = asyncio.Event()
        self._offer: UpdateOffered | None = None  # the last one, unless it was aborted or is in use
        self._commit: _Commit | None = None

    async def open(self, report: Callable[[Report], None], tasks: asyncio.TaskGroup) -> None:
        """As `WorkerTransfer.open`."""
        await super().open(report, tasks)
        tasks.create_task(self._run(), name="direct updates")

    def handle(self, command: Command) -> None:
        """An offer is passed on when the engine has paused."""
        if isinstance(command, UpdateOffered):
            self._offer = command
            self._news.set()
            return
        if isinstance(command, UpdateAborted | EpochFormed):
            self._offer = None
        super().handle(command)

    async def apply(self, policy_version: int) -> float:
        """Wait until the weights that were received are in use."""
        self._commit = commit = _Commit(policy_version, asyncio.get_running_loop().create_future())
        self._news.set()
        return await commit.stall_s

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._offer is None:
                continue
            async with self._hold() as pause, self._engine.paused(clear_cache=self._config.reprefill):
                pause.deliver(self._engine.take())
                if self._offer is None:
                    continue  # it was aborted before anything was changed
                commit = await self._until_committed()
                await self._engine.set_policy_version(commit.version)
                pause.policy_version = commit.version
            commit.stall_s.set_result(pause.stall_s)

    async def _until_committed(self) -> _Commit:
        """Load offers until one is committed: after the first tensor there is no way back."""
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
