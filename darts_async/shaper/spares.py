"""Spares: open groups outside the staleness window (over-commitment), so that a slow group need not hold up a step.

A spare that is complete enters the window: at a free place, or at that of a *rival*, a group that is still waited for,
which then becomes a spare. A spare too old for any step is cut. The group of a prompt that is asked again is never a
rival. The caller carries out what follows for a group that enters or is cut.
"""

from collections.abc import Iterator, Mapping

from darts_async.config import RunConfig
from darts_async.shaper.group import Group
from darts_async.shaper.window import StalenessWindow


class Spares:
    """The spares of a run, and the groups whose places they may take."""

    def __init__(self, config: RunConfig, window: StalenessWindow, groups: Mapping[int, Group]) -> None:
        """`groups`: all open ones by id, as they are at any time."""
        self._learner = config.learner
        self._max_staleness = config.staleness.max_staleness
        self._max_spares = round((config.shaping.overcommit - 1) * config.max_open_groups)
        self._window = window
        self._groups = groups
        self._spares: dict[int, Group] = {}
        self._rivals: dict[int, list[int]] = {}
        """{deadline: ids in ascending order} of groups in the window that a spare may replace while they are waited
        for. Others are taken out when they are met."""
        self._used_at: tuple[int, int, list[int]] | None = None
        """The `_situation` in which no spare found a place."""
        self._cut_at_step = -1
        """The next step when spares were last cut."""

    def __contains__(self, group_id: int) -> bool:
        return group_id in self._spares

    def has_room(self, floor: int) -> bool:
        """Whether a spare may be opened whose tokens will be of version `floor` or later."""
        return len(self._spares) < self._max_spares and not self._is_too_late(floor)

    def add(self, group: Group) -> None:
        """A group was opened as a spare."""
        self._spares[group.group_id] = group

    def add_rival(self, group: Group) -> None:
        """A group was opened in the window."""
        if self._max_spares and not group.asked_again:
            self._rivals.setdefault(self._window.deadline(group.group_id), []).append(group.group_id)

    def discard(self, group_id: int) -> bool:
        """A group came to nothing; returns whether it was a spare."""
        return self._spares.pop(group_id, None) is not None

    def clear(self) -> None:
        """No spare continues."""
        self._spares.clear()

    def use(self, num_steps: int) -> list[Group]:
        """Move complete spares into the window where they find a place, after so many committed steps. Returns them.

        It is called with every event, and hardly ever moves one. The answer follows from the window, whose undecided
        groups change when it does, the committed steps, and which spares are complete: while these are the same, so is
        the answer.
        """
        if not self._spares or self._used_at == self._situation(num_steps):
            return []
        entered: list[Group] = []
        hopeless: set[int] = set()
        """Floors for which there is no place until another spare has found one."""
        for spare in [group for group in self._spares.values() if group.weights is not None]:
            floor = spare.kept_floor(num_steps)
            if floor in hopeless:
                continue
            if self._find_place(spare, floor):
                entered.append(spare)
                hopeless.clear()
            else:
                hopeless.add(floor)
        self._used_at = self._situation(num_steps)
        return entered

    def cut(self) -> list[Group]:
        """Take out and return the spares that are too late for any step, all of them when the last step is filled.

        A group that becomes or is completed as a spare is in time for the next step. So it is enough to look whenever
        the next step is another one.
        """
        if not self._spares or self._cut_at_step == self._window.next_step:
            return []
        self._cut_at_step = self._window.next_step
        late = [spare for spare in self._spares.values() if self._is_too_late(_oldest_version(spare))]
        for spare in late:
            del self._spares[spare.group_id]
        return late

    def waited_for(self) -> list[Group]:
        """Training groups in the window that are not complete."""
        return [g for g in self._groups.values() if g.purpose == "train" and self._is_waited_for(g.group_id)]

    def to_state(self) -> list[int]:
        """The ids of the spares, for `restore`."""
        return list(self._spares)

    def restore(self, group_ids: list[int], floors: Mapping[int, int]) -> None:
        """Continue where `to_state` was taken. `floors`: of the groups in the window by id; none in a checkpoint."""
        self._spares = {group_id: self._groups[group_id] for group_id in group_ids}
        for group in self.waited_for():
            if group.group_id in floors:
                self.add_rival(group)

    def validate(self) -> None:
        """No more than there may be, none that is too late, and every rival is known."""
        assert len(self._spares) <= self._max_spares, len(self._spares)
        rivals = {group_id for ids in self._rivals.values() for group_id in ids if self._is_waited_for(group_id)}
        expected = {group.group_id for group in self.waited_for() if not group.asked_again}
        assert not self._max_spares or rivals == expected, rivals ^ expected
        assert all(ids == sorted(ids) for ids in self._rivals.values()), self._rivals
        for group_id, spare in self._spares.items():
            assert not self._is_too_late(_oldest_version(spare)), group_id

    def _is_too_late(self, floor: int) -> bool:
        """Whether no step may take a group whose oldest token is of version `floor`."""
        step = self._window.next_step
        return step >= self._learner.steps or floor + self._max_staleness < step

    def _situation(self, num_steps: int) -> tuple[int, int, list[int]]:
        complete = [group_id for group_id, group in self._spares.items() if group.weights is not None]
        return self._window.num_changes, num_steps, complete

    def _find_place(self, spare: Group, floor: int) -> bool:
        """Whether the spare is in the window now."""
        num_groups = self._learner.steps * self._learner.groups_per_step
        if self._window.num_shipped + self._window.num_open < num_groups and self._enter(spare, floor):
            return True
        return any(self._replace(rival, spare, floor) for rival in self._latest_rivals())

    def _latest_rivals(self) -> Iterator[Group]:
        """The groups that a spare could replace, the latest deadline first. Of those with one deadline all could be
        replaced or none, so only the last one is tried."""
        for deadline in sorted(self._rivals, reverse=True):
            group_ids = self._rivals[deadline]
            while group_ids and not self._is_waited_for(group_ids[-1]):
                group_ids.pop()  # it will not be waited for again
            if group_ids:
                yield self._groups[group_ids[-1]]
            else:
                del self._rivals[deadline]

    def _enter(self, spare: Group, floor: int) -> bool:
        """The spare joins the window, if that has a place for it."""
        if not self._window.may_admit(floor):
            return False
        self._window.admit(spare.group_id, floor)
        del self._spares[spare.group_id]
        return True

    def _replace(self, rival: Group, spare: Group, floor: int) -> bool:
        """The spare takes the place of a rival, which becomes a spare, if all others still meet their deadlines."""
        deadline = self._window.deadline(rival.group_id)
        self._window.drop(rival.group_id)
        if self._enter(spare, floor):
            self._spares[rival.group_id] = rival
            return True
        self._window.admit(rival.group_id, deadline - self._max_staleness)
        return False

    def _is_waited_for(self, group_id: int) -> bool:
        group = self._groups.get(group_id)
        return group is not None and group.undecided and group_id not in self._spares


def _oldest_version(spare: Group) -> int:
    """The oldest one that it trains on, or may train on."""
    return spare.floor if spare.weights is None else spare.oldest_kept_version
