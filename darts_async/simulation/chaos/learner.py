"""A learner process: the real coordinator and the real intake, in a shell that does what `learner.process` and
`weights.publish` do, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np

from darts_async.learner.boundary import Boundary
from darts_async.learner.consumed_groups import ConsumedGroups
from darts_async.learner.intake import Intake
from darts_async.protocol import (
    CatchUp,
    GeneratorToLearner,
    Greet,
    GroupsCommitted,
    LearnerReady,
    LearnerToShaper,
    MemberJoined,
    ShaperSnapshot,
    ShaperToLearner,
    TensorSpec,
    TrainGroup,
    VersionPublished,
    VersionSaved,
    WeightManifest,
)
from darts_async.simulation.chaos.generator import GeneratorProcess
from darts_async.simulation.chaos.process import Process, Script, finish
from darts_async.simulation.chaos.world import Crash, World
from darts_async.topology.links import LEARNER_LINK, WEIGHTS_LINK
from darts_async.transport import Event, PeerDown, PeerUp, Received
from darts_async.weights.sending.coordinator import Coordinator
from darts_async.weights.sending.events import (
    Broadcast,
    BroadcastDone,
    BroadcastFailed,
    CoordinatorAction,
    FormGroup,
    MemberLost,
    MemberMessage,
    Published,
    PublishFailed,
    SendToMember,
    Superseded,
)
from darts_async.weights.sending.events import CoordinatorEvent as WeightEvent

LOADS_WITHIN_S = 0.5
TRAINS_WITHIN_S = 0.03
SENDS_WITHIN_S = 0.05
WRITES_WITHIN_S = 0.3
SHAPER_PATIENCE_S = 2.0
GENERATORS_COME_WITHIN_S = 3.0
ABSENCE_S = 4.0
MANIFEST = WeightManifest((TensorSpec("w", "float32", (4,)),), 4096)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What survives a learner."""

    policy_version: int
    history: tuple[tuple[int, ...], ...]
    """The groups of each step."""
    consumed: tuple[tuple[int, int], ...]
    shaper_state: bytes = b""


@dataclass(slots=True)
class Disk:
    """Survives every process."""

    checkpoints: list[Checkpoint] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    """Versions of checkpoints that are not whole, until training is past them."""
    model: Checkpoint | None = None
    """What the run leaves behind."""


class LearnerProcess(Process):
    """See the module."""

    def __init__(self, world: World, name: str, incarnation: int, links: Any, disk: Disk) -> None:
        super().__init__(world, name, incarnation, links)
        self._disk = disk
        self._config = world.config.learner
        self._intake = Intake()
        self._coordinator = Coordinator(
            backend="gloo",
            interface="127.0.0.1",
            deadline_s=world.config.weights.deadline_s,
            absence_s=ABSENCE_S,
            first_epoch=int(world.now_s * 1000) + incarnation,
        )
        self._tasks: dict[int, tuple[str, ...]] = {}  # members by epoch
        self._version = -1
        self._is_loaded = False
        self._history: list[tuple[int, ...]] = []
        self._is_locked = False
        self._publishing: int | None = None
        self._published = -1
        self._saved = 0
        self._floor = -1
        self._is_told_floor = False
        self._shaper: str | None = None
        self._shaper_states: dict[int, bytes] = {}
        self._boundary = Boundary(world.config)
        self._newest_version = -1
        self._early: dict[str, Received] = {}
        self._taken_up = LearnerReady(0)
        self._joined: set[str] = set()
        self._num_greetings = 0
        self._is_writing = False
        self._is_trained = False
        self._deadline_asked: float | None = None

    def begin(self) -> None:
        """Load, then train."""
        super().begin()
        self.run(self._train())

    def handle(self, event: Event) -> None:
        """A group, or something about weights."""
        match event:
            case Received(link=WEIGHTS_LINK.name, peer=peer, message=MemberJoined()) if not self._is_told_floor:
                self._early[peer] = event
            case Received(message=message) if reason := self._refusal(event):
                self.refuse(event, f"{type(message).__name__}: {reason}")
            case Received(link=LEARNER_LINK.name, peer=peer, message=Greet()):
                self._shaper = peer
                self._announce()
            case PeerUp(link=WEIGHTS_LINK.name, peer=peer):
                self._num_greetings += 1
                self.send(WEIGHTS_LINK.name, peer, Greet(self._num_greetings))
            case PeerDown(link=WEIGHTS_LINK.name, peer=peer):
                self._early.pop(peer, None)
                self._feed(MemberLost(peer))
            case Received(link=WEIGHTS_LINK.name, peer=peer, incarnation=incarnation, message=message):
                self._member_said(peer, incarnation, message)  # type: ignore[arg-type]
            case Received(link=LEARNER_LINK.name, message=CatchUp() as message):
                self._catch_up(message)
            case Received(link=LEARNER_LINK.name, message=TrainGroup() as group):
                self._intake.take(group)
            case Received(link=LEARNER_LINK.name, message=ShaperSnapshot(policy_version=version, state=state)):
                self._shaper_states[version] = state
                for older in sorted(self._shaper_states)[:-2]:  # as `Saver.take`
                    del self._shaper_states[older]

    def _catch_up(self, message: CatchUp) -> None:
        self._floor = max(self._floor, message.policy_version)
        self._newest_version = max(self._newest_version, message.newest_version)
        self._is_told_floor = True
        early, self._early = self._early, {}
        for joined in early.values():
            self.handle(joined)

    def _refusal(self, event: Received) -> str | None:
        if event.link == LEARNER_LINK.name:
            return self._boundary.of_shaper(cast(ShaperToLearner, event.message))
        return self._boundary.of_generator(
            cast(GeneratorToLearner, event.message),
            newest_version=max(self._newest_version, self._version),
            newest_epoch=self._coordinator.newest_epoch,
        )

    def validate(self) -> None:
        """The coordinator's invariants too."""
        super().validate()
        self._coordinator.validate()

    # --- training --------------------------------------------------------------------------------------------

    def _train(self) -> Script:
        yield self.world.rng.uniform(0.0, LOADS_WITHIN_S)
        self._restore()
        self._is_loaded = True
        self._announce()
        if self.incarnation == 1:
            late_s = self.world.now_s + GENERATORS_COME_WITHIN_S
            num_generators = self.world.config.roles.generator.replicas
            yield lambda: len(self._joined) == num_generators or self.world.now_s >= late_s
        yield lambda: self._is_told_floor
        self._is_locked = True
        self._offer()
        while self._version < self._config.steps:
            groups: list[TrainGroup] = []
            while len(groups) < self._config.groups_per_step:
                yield lambda: self._intake.has(self._version)
                groups.append(finish(self._intake.next(self._version)))
                yield self.world.rng.uniform(0.0, TRAINS_WITHIN_S)
            yield lambda: not self._is_locked
            self._is_locked = True
            self.reach("learner.before_step")
            self._take_step(groups)
            self.reach("learner.before_commit")
            self._commit(groups)
            self._offer()
            yield from self._checkpoint()
        yield lambda: not self._is_writing
        self._disk.model = self._disk.checkpoints[-1]
        self.world.moment_came("model written")
        self._is_trained = True
        self._is_saved(self._version)

    def _restore(self) -> None:
        self._damage()
        self._version = 0
        if self._disk.checkpoints:
            last = self._disk.checkpoints[-1]
            self._version, self._history = last.policy_version, list(last.history)
            self._intake.consumed = ConsumedGroups(last.consumed)
            next_group_id = max((stop for _, stop in last.consumed), default=0)
            self._taken_up = LearnerReady(self._version, last.shaper_state, next_group_id)
            self._is_saved(self._version)

    def _damage(self) -> None:
        """The newest checkpoint is found to be damaged. There is always another point to go on from."""
        num_others = len(self._disk.checkpoints) - (not self._first_model_is_kept)
        if num_others > 0 and self.world.chance(self.world.plan.damaged_checkpoints):
            self.world.counts["checkpoints damaged"] += 1
            self._disk.damaged.append(self._disk.checkpoints.pop().policy_version)

    def _take_step(self, groups: Sequence[TrainGroup]) -> None:
        """What must hold of everything that enters a gradient."""
        trained = {group_id for group_ids in self._history for group_id in group_ids}
        for group in groups:
            assert group.step == self._version, f"group {group.group_id} of step {group.step} at {self._version}"
            assert group.group_id not in trained, f"group {group.group_id} is trained twice"
            trained.add(group.group_id)
            oldest, newest = int(group.versions.min()), int(group.versions.max())
            bound = self.world.config.staleness.max_staleness
            assert self._version - oldest <= bound, f"group {group.group_id}: {self._version} - {oldest} > {bound}"
            assert newest <= self._version, f"group {group.group_id}: a token of version {newest} at {self._version}"
            shaping = self.world.config.shaping
            assert shaping.smallest_group <= len(group.num_tokens) <= shaping.keep
        self._history.append(tuple(group.group_id for group in groups))
        self._version += 1

    def _commit(self, groups: Sequence[TrainGroup]) -> None:
        group_ids = [group.group_id for group in groups]
        self._intake.commit(self._version - 1, group_ids)
        if self._version == self._config.steps:
            self.world.moment_came("last step taken")
        self._tell_shaper(GroupsCommitted(self._version - 1, np.array(group_ids, np.int64)))

    def _checkpoint(self) -> Script:
        if not self._config.is_saved(self._version):
            return
        yield lambda: not self._is_writing
        self._is_writing = True
        checkpoint = Checkpoint(self._version, tuple(self._history), self._intake.consumed.intervals, b"")
        self.run(self._write(checkpoint, has_shaper=self._shaper is not None))

    def _write(self, checkpoint: Checkpoint, *, has_shaper: bool) -> Script:
        yield self.world.rng.uniform(0.0, WRITES_WITHIN_S)
        patience_s = self.world.now_s + SHAPER_PATIENCE_S
        version = checkpoint.policy_version
        if has_shaper:
            yield lambda: version in self._shaper_states or self.world.now_s >= patience_s
        yield lambda: not self.world.is_full
        state = self._shaper_states.get(version, b"")
        self._disk.checkpoints.append(replace(checkpoint, shaper_state=state))
        del self._disk.checkpoints[: -self._config.keep_checkpoints]
        self._disk.damaged = [damaged for damaged in self._disk.damaged if damaged > version]
        self._is_saved(version)
        self._is_writing = False

    def _is_saved(self, version: int) -> None:
        self.reach("learner.before_saved")
        if version < self._config.steps or self._is_trained:
            self._saved = version
            if self._is_loaded:
                self._tell_shaper(VersionSaved(version, self._oldest_kept))

    @property
    def _oldest_kept(self) -> int:
        return 0 if self._first_model_is_kept else self._disk.checkpoints[0].policy_version

    @property
    def _first_model_is_kept(self) -> bool:
        return len(self._disk.checkpoints) + len(self._disk.damaged) < self._config.keep_checkpoints

    def _announce(self) -> None:
        if self._version < 0:
            return
        is_new = self._taken_up.policy_version == self._version
        self._tell_shaper(self._taken_up if is_new else LearnerReady(self._version))
        if self._published >= 0:
            self._tell_shaper(VersionPublished(self._published))
        if self._saved:
            self._tell_shaper(VersionSaved(self._saved, min(self._oldest_kept, self._saved)))

    def _tell_shaper(self, message: LearnerToShaper) -> None:
        if self._shaper is not None:
            self.send(LEARNER_LINK.name, self._shaper, message)

    # --- weights ---------------------------------------------------------------------------------------------

    def _member_said(self, peer: str, incarnation: int, message: GeneratorToLearner) -> None:
        self._feed(MemberMessage(peer, incarnation, message))
        if isinstance(message, MemberJoined):
            self._floor = max(self._floor, message.policy_version)
            self._joined.add(peer)

    def _offer(self) -> None:
        """Publish the present version; the parameters are locked."""
        if self._version < self._floor:
            self._is_locked = False
            return
        self.reach("learner.before_publish")
        self._publish()

    def _publish(self) -> None:
        self._publishing = self._version
        self._execute(self._coordinator.offer(self._version, MANIFEST, self.world.now_s))

    def _feed(self, event: WeightEvent) -> None:
        self._execute(self._coordinator.handle(event, self.world.now_s))

    def _execute(self, actions: Sequence[CoordinatorAction]) -> None:
        for action in actions:
            match action:
                case SendToMember(name, message):
                    self.send(WEIGHTS_LINK.name, name, message)
                case FormGroup(epoch, _, members):
                    self._tasks[epoch] = members
                case Broadcast(epoch, version):
                    self.run(self._broadcast(epoch, version, self._tasks[epoch]))
                case Published(version):
                    self._has_published(version)
                case PublishFailed(version) if self._published == version:
                    self._publishing, self._is_locked = None, False  # those who joined late go without
                case PublishFailed(version) | Superseded(version):
                    self.world.counts["learners that gave up"] += 1
                    raise Crash
        self._keep_deadline()

    def _has_published(self, version: int) -> None:
        self._publishing, self._is_locked = None, False
        if version > self._published:
            self._published = version
            self._tell_shaper(VersionPublished(version))

    def settle(self) -> None:
        """Serve those who joined after a version was published."""
        is_published = self._published == self._version >= 0
        is_free = is_published and not self._is_locked and self._publishing is None
        if is_free and not self._coordinator.is_busy and self._coordinator.lagging(self._version):
            self._is_locked = True
            self._publish()

    def _keep_deadline(self) -> None:
        deadline = self._coordinator.deadline
        if deadline is not None and deadline != self._deadline_asked:
            self._deadline_asked = deadline
            self.world.at(deadline, lambda: self.guarded(self._tick_weights))

    def _tick_weights(self) -> None:
        self._deadline_asked = None
        self._execute(self._coordinator.tick(self.world.now_s))

    def _broadcast(self, epoch: int, version: int, members: tuple[str, ...]) -> Script:
        """The collective: all get everything, or it breaks for all sooner or later."""
        world = self.world
        yield world.rng.uniform(0.0, SENDS_WITHIN_S)
        living = [world.living.get(name) for name in members]
        receivers = [process for process in living if isinstance(process, GeneratorProcess)]
        if world.chance(world.plan.hung_broadcasts):
            world.counts["broadcasts hung"] += 1
            return  # the deadline ends it
        is_broken = world.chance(world.plan.broken_broadcasts)
        if is_broken or len(receivers) < len(members) or not all(r.receives(epoch) for r in receivers):
            world.counts["broadcasts broken"] += 1
            for receiver in receivers:
                receiver.guarded(partial(receiver.broken, epoch))
            self._feed(BroadcastFailed(epoch, "the broadcast broke"))
            return
        for receiver in receivers:
            checksum = version
            if world.chance(world.plan.wrong_checksums):
                world.counts["checksums wrong"] += 1
                checksum = version + 1
            receiver.guarded(partial(receiver.staged, epoch, version, [checksum]))
        self._feed(BroadcastDone(epoch, (version,)))
