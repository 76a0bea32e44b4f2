"""A generator's side of a weight update: its messages with the learner.

Received weights are applied at a step boundary, after the learner has seen that all checksums agree. A failure before
that only costs the update: the member reports it, leaves the group and asks to join the next one. `Transfer` decides
how and where the buckets arrive.

Invariants: the transfer only gets commands of the current epoch; an update that is being applied is always finished,
and an offer that arrives meanwhile waits.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from darts_async.errors import WeightUpdateError
from darts_async.faults import present
from darts_async.protocol import (
    EpochFormed,
    GeneratorToLearner,
    LearnerToGenerator,
    MemberJoined,
    StoreValue,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
)
from darts_async.weights.broadcast.collective import describe
from darts_async.weights.receiving.receiving_rank import Report
from darts_async.weights.receiving.transfer import Transfer


@dataclass(slots=True, eq=False)
class _CommittedUpdate:
    epoch: int
    version: int
    is_staged: bool = False


class Receiver:
    """Takes part in the learner's updates. All methods are called on one event loop.

    Args:
        send: queues a message for the learner.
        transfer: receives the weights. `open` opens it and `close` closes it.
    """

    def __init__(self, send: Callable[[GeneratorToLearner], None], transfer: Transfer) -> None:
        self._send = send
        self._transfer = transfer
        self._version = -1
        self._epoch: int | None = None  # whose group it is in
        self._last_epoch = -1
        self._update: _CommittedUpdate | None = None
        self._applying: _CommittedUpdate | None = None
        self._postponed: UpdateOffered | None = None
        self._committed = asyncio.Event()

    @property
    def policy_version(self) -> int:
        """The version in use, -1 before the first."""
        return self._version

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Open the transfer, and apply committed updates in a task of `tasks`. An error of the engine ends them."""
        await self._transfer.open(self._report, tasks)
        tasks.create_task(self._run(), name="weights")

    def join(self) -> None:
        """Ask to be a member. Call it whenever the link to the learner comes up."""
        self._leave("joins again")
        self._last_epoch = -1  # it may be another learner with its own clock
        self._ask()

    def learner_lost(self) -> None:
        """The link to the learner is down: end the current update."""
        self._leave("the link to the learner is down")

    def handle(self, message: LearnerToGenerator) -> None:
        """Handle a message of the learner. Messages of past epochs are ignored."""
        match message:
            case EpochFormed(epoch):
                if epoch > self._last_epoch:
                    self._leave(f"epoch {epoch} was formed")
                    self._epoch = self._last_epoch = epoch
                    self._transfer.handle(message)
            case StoreValue(epoch):
                if epoch == self._epoch:
                    self._transfer.handle(message)
            case UpdateOffered():
                self._consider(message)
            case UpdateCommitted():
                self._commit(message)
            case UpdateAborted(epoch, _, reason):
                if self._epoch in (epoch, None):  # a member without a group was dropped too
                    self._leave(reason)
                    self._ask()

    async def _run(self) -> None:
        while True:
            await self._committed.wait()
            self._committed.clear()
            if (update := self._applying) is not None:
                await self._apply_update(update)

    async def close(self, deadline_s: float = 10.0) -> None:
        """Leave the group, and release all threads, sockets and memory.

        Raises:
            DeadlineError: a thread hangs.
        """
        self._leave("the generator closes")
        await self._transfer.close(deadline_s)

    # --- what the transfer says ------------------------------------------------------------------------------

    def _report(self, report: Report) -> None:
        if report.epoch != self._epoch:
            return
        match report:
            case UpdateFailed(epoch, _, error):
                self._fail(epoch, error)
            case StoreValue():
                self._send(report)
            case UpdateReady() if self._update is not None:
                present().reach("generator.before_ready")
                self._send(report)
            case UpdateStaged() if self._update is not None:
                self._update.is_staged = True
                present().reach("generator.before_staged")
                self._send(report)

    # --- an update -------------------------------------------------------------------------------------------

    def _consider(self, message: UpdateOffered) -> None:
        if message.epoch != self._epoch:
            if message.epoch >= self._last_epoch:
                error = f"it is not in the group of epoch {message.epoch}"
                self._send(UpdateFailed(message.epoch, message.policy_version, error))
        elif self._applying is not None:
            self._postponed = message
        else:
            self._update = _CommittedUpdate(message.epoch, message.policy_version)
            self._transfer.handle(message)

    def _commit(self, message: UpdateCommitted) -> None:
        update = self._update
        if update is None or not update.is_staged:
            return
        if (update.epoch, update.version) != (message.epoch, message.policy_version):
            return
        self._update, self._applying = None, update
        self._transfer.handle(message)
        self._committed.set()

    async def _apply_update(self, update: _CommittedUpdate) -> None:
        try:
            stall_s = await self._transfer.apply(update.version)
        except WeightUpdateError as error:
            self._fail(update.epoch, describe(error))
        else:
            self._version = update.version
            present().reach("generator.before_applied")
            self._send(UpdateApplied(update.epoch, update.version, stall_s))
        self._applying = None
        if self._postponed is not None:
            message, self._postponed = self._postponed, None
            self._consider(message)

    # --- membership ------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        self._send(MemberJoined(self._version, self._transfer.num_ranks))

    def _leave(self, reason: str) -> None:
        if self._epoch is not None:
            version = self._update.version if self._update is not None else self._version
            self._transfer.handle(UpdateAborted(self._epoch, version, reason))
        self._epoch = self._update = self._postponed = None

    def _fail(self, epoch: int, error: str) -> None:
        """Report that this member cannot continue in an epoch, and ask for the next one."""
        if epoch != self._epoch:
            return  # it has left already
        version = self._update.version if self._update is not None else self._version
        self._leave(error)
        self._send(UpdateFailed(epoch, version, error))
        self._ask()
