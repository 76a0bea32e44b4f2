"""The hard bound on off-policyness: which groups may be opened, and which may enter which step.

Let B groups make a step and let step s turn version s into version s + 1. A group whose oldest token was decoded
under version f may be consumed by steps up to f + S, its *deadline*; S = `max_staleness`. Groups are consumed in the
order in which they are shipped, so the n-th shipped group (from 0) enters step n // B and the steps up to d hold
B (d + 1) groups. Writing `shipped` for the number of shipped groups, all open groups can meet their deadlines if
and only if (Hall's condition for unit jobs with deadlines)

    for every d:   |{open groups with deadline <= d}|  <=  B (d + 1) - shipped                              (H)

Every rule here is "only if (H) still holds afterwards":

* `may_admit(f)`: a group whose tokens will be of version f or later may be opened. Without slower groups this is the
  familiar count rule, which bounds nothing when groups finish in any order; (H) does.
* `may_ship(g)`: a complete group may overtake slower ones as long as these can still meet their deadlines. If none
  may, the learner waits for the slow ones: they are paced, not dropped.

Shipping the open group with the earliest deadline never breaks (H), so complete groups cannot block one another, and
dropping a group only makes room: capacity is the difference of two counts and cannot leak. S = 0 is the synchronous
mode: exactly B groups per version.
"""

from collections import Counter

from msgspec import Struct

from darts_async.errors import StalenessError


class WindowState(Struct, frozen=True):
    """What a `StalenessWindow` knows."""

    num_shipped: int
    floors: dict[int, int]


class StalenessWindow:
    """Admission, consumption and the count of shipped groups. All methods are O(S + 1)."""

    def __init__(self, *, groups_per_step: int, max_staleness: int) -> None:
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self.num_shipped = 0
        self._floors: dict[int, int] = {}
        self._open_by_deadline: Counter[int] = Counter()
        self.num_changes = 0
        """As long as it is the same, all answers are."""
        self._answers: dict[tuple[int | None, int | None, int], bool] = {}
        """Of `_feasible` since the last change: the same few questions come with every event."""

    @property
    def next_step(self) -> int:
        """The step that the next shipped group enters."""
        return self.num_shipped // self._groups_per_step

    @property
    def num_open(self) -> int:
        """Groups admitted and neither shipped nor dropped."""
        return len(self._floors)

    def may_admit(self, floor: int) -> bool:
        """Whether a group may be opened whose tokens will be of version `floor` or later."""
        return self._feasible(added=floor + self._max_staleness)

    def admit(self, group_id: int, floor: int) -> None:
        """Open a group."""
        assert group_id not in self._floors, group_id
        assert self.may_admit(floor), (group_id, floor)
        self._open(group_id, floor)

    def deadline(self, group_id: int) -> int:
        """The last step that may consume an open group."""
        return self._floors[group_id] + self._max_staleness

    def urgency(self, group_id: int) -> tuple[int, int]:
        """Sorts open groups, the one with the earliest deadline first."""
        return self.deadline(group_id), group_id

    def set_floor(self, group_id: int, floor: int) -> None:
        """The oldest token of an open group is of version `floor`, which may be later than was known before."""
        assert floor >= self._floors[group_id], (group_id, floor, self._floors[group_id])
        self.drop(group_id)
        self._open(group_id, floor)

    def may_ship(self, group_id: int) -> bool:
        """Whether a complete group may enter the next step, slower groups considered."""
        deadline = self.deadline(group_id)
        return self.next_step <= deadline and self._feasible(removed=deadline, shipped=1)

    def ship(self, group_id: int) -> int:
        """Assign an open group to the next step, which is returned.

        Raises:
            StalenessError: the step is past the group's deadline. Nothing has changed.
        """
        step, deadline = self.next_step, self.deadline(group_id)
        if step > deadline:
            floor = deadline - self._max_staleness
            raise StalenessError(
                f"group {group_id} has tokens of version {floor}; step {step} would train on them at staleness "
                f"{step - floor}, and max_staleness is {self._max_staleness}"
            )
        self.num_shipped += 1
        self.drop(group_id)
        return step

    def reopen(self, num_steps: int) -> None:
        """So many steps were taken, and no group beyond them is open or shipped."""
        self._changed()
        self._floors.clear()
        self._open_by_deadline.clear()
        self.num_shipped = num_steps * self._groups_per_step

    def to_state(self) -> WindowState:
        return WindowState(num_shipped=self.num_shipped, floors=self._floors)

    def restore(self, state: WindowState) -> None:
        self.num_shipped = state.num_shipped
        for group_id, floor in state.floors.items():
            self._open(group_id, floor)

    def validate(self) -> None:
        """Invariants: the counts agree and (H) holds."""
        expected = Counter(floor + self._max_staleness for floor in self._floors.values())
        assert expected == self._open_by_deadline, (expected, self._open_by_deadline)
        assert self._holds(None, None, 0), (self.num_shipped, sorted(self._floors.items()))

    def _changed(self) -> None:
        self.num_changes += 1
        self._answers.clear()

    def _open(self, group_id: int, floor: int) -> None:
        self._changed()
        self._floors[group_id] = floor
        self._open_by_deadline[floor + self._max_staleness] += 1

    def drop(self, group_id: int) -> None:
        """Close a group that is shipped, or will not be trained on."""
        self._changed()
        deadline = self._floors.pop(group_id) + self._max_staleness
        self._open_by_deadline[deadline] -= 1
        if not self._open_by_deadline[deadline]:
            del self._open_by_deadline[deadline]

    def _feasible(self, *, added: int | None = None, removed: int | None = None, shipped: int = 0) -> bool:
        """Condition (H) after a change."""
        question = added, removed, shipped
        answer = self._answers.get(question)
        if answer is None:
            answer = self._answers[question] = self._holds(*question)
        return answer

    def _holds(self, added: int | None, removed: int | None, shipped: int) -> bool:
        counts = dict(self._open_by_deadline)
        if added is not None:
            counts[added] = counts.get(added, 0) + 1
        if removed is not None:
            counts[removed] -= 1
        num_shipped, num_due = self.num_shipped + shipped, 0
        for deadline in sorted(counts):
            num_due += counts[deadline]
            if num_due > self._groups_per_step * (deadline + 1) - num_shipped:
                return False
        return True
