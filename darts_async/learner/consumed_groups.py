"""The groups that have entered a gradient, which a restarted learner must not train on again.

Group ids are handed out in ascending order and nearly all of them are consumed, so the set is kept as intervals: its
size is the number of gaps (groups that were dropped, or are still on their way), not the length of the run.

Invariants. Intervals ascend, are not empty and do not touch.
"""

from bisect import bisect_right
from collections.abc import Iterable


class ConsumedGroups:
    """A set of group ids; each `(start, stop)` means start, ..., stop - 1."""

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self._intervals = [(int(start), int(stop)) for start, stop in intervals]

    @property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """The whole set."""
        return tuple(self._intervals)

    def __contains__(self, group_id: int) -> bool:
        place = self._behind(group_id)
        return place > 0 and group_id < self._intervals[place - 1][1]

    def add(self, group_id: int) -> None:
        """Take in one id."""
        if group_id in self:
            return
        place = self._behind(group_id)
        start, stop = group_id, group_id + 1
        if place < len(self._intervals) and self._intervals[place][0] == stop:
            stop = self._intervals.pop(place)[1]
        if place > 0 and self._intervals[place - 1][1] == start:
            place -= 1
            start = self._intervals.pop(place)[0]
        self._intervals.insert(place, (start, stop))

    def _behind(self, group_id: int) -> int:
        """Index of the first interval that starts after `group_id`."""
        return bisect_right(self._intervals, group_id, key=lambda interval: interval[0])
