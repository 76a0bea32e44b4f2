"""The valid sequences of rank 0's orders: the grammar of its link to another rank.

    Prepare  ( StoreValue | AddGroups TrainGroup+ | FinishStep | SaveCheckpoint | GatherWeights )*  Dismiss

StoreValue and GatherWeights may come anywhere after Prepare, Dismiss at any time.
"""

from darts_async.protocol import (
    AddGroups,
    Dismiss,
    FinishStep,
    GatherWeights,
    LeaderToRank,
    Prepare,
    SaveCheckpoint,
    StoreValue,
    TrainGroup,
)


class OrderGrammar:
    """Reads one order after another. `max_groups` may be added together."""

    def __init__(self, max_groups: int) -> None:
        self._max_groups = max_groups
        self._is_prepared = False
        self._groups_due = 0

    def refusal(self, order: LeaderToRank) -> str | None:
        """Why an order is invalid; None if it may be the next one."""
        match order:
            case Dismiss():
                return None
            case Prepare(checkpoint=checkpoint):
                return self._prepare(checkpoint)
            case _ if not self._is_prepared:
                return "before Prepare"
            case StoreValue() | GatherWeights():
                return None
            case TrainGroup():
                self._groups_due -= 1
                return None if self._groups_due >= 0 else "a group without AddGroups"
            case AddGroups() | FinishStep() | SaveCheckpoint() if self._groups_due:
                return f"while {self._groups_due} groups are due"
            case AddGroups(num_groups=num_groups):
                self._groups_due = num_groups
                return None if 1 <= num_groups <= self._max_groups else f"{num_groups} groups"
            case FinishStep() | SaveCheckpoint():
                return None

    def _prepare(self, checkpoint: str) -> str | None:
        if self._is_prepared:
            return "twice"
        self._is_prepared = True
        return f"{checkpoint!r} is not the name of a checkpoint" if "/" in checkpoint or checkpoint == ".." else None
