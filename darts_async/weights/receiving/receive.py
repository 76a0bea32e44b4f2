"""A generator's side of a weight update: does what its `Member` decides.

Weights are put in use at a step boundary, after the learner has seen that all checksums agree. The `Transfer` receives
the buckets.
"""

import asyncio
from collections.abc import Callable, Iterable

from darts_async.errors import WeightUpdateError
from darts_async.faults import present
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator, UpdateApplied, UpdateReady, UpdateStaged
from darts_async.weights.broadcast.collective import describe
from darts_async.weights.receiving.member import Action, Apply, Member, Order, Report, Tell
from darts_async.weights.receiving.transfer import Transfer


class Receiver:
    """Takes part in the learner's updates. All methods are called on one event loop. `send` queues a message for the
    learner."""

    def __init__(self, send: Callable[[GeneratorToLearner], None], transfer: Transfer) -> None:
        self._send = send
        self._transfer = transfer
        self._member = Member(transfer.num_ranks)
        self._committed: asyncio.Queue[int] = asyncio.Queue(maxsize=1)  # one update is applied at a time

    @property
    def policy_version(self) -> int:
        """The version in use, -1 before the first."""
        return self._member.policy_version

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Open the transfer, and apply committed updates in a task of `tasks`. An error of the engine ends them."""
        await self._transfer.open(self._report, tasks)
        tasks.create_task(self._run(), name="weights")

    def join(self) -> None:
        """Ask to be a member. To be called whenever the link to the learner comes up."""
        self._do(self._member.join())

    def learner_lost(self) -> None:
        """The link to the learner is down."""
        self._do(self._member.leave("the link to the learner is down"))

    def handle(self, message: LearnerToGenerator) -> None:
        """See `Member.handle`."""
        self._do(self._member.handle(message))

    async def close(self, deadline_s: float = 10.0) -> None:
        """Leave the group, and release all threads, sockets and memory. Raises `DeadlineError` if a thread hangs."""
        self._do(self._member.leave("the generator closes"))
        await self._transfer.close(deadline_s)

    async def _run(self) -> None:
        while True:
            version = await self._committed.get()
            try:
                stall_s = await self._transfer.apply(version)
            except WeightUpdateError as error:
                self._do(self._member.apply_failed(describe(error)))
            else:
                self._do(self._member.applied(stall_s))

    def _report(self, report: Report) -> None:
        self._do(self._member.report(report))

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Tell(message):
                    if (point := OF_MESSAGES.get(type(message))) is not None:
                        present().reach(point)
                    self._send(message)
                case Order(command):
                    self._transfer.handle(command)
                case Apply(version):
                    self._committed.put_nowait(version)


OF_MESSAGES = {
    UpdateReady: "generator.before_ready",
    UpdateStaged: "generator.before_staged",
    UpdateApplied: "generator.before_applied",
}
"""Points of faults that are reached before these messages are sent."""
