"""The learner's decisions about weight updates: the members of the group, and what to do after failures. Pure.

A *round* (see `rounds`) is one attempt to send one version to an *audience*: all members without it. It runs in an
*epoch*, a numbered broadcast group, which the next round reuses if it has the same audience. Before the commit, any
failure (a member lost, late, failed or with a wrong checksum, a broken broadcast) ends the round: its members are told,
the group is dropped, and a new round begins with the current members. After the commit the round cannot be undone: a
member that is lost is only dropped.

Blame. A broken collective shows at every member, so a reported failure alone does not end the membership. A late answer
or a wrong checksum does: the member is told and must join again, which a hanging member cannot do. Each of these is a
strike. The third strike under one version bars the member: it must end, and its next incarnation has no strikes.

Termination. Each phase has a deadline. A round that does not commit costs a strike of a member, the loss of one, or one
of `MAX_BROKEN_BROADCASTS` in a row with unchanged membership. So every offer ends in `Published`, `PublishFailed` or
`Superseded`, unless members join or vanish forever.

Messages of other epochs, versions, incarnations or phases are late, and are ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from darts_async.protocol import (
    EpochFormed,
    GeneratorToLearner,
    MemberJoined,
    ProbeMeasured,
    StoreValue,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightManifest,
    WeightsRefused,
)
from darts_async.weights.sending.events import (
    Broadcast,
    BroadcastDone,
    BroadcastFailed,
    CoordinatorAction,
    CoordinatorEvent,
    DropGroup,
    FormGroup,
    MemberDropped,
    MemberLost,
    MemberMessage,
    Published,
    PublishFailed,
    SendToMember,
    Superseded,
)
from darts_async.weights.sending.membership import Membership
from darts_async.weights.sending.rounds import Phase, Round

MAX_BROKEN_BROADCASTS = 3
"""An update is given up after this many broken broadcasts in a row with the same members."""


@dataclass(frozen=True, slots=True)
class _Offer:
    policy_version: int
    manifest: WeightManifest


@dataclass(frozen=True, slots=True)
class _Epoch:
    number: int
    incarnations: dict[str, int]  # of its members, the learner excepted


class Coordinator:
    """The state machine of the learner's rank 0. Each input returns the actions to take, in order.

    Args:
        interface: the learner's address, which is sent to the members.
        deadline_s: time limit of each phase.
        absence_s: time limit of the wait for a first or returning member. Default: `deadline_s`.
        first_epoch: larger than every epoch that members can have seen from an earlier learner.
    """

    def __init__(
        self,
        *,
        backend: Literal["gloo", "nccl"],
        interface: str,
        deadline_s: float,
        absence_s: float | None = None,
        first_epoch: int = 1,
    ) -> None:
        self._backend: Literal["gloo", "nccl"] = backend
        self._interface = interface
        self._deadline_s = deadline_s
        self._absence_s = deadline_s if absence_s is None else absence_s
        self._next_epoch = first_epoch
        self._members = Membership()
        self._target: _Offer | None = None
        self._queued: _Offer | None = None
        self._last_version: int | None = None
        self._epoch: _Epoch | None = None
        self._round: Round | None = None
        self._wait_until: float | None = None
        self._wait_since: float | None = None
        self._broken_broadcasts = 0
        self._dropped: dict[str, str] = {}  # since the offer: member -> reason
        self._actions: list[CoordinatorAction] = []

    @property
    def is_busy(self) -> bool:
        return self._target is not None

    @property
    def newest_epoch(self) -> int:
        """The number of the last epoch that was formed, or one below the first."""
        return self._next_epoch - 1

    @property
    def deadline(self) -> float | None:
        """The latest time for the next `tick`; None if there is no wait."""
        return self._round.deadline if self._round else self._wait_until

    def lagging(self, policy_version: int) -> list[str]:
        """Members that can receive the version and do not have it."""
        return self._members.lagging(policy_version)

    # --- inputs ----------------------------------------------------------------------------------------------

    def offer(self, policy_version: int, manifest: WeightManifest, now_s: float) -> list[CoordinatorAction]:
        """Begin to publish a version. During an update, the newest offer waits for its end."""
        offer = _Offer(policy_version, manifest)
        if self._target is None:
            self._start(offer, now_s)
        elif self._queued is None or policy_version > self._queued.policy_version:
            if self._queued is not None:
                self._actions.append(Superseded(self._queued.policy_version))
            self._queued = offer
        elif policy_version < self._queued.policy_version:
            self._actions.append(Superseded(policy_version))
        return self._take_actions()

    def withdraw(self, reason: str, now_s: float) -> list[CoordinatorAction]:
        """Give up the current update and the queued one. Committed weights stay in use."""
        if self._queued is not None:
            self._actions.append(Superseded(self._queued.policy_version))
            self._queued = None
        if self._round is not None:
            self._end_round(self._round, reason)
        if self._target is not None:
            self._fail(reason, now_s)
        return self._take_actions()

    def handle(self, event: CoordinatorEvent, now_s: float) -> list[CoordinatorAction]:
        match event:
            case MemberLost(name):
                self._leave(name, "its link is down", now_s)
            case MemberMessage(name, incarnation, MemberJoined() as joined):
                self._join(name, incarnation, joined, now_s)
            case MemberMessage(name, incarnation, message):
                if self._members.is_current(name, incarnation):
                    self._answer(name, message, now_s)
            case BroadcastDone(epoch, checksums):
                if self._round is not None and self._round.epoch == epoch and self._round.phase is Phase.TRANSFERRING:
                    self._round.expected = tuple(checksums)
                    self._check(self._round, now_s)
            case BroadcastFailed(epoch, error):
                if self._epoch is not None and self._epoch.number == epoch:
                    self._break(error, now_s)
        return self._take_actions()

    def tick(self, now_s: float) -> list[CoordinatorAction]:
        """Apply the deadline if it has passed."""
        if self._round is not None and now_s >= self._round.deadline:
            late = sorted(self._round.waiting_for)
            if late:
                reason = f"it took longer than {self._deadline_s:g} s {self._round.phase.value}"
                self._expel(self._round, late, reason, now_s)
            else:
                self._break(f"the learner's own broadcast took longer than {self._deadline_s:g} s", now_s)
        elif self._wait_until is not None and now_s >= self._wait_until:
            barred = ", ".join(self._members.names())
            absent = f"no generator was available to receive it within {self._absence_s:g} s"
            self._fail(f"only {barred} is available, and failed too often to receive it" if barred else absent, now_s)
        return self._take_actions()

    # --- members come and go ---------------------------------------------------------------------------------

    def _join(self, name: str, incarnation: int, joined: MemberJoined, now_s: float) -> None:
        if self._members.is_current(name, incarnation):
            self._members.holds(name, joined.policy_version)
            if self._round is None:
                self._drop_group()  # it has left the group
            return
        self._leave(name, "it was restarted", now_s)
        self._members.add(name, incarnation, joined.num_ranks, joined.policy_version)
        self._broken_broadcasts = 0
        if self._target is not None and self._round is None:
            self._begin_round(self._target, now_s)

    def _leave(self, name: str, reason: str, now_s: float) -> None:
        """A member has ended, and need not be told."""
        if not self._members.remove(name):
            return
        self._broken_broadcasts = 0
        current = self._round
        if self._wait_since is not None:
            self._wait(now_s)
        if current is None or name not in current.audience:
            return
        self._note_dropped(name, reason)
        current.forget(name)
        if current.is_committed:
            self._continue_committed(current, now_s)
        else:
            self._retry(current, f"{name} left: {reason}", now_s)

    def _expel(self, current: Round, names: Sequence[str], reason: str, now_s: float) -> None:
        """Members are at fault: tell them, so that they must join again."""
        self._broken_broadcasts = 0
        for name in names:
            self._strike(current, name, reason)
            self._members.remove(name)
            self._note_dropped(name, reason)
            self._tell_aborted(current, name, reason)
            current.forget(name)
        if current.is_committed:
            self._continue_committed(current, now_s)
        else:
            self._retry(current, f"{', '.join(names)} dropped: {reason}", now_s)

    def _strike(self, current: Round, name: str, reason: str) -> None:
        """Count a failure. After the last one the member must end: it may be the only member, and the update would
        wait for it in vain."""
        self._members.strike(name)
        if self._members.is_barred(name):
            why = f"it failed too often to receive them, the last time: {reason}"
            self._actions.append(SendToMember(name, WeightsRefused(current.policy_version, why)))

    def _note_dropped(self, name: str, reason: str) -> None:
        self._dropped[name] = reason
        self._actions.append(MemberDropped(name, reason))

    # --- answers of members ----------------------------------------------------------------------------------

    def _answer(self, name: str, message: GeneratorToLearner, now_s: float) -> None:
        current = self._round
        if isinstance(message, MemberJoined | StoreValue | ProbeMeasured):
            return
        if current is None or name not in current.audience or message.epoch != current.epoch:
            return
        if isinstance(message, UpdateFailed):
            self._failed(current, name, message.error, now_s)
        elif message.policy_version == current.policy_version:
            self._progress(current, name, message, now_s)

    def _progress(
        self, current: Round, name: str, message: UpdateReady | UpdateStaged | UpdateApplied, now_s: float
    ) -> None:
        match message, current.phase:
            case UpdateReady(), Phase.FORMING:
                current.waiting_for.discard(name)
                if not current.waiting_for:
                    current.enter(Phase.TRANSFERRING, now_s)
                    self._actions.append(Broadcast(current.epoch, current.policy_version))
            case UpdateStaged(), Phase.TRANSFERRING:
                current.stage(name, tuple(message.checksums.tolist()))
                self._check(current, now_s)
            case UpdateApplied(), Phase.APPLYING:
                current.apply(name, message.stall_s)
                self._members.applied(name, current.policy_version)
                self._finish_if_applied(current, now_s)

    def _check(self, current: Round, now_s: float) -> None:
        """Compare what has arrived with the learner's checksums; commit when all agree."""
        if wrong := current.wrong():
            reason = f"checksums of version {current.policy_version} differ from the learner's"
            self._expel(current, wrong, reason, now_s)
        elif current.can_commit():
            current.enter(Phase.APPLYING, now_s)
            for name in sorted(current.audience):
                self._actions.append(SendToMember(name, UpdateCommitted(current.epoch, current.policy_version)))

    def _failed(self, current: Round, name: str, error: str, now_s: float) -> None:
        if name in current.stalls_s:
            return  # it has applied the update: later failures do not concern this round
        reason = f"it failed {current.phase.value}: {error}"
        if current.is_committed:
            self._expel(current, [name], reason, now_s)
            return
        self._strike(current, name, reason)
        if self._members.is_barred(name):
            self._note_dropped(name, reason)
        self._retry(current, f"{name}: {reason}", now_s)

    def _break(self, error: str, now_s: float) -> None:
        """The learner's own part in the group failed. The member that caused it is unknown."""
        current = self._round
        if current is None or current.is_committed:
            self._drop_group()  # unusable, and not needed by a committed round
            return
        self._broken_broadcasts += 1
        if self._broken_broadcasts < MAX_BROKEN_BROADCASTS:
            self._retry(current, error, now_s)
        else:
            self._end_round(current, error)
            self._fail(f"the broadcast failed {MAX_BROKEN_BROADCASTS} times in a row, the last time: {error}", now_s)

    # --- rounds ----------------------------------------------------------------------------------------------

    def _start(self, offer: _Offer, now_s: float) -> None:
        if offer.policy_version != self._last_version:
            self._members.forgive()
        self._last_version = offer.policy_version
        self._target = offer
        self._broken_broadcasts = 0
        self._dropped = {}
        self._begin_round(offer, now_s)

    def _begin_round(self, target: _Offer, now_s: float) -> None:
        assert self._round is None
        audience = self._members.lagging(target.policy_version)
        if audience:
            self._wait_until = self._wait_since = None
            epoch = self._epoch_for(audience)
            self._round = Round(epoch.number, target.policy_version, set(audience), self._deadline_s, began=now_s)
            offered = UpdateOffered(epoch.number, target.policy_version, target.manifest, self._deadline_s)
            self._actions += [SendToMember(name, offered) for name in audience]
        elif (holders := self._members.holders(target.policy_version)) or self._members.ahead(target.policy_version):
            self._finish(Published(target.policy_version, tuple(holders), dict(self._dropped)), now_s)
        else:
            self._wait(now_s)

    def _wait(self, now_s: float) -> None:
        """Wait for a member that can receive the version, but not long if all members are barred, because they end."""
        if self._wait_since is None:
            self._wait_since = now_s
        until = self._wait_since + self._absence_s
        self._wait_until = min(until, now_s + self._deadline_s) if self._members.names() else until

    def _epoch_for(self, audience: list[str]) -> _Epoch:
        """The current epoch if it has exactly these members, otherwise a new one."""
        incarnations = self._members.incarnations(audience)
        if self._epoch is not None and self._epoch.incarnations == incarnations:
            return self._epoch
        self._drop_group()
        number, world_size = self._next_epoch, 1 + sum(map(self._members.num_ranks, audience))
        self._next_epoch += 1
        first_rank = 1
        for name in audience:
            formed = EpochFormed(number, first_rank, world_size, self._backend, self._interface, self._deadline_s)
            self._actions.append(SendToMember(name, formed))
            first_rank += self._members.num_ranks(name)
        self._actions.append(FormGroup(number, world_size, tuple(audience)))
        self._epoch = _Epoch(number, incarnations)
        return self._epoch

    def _retry(self, current: Round, reason: str, now_s: float) -> None:
        self._end_round(current, reason)
        assert self._target is not None
        self._begin_round(self._target, now_s)

    def _end_round(self, current: Round, reason: str) -> None:
        for name in sorted(current.audience):
            self._tell_aborted(current, name, reason)
        self._round = None
        self._drop_group()

    def _continue_committed(self, current: Round, now_s: float) -> None:
        """A member was lost after the commit: the group is unusable, but the others apply the update."""
        self._drop_group()
        if current.audience:
            self._finish_if_applied(current, now_s)
        else:
            self._retry(current, "no member is left", now_s)

    def _finish_if_applied(self, current: Round, now_s: float) -> None:
        if not current.waiting_for:
            self._round = None
            self._finish(current.published(self._dropped, now_s), now_s)

    def _fail(self, reason: str, now_s: float) -> None:
        assert self._target is not None
        version, members = self._target.policy_version, self._members.names()
        self._finish(PublishFailed(version, reason, dict(self._dropped), members), now_s)

    def _finish(self, outcome: Published | PublishFailed, now_s: float) -> None:
        self._actions.append(outcome)
        self._target = self._wait_until = self._wait_since = None
        if self._queued is not None:
            offer, self._queued = self._queued, None
            self._start(offer, now_s)

    def _tell_aborted(self, current: Round, name: str, reason: str) -> None:
        self._actions.append(SendToMember(name, UpdateAborted(current.epoch, current.policy_version, reason)))

    def _drop_group(self) -> None:
        if self._epoch is not None:
            self._actions.append(DropGroup(self._epoch.number))
            self._epoch = None

    def _take_actions(self) -> list[CoordinatorAction]:
        actions, self._actions = self._actions, []
        return actions

    def validate(self) -> None:
        assert not self._actions
        assert (self.deadline is not None) == self.is_busy
        assert self._queued is None or self.is_busy
        assert not (self._round and self._wait_until is not None)
        assert self._epoch is None or self._epoch.number < self._next_epoch
        if (current := self._round) is None:
            return
        current.validate()
        assert self._target is not None
        assert self._target.policy_version == current.policy_version
        assert all(name in self._members for name in current.audience)
        if not current.is_committed:
            assert self._epoch is not None
            assert self._epoch.number == current.epoch
            assert self._epoch.incarnations == self._members.incarnations(sorted(current.audience))
