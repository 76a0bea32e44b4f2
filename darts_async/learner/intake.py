"""Groups that have come and are not trained on yet, each once, in the order of their steps. Pure.

A group may come again after a restart of the learner or the shaper, and one of a later step may then come before those
of this one: what the earlier learner had not acknowledged is delivered before the new one has said where it is.
"""

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable

import numpy as np

from darts_async.protocol import TrainGroup

Intervals = tuple[tuple[int, int], ...]
"""A set of group ids: each `(start, stop)` is start, ..., stop - 1."""


class ConsumedGroups:
    """The ids of groups in some gradient. A restarted learner must not train on them again.

    Ids ascend and nearly all of them are consumed, so the set is kept as intervals: its size is the number of gaps, not
    the length of the run.

    Invariants. Intervals ascend, are not empty and do not touch.
    """

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self._intervals = [(int(start), int(stop)) for start, stop in intervals]

    @property
    def intervals(self) -> Intervals:
        return tuple(self._intervals)

    def __contains__(self, group_id: int) -> bool:
        index = self._first_after(group_id)
        return index > 0 and group_id < self._intervals[index - 1][1]

    def add(self, group_id: int) -> None:
        if group_id in self:
            return
        index = self._first_after(group_id)
        start, stop = group_id, group_id + 1
        if index < len(self._intervals) and self._intervals[index][0] == stop:
            stop = self._intervals.pop(index)[1]
        if index > 0 and self._intervals[index - 1][1] == start:
            index -= 1
            start = self._intervals.pop(index)[0]
        self._intervals.insert(index, (start, stop))

    def _first_after(self, group_id: int) -> int:
        """Index of the first interval that starts after `group_id`."""
        return bisect_right(self._intervals, group_id, key=lambda interval: interval[0])


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
        if group.group_id not in self.consumed and group.group_id not in self._waiting_ids:
            self._waiting_ids.add(group.group_id)
            self._by_step[group.step].append(group)

    def together(self, step: int, max_groups: int, max_tokens: int) -> list[TrainGroup]:
        """The next groups of a step that fit into one pass; one in any case. So a learner that waits for groups trains
        on each at once, and one that lags catches up with larger passes."""
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
        """A step was taken with these groups in its gradient."""
        for group_id in group_ids:
            self.consumed.add(group_id)
            self._waiting_ids.discard(group_id)
        for past in [known for known in self._by_step if known <= step]:
            for group in self._by_step.pop(past):
                self._waiting_ids.discard(group.group_id)


def num_packed_tokens(group: TrainGroup) -> int:
    """Tokens of the group in a batch, which has its prompt once."""
    num_samples = int(np.count_nonzero(group.num_tokens))
    return len(group.prompt_tokens) + len(group.token_ids) - num_samples if num_samples else 0
