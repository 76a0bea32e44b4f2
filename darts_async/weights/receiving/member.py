"""A generator's decisions in weight updates: its answers, its part in the group, the version in use. Pure.

Each input returns the actions to take, in order. A failure before the commit costs only the update: the member reports
it, leaves the group and asks to join the next one.

Invariants: the transfer only gets commands of the present epoch; an update that is being applied is finished, whatever
arrives; an offer that arrives meanwhile waits.
"""

from dataclasses import dataclass

from darts_async.protocol import (
    EpochFormed,
    GeneratorToLearner,
    LearnerToGenerator,
    MemberJoined,
    StoreValue,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
)

Command = EpochFormed | StoreValue | UpdateOffered | UpdateCommitted | UpdateAborted
"""To a transfer."""

Report = StoreValue | UpdateReady | UpdateStaged | UpdateFailed
"""Of a transfer."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the learner."""

    message: GeneratorToLearner


@dataclass(frozen=True, slots=True)
class Order:
    """Tell the transfer."""

    command: Command


@dataclass(frozen=True, slots=True)
class Apply:
    """Put the committed version in use at the next step boundary; answered by `applied` or `apply_failed`."""

    policy_version: int


Action = Tell | Order | Apply


class Member:
    """See the module. Its transfer has `num_ranks` ranks in the broadcast group."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self.policy_version = -1
        """In use; -1 before the first."""
        self._epoch: int | None = None  # of the group that it is in
        self._last_epoch = -1
        self._update: UpdateOffered | None = None
        self._is_staged = False  # all of the update has come
        self._applying: UpdateOffered | None = None
        self._postponed: UpdateOffered | None = None

    def join(self) -> list[Action]:
        """Ask to be a member. To be called whenever the link to the learner comes up."""
        left = self.leave("joins again")
        self._last_epoch = -1  # it may be another learner, with a clock of its own
        return [*left, self._ask()]

    def leave(self, reason: str) -> list[Action]:
        """End the current update and leave the group: the link to the learner is down, or the generator closes."""
        left, version = self._epoch, self._version_under_way
        self._epoch = self._update = self._postponed = None
        return [] if left is None else [Order(UpdateAborted(left, version, reason))]

    def handle(self, message: LearnerToGenerator) -> list[Action]:
        """Handle a message of the learner. Messages of past epochs change nothing."""
        match message:
            case EpochFormed(epoch) if epoch > self._last_epoch:
                left = self.leave(f"epoch {epoch} was formed")
                self._epoch = self._last_epoch = epoch
                return [*left, Order(message)]
            case StoreValue(epoch) if epoch == self._epoch:
                return [Order(message)]
            case UpdateOffered():
                return self._consider(message)
            case UpdateCommitted():
                return self._commit(message)
            case UpdateAborted(epoch, _, reason) if self._epoch in (epoch, None):  # None: it was dropped, too
                return [*self.leave(reason), self._ask()]
        return []

    def report(self, report: Report) -> list[Action]:
        """Handle a report of the transfer. Reports of a group that was left change nothing."""
        if report.epoch != self._epoch:
            return []
        match report:
            case UpdateFailed(epoch, _, error):
                return self._fail(epoch, error)
            case UpdateReady() | UpdateStaged() if self._update is None:
                return []
            case UpdateStaged():
                self._is_staged = True
        return [Tell(report)]

    def applied(self, stall_s: float) -> list[Action]:
        """The version of the last `Apply` is in use; nothing was decoded for `stall_s`."""
        epoch, self.policy_version = self._end_update()
        return [Tell(UpdateApplied(epoch, self.policy_version, stall_s)), *self._resume()]

    def apply_failed(self, error: str) -> list[Action]:
        """The version of the last `Apply` could not be put in use. The one before still is."""
        epoch, _ = self._end_update()
        return [*self._fail(epoch, error), *self._resume()]

    def validate(self) -> None:
        assert self._epoch in (None, self._last_epoch)
        assert self._epoch is not None or (self._update is None and self._postponed is None)
        assert self._update is None or self._update.epoch == self._epoch
        assert self._postponed is None or (self._applying is not None and self._postponed.epoch == self._epoch)

    # --- an update -------------------------------------------------------------------------------------------

    def _consider(self, offered: UpdateOffered) -> list[Action]:
        if offered.epoch != self._epoch:
            if offered.epoch < self._last_epoch:
                return []
            error = f"it is not in the group of epoch {offered.epoch}"
            return [Tell(UpdateFailed(offered.epoch, offered.policy_version, error))]
        if self._applying is not None:
            self._postponed = offered
            return []
        self._update, self._is_staged = offered, False
        return [Order(offered)]

    def _commit(self, committed: UpdateCommitted) -> list[Action]:
        update = self._update
        wanted = committed.epoch, committed.policy_version
        if update is None or not self._is_staged or (update.epoch, update.policy_version) != wanted:
            return []
        self._update, self._applying = None, update
        return [Order(committed), Apply(update.policy_version)]

    def _end_update(self) -> tuple[int, int]:
        """Epoch and version of what was applied."""
        update, self._applying = self._applying, None
        assert update is not None, "it was told to apply one"
        return update.epoch, update.policy_version

    def _resume(self) -> list[Action]:
        """Consider what was offered meanwhile."""
        offered, self._postponed = self._postponed, None
        return [] if offered is None else self._consider(offered)

    # --- membership ------------------------------------------------------------------------------------------

    def _ask(self) -> Action:
        return Tell(MemberJoined(self.policy_version, self._num_ranks))

    def _fail(self, epoch: int, error: str) -> list[Action]:
        """Report that this member cannot continue in an epoch, and ask for the next."""
        if epoch != self._epoch:
            return []  # it has left already
        failed = Tell(UpdateFailed(epoch, self._version_under_way, error))
        return [*self.leave(error), failed, self._ask()]

    @property
    def _version_under_way(self) -> int:
        return self._update.policy_version if self._update is not None else self.policy_version
