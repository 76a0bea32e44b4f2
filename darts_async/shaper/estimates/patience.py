"""How long one group may keep the learner waiting: longer than any group that is merely long.

A fixed time cuts the long answers of one task and waits for hours on another. So the limit is `LONGEST_TIMES` the
longest time that one of the latest `GROUPS_REMEMBERED` took from opening to completion, and at least `LEAST_S`, in
which a process is restarted. A group that is cut counts with its time until then, so where answers suddenly grow
longer, only a few groups are cut. That counts as `LONGEST_CUT_S` at most: else groups that never end would be waited
for four times as long each time.
"""

from collections import deque
from collections.abc import Iterable

LONGEST_TIMES = 4.0
LEAST_S = 60.0
GROUPS_REMEMBERED = 256
LONGEST_CUT_S = 3600.0


class Patience:
    """The limit, given or measured."""

    def __init__(self, given_s: float | None) -> None:
        self._given_s = given_s
        self._times_s: deque[float] = deque(maxlen=GROUPS_REMEMBERED)

    @property
    def limit_s(self) -> float:
        """Time after which a group that alone keeps the learner waiting is cut."""
        if self._given_s is not None:
            return self._given_s
        return max(LEAST_S, LONGEST_TIMES * max(self._times_s, default=0.0))

    def took(self, time_s: float) -> None:
        """A group was open for so long until it was complete."""
        self._times_s.append(time_s)

    def cut(self, time_s: float) -> None:
        """A group was open for so long until it was cut."""
        self._times_s.append(min(time_s, LONGEST_CUT_S))

    def to_state(self) -> list[float]:
        return list(self._times_s)

    def restore(self, state: Iterable[float]) -> None:
        self._times_s.extend(state)
