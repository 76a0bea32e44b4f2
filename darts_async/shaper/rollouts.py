"""Which groups are kept to be looked at, and when the file of a step is due. Pure, as all that decides.

A kept group holds the tokens of all of its samples until the last one has ended, also of those that were cancelled.
Then it belongs to the file of its step, which is written, or written again if another of its groups ends later: one
that waited for a cancel to be acknowledged. A group that comes to nothing belongs to the step that was next at that
moment, so those of a run in which every reward fails are shown too.

Files that are to be written stay in the state until the process says that they are (`written`), so that a process which
takes the place of another writes them again: under the same names, with the same contents.
"""

from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from darts_async.config import RunConfig
from darts_async.rollouts import FileName
from darts_async.shaper.group import Group, Purpose

MAX_UNWRITTEN: Final = 24
"""Files that are to be written. The oldest of more are given up, where no process writes any, as in a simulation. A
process gives them up sooner."""


class RolloutFile(Struct, frozen=True):
    """The contents of a file that is to be written."""

    serial: int
    """No other file of the run has it, also not a later one of the same name."""
    name: FileName
    groups: list[Group]


class RolloutsState(Struct, frozen=True):
    """What `Rollouts` know between two events."""

    steps: dict[int, list[Group]] = {}
    evaluated: list[Group] = []
    unwritten: list[RolloutFile] = []
    num_files: int = 0
    num_given_up: int = 0


class Rollouts:
    """The kept groups that have ended, and the files that are to be written."""

    def __init__(self, config: RunConfig) -> None:
        self._per_step = min(config.telemetry.sample_groups, config.learner.groups_per_step)
        self._groups_per_step = config.learner.groups_per_step
        self._ended: list[Group] = []
        """By the present event."""
        self._steps: dict[int, list[Group]] = {}
        """The kept groups of each step whose file may still change."""
        self._evaluated: list[Group] = []
        self._unwritten: dict[FileName, RolloutFile] = {}
        self._num_files = 0
        self.num_given_up = 0
        """Groups that were to be kept, and were not written: the disk was full or too slow."""

    def wants(self, group_id: int, purpose: Purpose) -> bool:
        """Whether a new group is kept: every one that is evaluated, and of the others one in so many by its number.
        Nothing that is known of its samples plays a part, so the kept ones are as long as any."""
        if purpose == "evaluate" or not self._per_step:
            return self._per_step > 0
        return group_id * self._per_step % self._groups_per_step < self._per_step

    def ended(self, group: Group) -> None:
        """The last sample of a kept group has ended, so nothing of it changes any more."""
        for sample in group.samples:
            sample.merge_chunks()
        if group.purpose == "evaluate":
            self._evaluated.append(group)
        else:
            self._ended.append(group)

    def begin_evaluation(self) -> None:
        """Held-out groups that end from here on are of another evaluation."""
        self._evaluated = []

    def close_evaluation(self, policy_version: int) -> None:
        """All groups of an evaluation have ended."""
        if self._evaluated:
            self._put(FileName("held-out", policy_version), self._evaluated)
        self._evaluated = []

    def advance(self, num_steps: int, open_groups: Iterable[Group]) -> None:
        """What follows from any event: `num_steps` were committed, and these groups are open."""
        if not (self._ended or self._steps):
            return
        changed = {step for group in self._ended if (step := self._sort(group, num_steps)) is not None}
        self._ended = []
        for step in sorted(changed):
            self._put(FileName("train", step), self._steps[step])
        if any(step < num_steps for step in self._steps):
            waited_for = {group.step for group in open_groups if group.is_shown}
            for step in [step for step in self._steps if step < num_steps and step not in waited_for]:
                del self._steps[step]

    def _sort(self, group: Group, num_steps: int) -> int | None:
        """The step that an ended group is shown with; None if that has enough groups that came to nothing."""
        step = num_steps if group.step is None else min(group.step, num_steps)
        of_step = self._steps.setdefault(step, [])
        if group.weights is None and sum(other.weights is None for other in of_step) >= self._per_step:
            return None
        of_step.append(group)
        return step

    def _put(self, name: FileName, groups: list[Group]) -> None:
        self._unwritten.pop(name, None)
        self._unwritten[name] = RolloutFile(self._num_files, name, list(groups))
        self._num_files += 1
        if len(self._unwritten) > MAX_UNWRITTEN:
            oldest = next(iter(self._unwritten.values()))
            self.written(oldest.serial, is_given_up=True)

    @property
    def unwritten(self) -> list[RolloutFile]:
        """The files to be written, in order. One of the same name as an earlier one takes its place."""
        return list(self._unwritten.values())

    def written(self, serial: int, *, is_given_up: bool) -> None:
        """The file is on its place, or could not be written."""
        found = next((file for file in self._unwritten.values() if file.serial == serial), None)
        if found is None:
            return
        del self._unwritten[found.name]
        if is_given_up:
            self.num_given_up += len(found.groups)

    def void_from(self, num_steps: int) -> int:
        """Files of training steps from this one on are of steps that were undone."""
        return num_steps + (num_steps in self._steps)

    def start_over(self) -> None:
        """No open group continues, and later steps than now may have been undone."""
        self._ended, self._evaluated = [], []
        self._steps, self._unwritten = {}, {}

    def to_state(self) -> RolloutsState:
        """For `restore`."""
        assert not self._ended, [group.group_id for group in self._ended]
        return RolloutsState(
            steps=self._steps,
            evaluated=self._evaluated,
            unwritten=self.unwritten,
            num_files=self._num_files,
            num_given_up=self.num_given_up,
        )

    def restore(self, state: RolloutsState) -> None:
        """Continue where `to_state` was taken."""
        self._steps, self._evaluated = state.steps, state.evaluated
        self._unwritten = {file.name: file for file in state.unwritten}
        self._num_files, self.num_given_up = state.num_files, state.num_given_up

    def validate(self, num_steps: int) -> None:
        """No group is shown with a step that is yet to come, and none twice."""
        assert not self._ended, [group.group_id for group in self._ended]
        assert all(step <= num_steps for step in self._steps), (sorted(self._steps), num_steps)
        ids = [group.group_id for groups in self._steps.values() for group in groups]
        assert len(ids) == len(set(ids)), ids
        assert len(self._unwritten) <= MAX_UNWRITTEN, len(self._unwritten)
        for file in self._unwritten.values():
            assert file.serial < self._num_files, (file.serial, self._num_files)
