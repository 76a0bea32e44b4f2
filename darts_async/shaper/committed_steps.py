"""Steps that were taken and could be lost: what a learner that comes back from a checkpoint has to train again.

    0 ------- oldest_kept ------- durable ------- position ------- num_steps
      in every     |  in the newest  |  taken by the   |  taken by a learner
      checkpoint   |  checkpoint     |  present        |  that died, to be
                   |                 |  learner        |  taken again
                   `------------------ kept here --------------------'

The newest checkpoint may turn out to be damaged, and the learner then comes back at an older one. So the groups of a
step are kept, with all their tokens, until the oldest checkpoint that is kept holds it, however often the learner dies.
A learner that takes steps again is sent the groups of the next ones only, so that nothing piles up between the two.

A life of the run that was taken up from a checkpoint knows no group before that, though older checkpoints are kept.
Where a learner comes back at one of these, the run is taken up once more.

Memory: 12 bytes per trained token. There is a checkpoint every `checkpoint_every` steps, and each is written before the
next is begun, so at most `(keep_checkpoints + 1) * checkpoint_every` steps are kept.
"""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from darts_async.protocol import TrainGroup

REPLAYED_AHEAD = 2
"""Steps that a learner which catches up is sent before it has taken them."""


class CommittedSteps(Struct, eq=False):
    """The steps of the surviving history; encoded as they are."""

    groups: dict[int, list[TrainGroup]] = {}
    """By step, from `oldest_kept` to `num_steps`."""
    num_sent: int = 0
    """Steps whose groups the present learner has been sent, for the first time or again."""
    oldest_kept: int = 0
    durable: int = 0
    position: int = 0
    num_steps: int = 0

    @property
    def is_behind(self) -> bool:
        """Whether the learner takes steps again."""
        return self.position < self.num_steps

    def group_ids(self, step: int) -> list[int]:
        """The groups of a step that may have to be taken again; none if it has not been taken."""
        return [group.group_id for group in self.groups.get(step, [])]

    def add(self, step: int, groups: Sequence[TrainGroup]) -> None:
        """The learner has taken a step for the first time."""
        assert step == self.position == self.num_steps, (step, self.position, self.num_steps)
        self.groups[step] = list(groups)
        self.num_steps = self.position = self.num_sent = step + 1

    def repeat(self, step: int, group_ids: Iterable[int]) -> None:
        """The learner has taken a step that another one before it had taken."""
        assert step == self.position < self.num_steps, (step, self.position, self.num_steps)
        assert set(group_ids) == set(self.group_ids(step)), step
        self.position = step + 1

    def saved(self, policy_version: int, oldest_kept: int) -> None:
        """A checkpoint covers the steps before this version, and each one that is kept those before `oldest_kept`.
        After a stop that may be more than were taken here; these do not count."""
        self.oldest_kept = max(self.oldest_kept, min(oldest_kept, self.position))
        for step in [step for step in self.groups if step < self.oldest_kept]:
            del self.groups[step]
        self.durable = max(self.durable, min(policy_version, self.position))

    def can_rewind(self, policy_version: int) -> bool:
        """Whether all groups are here that a learner which comes back at this version has to train again."""
        return policy_version >= self.oldest_kept

    def rewind(self, policy_version: int) -> bool:
        """A learner is up, and has taken this many steps. Returns whether that undoes any."""
        assert self.can_rewind(policy_version), (policy_version, self.oldest_kept)
        is_rewind = policy_version < self.position
        self.position = self.num_sent = policy_version
        self.durable = min(self.durable, policy_version)
        return is_rewind

    def to_send(self) -> list[TrainGroup]:
        """The groups that the learner is to be sent now, of steps that it takes again."""
        end = min(self.position + REPLAYED_AHEAD, self.num_steps)
        steps = range(self.num_sent, end)
        self.num_sent = max(self.num_sent, end)
        return [group for step in steps for group in self.groups[step]]

    def since(self, policy_version: int) -> "CommittedSteps":
        """The same for a learner that continues from a checkpoint of this version."""
        groups = {step: groups for step, groups in self.groups.items() if step >= policy_version}
        there = dict.fromkeys(("num_sent", "oldest_kept", "durable", "position"), policy_version)
        return CommittedSteps(groups, **there, num_steps=self.num_steps)

    def jump(self, policy_version: int) -> None:
        """The learner is at a version, and how it got there is not known: nothing before it can be taken again."""
        self.groups = {}
        self.num_sent = self.oldest_kept = self.durable = self.position = self.num_steps = policy_version

    def validate(self) -> None:
        """Nothing that may have to be taken again is missing, and nothing else is kept."""
        assert self.oldest_kept <= self.durable <= self.position <= self.num_sent <= max(self.num_steps, self.position)
        assert self.position <= self.num_steps
        assert sorted(self.groups) == list(range(self.oldest_kept, self.num_steps)), sorted(self.groups)
