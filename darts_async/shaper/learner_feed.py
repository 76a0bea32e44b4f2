"""What the learner is sent, and in which order.

A complete group waits until the staleness window lets it into the next step, the most urgent first. Then it is
*shipped* until the learner has committed its step, and kept until every checkpoint has that (see `committed_steps`): a
learner that comes back from an older one takes those steps again.
"""

from collections.abc import Collection
from heapq import heappop, heappush

import numpy as np
from msgspec import Struct

from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.protocol import CatchUp, GroupsCommitted, TrainGroup
from darts_async.shaper.committed_steps import CommittedSteps
from darts_async.shaper.group import Group, train_group
from darts_async.shaper.ledger import GroupShipped, LearnerRewound, StepCommitted
from darts_async.shaper.outbox import Outbox
from darts_async.shaper.window import StalenessWindow


class LearnerFeedState(Struct, frozen=True):
    """What a `LearnerFeed` knows between two events; groups by id."""

    committed: CommittedSteps
    complete: list[int] = []
    most_urgent: list[tuple[int, int]] = []
    shipped: list[int] = []
    learner_up: bool = False
    has_begun: bool = False


class LearnerFeed:
    """Complete, shipped and committed groups, and the learner."""

    def __init__(self, config: RunConfig, window: StalenessWindow, outbox: Outbox) -> None:
        self._config = config
        self._window = window
        self._outbox = outbox
        self._complete: dict[int, Group] = {}
        self._most_urgent: list[tuple[int, int]] = []
        """A heap of (deadline, group id) of the complete groups: a deadline is fixed once the group is complete."""
        self._shipped: dict[int, Group] = {}
        self._sent: dict[int, TrainGroup] = {}
        """The shipped groups as the learner was sent them."""
        self.committed = CommittedSteps()
        self.learner_up = False
        self.has_begun = False
        """A learner of this life of the run was told to continue: generators may have any version that follows."""

    # --- groups ----------------------------------------------------------------------------------------------

    def add(self, group: Group) -> None:
        """A group in the window is complete."""
        self._complete[group.group_id] = group
        heappush(self._most_urgent, self._window.urgency(group.group_id))

    def ship(self) -> bool:
        """Send complete groups, the most urgent first, while the window allows. Returns whether any was sent."""
        num_shipped = self._window.num_shipped
        # If the most urgent one may not be shipped, no other may: this one would still wait.
        while self.learner_up and self._most_urgent and self._window.may_ship(self._most_urgent[0][1]):
            group = self._complete.pop(heappop(self._most_urgent)[1])
            group.step = self._window.ship(group.group_id)
            self._shipped[group.group_id] = group
            self._outbox.record(GroupShipped(group.group_id, group.step))
            self._sent[group.group_id] = sent = train_group(group)
            self._outbox.to_learner(sent)
        return self._window.num_shipped > num_shipped

    def commit(self, message: GroupsCommitted) -> list[Group]:
        """The learner has committed a step. Returns its groups; none if it was committed before, or if its groups were
        given up at the end of a stop."""
        step, group_ids = message.step, message.group_ids.tolist()
        if step < self.committed.position:
            return []
        if self.committed.is_behind:
            self.committed.repeat(step, group_ids)
            self._outbox.record(StepCommitted(step, tuple(group_ids)))
            self._replay()
            return []
        groups = [self._shipped.pop(group_id) for group_id in group_ids if group_id in self._shipped]
        if groups:
            self.committed.add(step, [self._sent.pop(group.group_id) for group in groups])
            self._outbox.record(StepCommitted(step, tuple(group_ids)))
        return groups

    def keep_back(self) -> None:
        """No group that is complete now is shipped any more."""
        self._complete.clear()
        self._most_urgent.clear()

    def withdraw(self, group_id: int) -> None:
        """This group is not waited for, shipped or not."""
        self._shipped.pop(group_id, None)
        self._sent.pop(group_id, None)

    def withdraw_all(self) -> list[Group]:
        """No shipped group is waited for; returns them."""
        groups = list(self._shipped.values())
        self._shipped.clear()
        self._sent.clear()
        return groups

    @property
    def complete(self) -> Collection[int]:
        """Ids of the groups in the window that wait for their step."""
        return self._complete.keys()

    @property
    def is_short(self) -> bool:
        """Whether the learner is up and has fewer groups than its next step takes."""
        return self.learner_up and len(self._shipped) < self._config.learner.groups_per_step

    # --- the learner -----------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Steps that were committed, those that the present learner takes again included."""
        return self.committed.num_steps

    @property
    def num_filled_steps(self) -> int:
        """Steps whose groups were all shipped: no learner can have taken more, nor made a later version."""
        return self._window.next_step

    def groups_of(self, step: int) -> list[int]:
        """The groups that the learner is to take this step with, as far as they were shipped."""
        if self.committed.is_behind:
            return self.committed.group_ids(step)
        return [group_id for group_id, group in self._shipped.items() if group.step == step]

    def unheard(self, policy_version: int) -> list[GroupsCommitted]:
        """The steps that a learner at this version has taken, but whose commit was lost with an earlier learner.

        Raises:
            DataError: it cannot have got there from here.
        """
        ids = self._groups_until(policy_version)
        for step, group_ids in ids.items():
            if len(group_ids) != self._config.learner.groups_per_step:
                raise DataError(
                    f"the learner has a checkpoint of version {policy_version}, but only {len(group_ids)} groups were "
                    f"shipped for step {step}: its checkpoints are of another run, or the journal has lost its end"
                )
        return [GroupsCommitted(step, np.array(group_ids, np.int64)) for step, group_ids in ids.items()]

    def explains(self, policy_version: int) -> bool:
        """Whether a learner at this version can have got there from here, and can be told all that follows."""
        size = self._config.learner.groups_per_step
        is_complete = all(len(group_ids) == size for group_ids in self._groups_until(policy_version).values())
        return self.committed.can_rewind(policy_version) and is_complete

    def _groups_until(self, policy_version: int) -> dict[int, list[int]]:
        """The groups that are known of each step from the learner's position to this version."""
        ids = {step: self.committed.group_ids(step) for step in range(self.committed.position, policy_version)}
        for group in self._shipped.values():
            if group.step in ids:
                ids[group.step].append(group.group_id)
        return ids

    def learner_ready(self, policy_version: int, newest_version: int) -> None:
        """A learner at this version is up: send it the groups that it has to take again, and then the shipped ones. It
        drops duplicates by group id. `newest_version`: that any generator has."""
        self.learner_up = self.has_begun = True
        if self.committed.rewind(policy_version):
            self._outbox.record(LearnerRewound(policy_version))
        floor = max(self.num_steps, newest_version)
        self._outbox.to_learner(CatchUp(floor, max(floor, self.num_filled_steps)))
        self._replay()
        for sent in self._sent.values():
            self._outbox.to_learner(sent)

    def _replay(self) -> None:
        for group in self.committed.to_send():
            self._outbox.to_learner(group)

    # --- codec, invariants -----------------------------------------------------------------------------------

    def to_state(self) -> LearnerFeedState:
        return LearnerFeedState(
            committed=self.committed,
            complete=list(self._complete),
            most_urgent=self._most_urgent,
            shipped=list(self._shipped),
            learner_up=self.learner_up,
            has_begun=self.has_begun,
        )

    def to_checkpoint(self, policy_version: int) -> LearnerFeedState:
        """For `restore`, where the learner continues from a checkpoint of this version and no open group continues."""
        return LearnerFeedState(self.committed.since(policy_version))

    def restore(self, state: LearnerFeedState, groups: dict[int, Group]) -> None:
        """Continue where `to_state` was taken, with the open groups of then."""
        self._complete = {group_id: groups[group_id] for group_id in state.complete}
        self._most_urgent = state.most_urgent
        self._shipped = {group_id: groups[group_id] for group_id in state.shipped}
        self._sent = {group_id: train_group(group) for group_id, group in self._shipped.items()}
        self.committed = state.committed
        self.learner_up, self.has_begun = state.learner_up, state.has_begun

    def validate(self) -> None:
        """Every group is complete or shipped, has the right number of samples, and is not too old."""
        self.committed.validate()
        urgencies = sorted(map(self._window.urgency, self._complete))
        assert sorted(self._most_urgent) == urgencies, (self._most_urgent, urgencies)
        assert self._window.num_open + len(self._shipped) <= self._config.max_open_groups
        assert list(self._sent) == list(self._shipped)
        for group in [*self._complete.values(), *self._shipped.values()]:
            self._validate_kept(group)
        for group in self._shipped.values():
            assert group.step is not None
            assert group.step - group.oldest_kept_version <= self._config.staleness.max_staleness, group.group_id

    def _validate_kept(self, group: Group) -> None:
        """There are `keep` of them; fewer only where a sample was lost."""
        shaping, num_kept = self._config.shaping, len(group.kept)
        assert shaping.smallest_group <= num_kept <= shaping.keep, group.group_id
        assert num_kept == shaping.keep or group.num_unscorable, group.group_id
        assert all(sample.reward is not None for sample, _ in group.kept), group.group_id
