"""Groups that have come and are not trained yet, each once, in the order of their steps.

A group may come again when the learner or the shaper has come back, and one of a later step may then come before those
of this one: what the learner before had not acknowledged is delivered before it has said where it stands.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable

import structlog

from darts_async.learner.consumed_groups import ConsumedGroups
from darts_async.learner.packing.batch import num_packed_tokens
from darts_async.protocol import TrainGroup

WARN_AFTER_S = 60.0
"""A learner that has had no group for this long says so, again and again: how long is too long is for the launcher to
say, which sees the whole run."""

log = structlog.get_logger()


class Intake:
    """Bounded by the shaper's staleness window. All methods are called on one event loop."""

    def __init__(self) -> None:
        self.consumed = ConsumedGroups()
        self._by_step: defaultdict[int, deque[TrainGroup]] = defaultdict(deque)
        self._waiting_ids: set[int] = set()
        self._arrived = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """Groups that have not been asked for."""
        return sum(map(len, self._by_step.values()))

    def take(self, group: TrainGroup) -> None:
        """A group has come."""
        if group.group_id not in self.consumed and group.group_id not in self._waiting_ids:
            self._waiting_ids.add(group.group_id)
            self._by_step[group.step].append(group)
            self._arrived.set()

    def has(self, step: int) -> bool:
        """Whether a group of this step is there."""
        queue = self._by_step[step]
        while queue and queue[0].group_id in self.consumed:  # it came before we knew
            queue.popleft()
        return bool(queue)

    async def next(self, step: int) -> TrainGroup:
        """The next group of a step, waiting for it."""
        while not self.has(step):
            self._arrived.clear()
            try:
                async with asyncio.timeout(WARN_AFTER_S):
                    await self._arrived.wait()
            except TimeoutError:
                log.warning("no_group", step=step, waited_s=WARN_AFTER_S)
        return self._by_step[step].popleft()

    def others(self, step: int, max_groups: int, max_tokens: int) -> list[TrainGroup]:
        """Further groups of a step that are there already, in order, as far as they fit into one pass."""
        groups: list[TrainGroup] = []
        while len(groups) < max_groups and self.has(step):
            max_tokens -= num_packed_tokens(self._by_step[step][0])
            if max_tokens < 0:
                break
            groups.append(self._by_step[step].popleft())
        return groups

    def commit(self, step: int, group_ids: Iterable[int]) -> None:
        """These groups are in the gradient of a step, which has been taken."""
        for group_id in group_ids:
            self.consumed.add(group_id)
            self._waiting_ids.discard(group_id)
        for past in [known for known in self._by_step if known <= step]:
            for group in self._by_step.pop(past):
                self._waiting_ids.discard(group.group_id)
