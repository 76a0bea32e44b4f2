"""The current broadcast group of a process, and earlier groups whose threads have not ended yet.

Both sides of an update use it. At most one group is current. Leaving a group aborts it, so its thread ends by the
deadline of its current call. `close` waits for all threads.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from darts_async.protocol import StoreValue
from darts_async.weights.broadcast.collective import Collective, GroupSpec
from darts_async.weights.broadcast.relay_store import RelayStore


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A group that was joined, or is being joined."""

    spec: GroupSpec
    store: RelayStore
    collective: Collective

    @property
    def epoch(self) -> int:
        return self.spec.epoch


class Groups:
    """The current group and the groups that were left."""

    def __init__(self) -> None:
        self.current: Group | None = None
        self._left: list[Collective] = []

    def in_epoch(self, epoch: int) -> Group | None:
        return self.current if self.current is not None and self.current.epoch == epoch else None

    def join(
        self, spec: GroupSpec, send: Callable[[StoreValue], None], done: Callable[[Group, Future[None]], None]
    ) -> None:
        """Leave the current group and join another; `send` and `done` are called on the event loop."""
        self.leave(f"epoch {spec.epoch} was formed")
        loop = asyncio.get_running_loop()
        store = RelayStore(spec.epoch, send, loop, deadline_s=spec.deadline_s)
        group = Group(spec, store, Collective(spec, store, loop))
        self.current = group
        group.collective.form(lambda outcome: done(group, outcome))

    def leave(self, reason: str) -> None:
        """Abort the current group, if there is one."""
        if self.current is None:
            return
        group, self.current = self.current, None
        group.collective.abort(reason)
        self._left = [collective for collective in self._left if not collective.ended]
        self._left.append(group.collective)

    async def close(self, deadline_s: float) -> None:
        """Leave, and wait for the end of all threads and sockets of all groups. Raises `DeadlineError` if one hangs."""
        self.leave("closed")
        async with asyncio.TaskGroup() as tasks:
            for collective in self._left:
                tasks.create_task(collective.close(deadline_s), name="close a weight group")
        self._left.clear()
