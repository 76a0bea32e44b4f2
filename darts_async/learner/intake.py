"""Groups that have come and are not trained yet, each once, in the order of their steps. Pure.

A group may come again when the learner or the shaper has come back, and one of a later step may then come before those
of this one: what the learner before had not acknowledged is delivered before it has said where it is.
"""

from collections import defaultdict, deque
from collections.abc import Iterable

import numpy as np

from darts_async.learner.consumed_groups import ConsumedGroups
from darts_async.protocol import TrainGroup


class Intake:
    """Bounded by the shaper's staleness window."""

    def __init__(self) -> None:
        self.consumed = ConsumedGroups()
        self._by_step: defaultdict[int, deque[TrainGroup]] = defaultdict(deque)
        self._waiting_ids: set[int] = set()

    @property
    def num_waiting(self) -> int:
        """Groups that have not been asked for."""
        return sum(map(len, self._by_step.values()))

    def take(self, group: TrainGroup) -> None:
        """A group has come."""
        if group.group_id not in self.consumed and group.group_id not in self._waiting_ids:
            self._waiting_ids.add(group.group_id)
            self._by_step[group.step].append(group)

    def together(self, step: int, max_groups: int, max_tokens: int) -> list[TrainGroup]:
        """Groups of a step that are there, in order, as far as they fit into one pass; one in any case. So a learner
        that waits for groups trains one at a time at once, and one that lags catches up with larger passes."""
        groups: list[TrainGroup] = []
        queue = self._by_step[step]
        while queue and len(groups) < max_groups:
            if queue[0].group_id in self.consumed:  # it came before we knew
                queue.popleft()
                continue
            max_tokens -= num_packed_tokens(queue[0])
            if groups and max_tokens < 0:
                break
            groups.append(queue.popleft())
        return groups

    def commit(self, step: int, group_ids: Iterable[int]) -> None:
        """These groups are in the gradient of a step, which has been taken."""
        for group_id in group_ids:
            self.consumed.add(group_id)
            self._waiting_ids.discard(group_id)
        for past in [known for known in self._by_step if known <= step]:
            for group in self._by_step.pop(past):
                self._waiting_ids.discard(group.group_id)


def num_packed_tokens(group: TrainGroup) -> int:
    """What the group takes of a batch, in which its prompt stands once."""
    num_samples = int(np.count_nonzero(group.num_tokens))
    return len(group.prompt_tokens) + len(group.token_ids) - num_samples if num_samples else 0
