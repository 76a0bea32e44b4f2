"""A learner process: the real decisions and the real coordinator of weights, on virtual time and without a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from darts_async.learner import moves
from darts_async.learner.boundary import Boundary
from darts_async.learner.state import LearnerState
from darts_async.protocol import TensorSpec, TrainGroup, WeightManifest
from darts_async.simulation.chaos.generator import GeneratorProcess
from darts_async.simulation.chaos.process import Process, Script
from darts_async.simulation.chaos.world import Crash, World
from darts_async.topology.links import WEIGHTS_LINK
from darts_async.transport import Event
from darts_async.weights.sending import events as weights
from darts_async.weights.sending.coordinator import Coordinator

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
    """Versions of damaged checkpoints, until training is past them."""
    model: Checkpoint | None = None
    """That the run leaves."""


class LearnerProcess(Process):
    """See the module."""

    def __init__(self, world: World, name: str, incarnation: int, links: Any, disk: Disk) -> None:
        super().__init__(world, name, incarnation, links)
        self._disk = disk
        self._config = world.config.learner
        self._state = LearnerState(world.config, Boundary(world.config), is_first=incarnation == 1)
        self._move: moves.Move = moves.Leave()
        self._coordinator = Coordinator(
            backend="gloo",
            interface="127.0.0.1",
            deadline_s=world.config.weights.deadline_s,
            absence_s=ABSENCE_S,
            first_epoch=int(world.now_s * 1000) + incarnation,
        )
        self._tasks: dict[int, tuple[str, ...]] = {}  # members by epoch
        self._history: list[tuple[int, ...]] = []
        self._deadline_asked: float | None = None

    def begin(self) -> None:
        """Load, then train."""
        super().begin()
        self.run(self._train())

    def handle(self, event: Event) -> None:
        """A group, or something about weights."""
        self._do(self._state.handle(event, newest_epoch=self._coordinator.newest_epoch))

    def _do(self, actions: Iterable[moves.Action]) -> None:
        for action in actions:
            match action:
                case moves.Tell(link, peer, message):
                    self.send(link, peer, message)
                case moves.Refuse(event, reason):
                    self.refuse(event, reason)
                case _:
                    self._feed(action)

    def validate(self) -> None:
        """The invariants of the decisions too."""
        super().validate()
        self._state.validate()
        self._coordinator.validate()

    def _train(self) -> Script:
        yield self.world.rng.uniform(0.0, LOADS_WITHIN_S)
        self._load()
        self.world.after(GENERATORS_COME_WITHIN_S, lambda: self._state.timed_out(moves.FOR_GENERATORS))
        while True:
            yield self._has_move
            match self._move:
                case moves.Train():
                    yield self.world.rng.uniform(0.0, TRAINS_WITHIN_S)
                case moves.TakeStep(groups):
                    self.reach("learner.before_step")
                    self._take_step(groups)
                    self.reach("learner.before_commit")
                    if len(self._history) == self._config.steps:
                        self.world.moment_came("last step taken")
                    self._do(self._state.step_taken())
                case moves.Publish(version):
                    self.reach("learner.before_publish")
                    self._execute(self._coordinator.offer(version, MANIFEST, self.world.now_s))
                case moves.Save() as save:
                    history, consumed = tuple(self._history), self._state.intake.consumed.intervals
                    self.run(self._write(Checkpoint(save.version, history, consumed), has_shaper=save.has_shaper))
                case moves.WriteModel():
                    self._disk.model = self._disk.checkpoints[-1]
                    self.world.moment_came("model written")
                    self._do(self._state.model_written())
                case moves.Leave():
                    return

    def _has_move(self) -> bool:
        self._move = self._state.next_move()
        return not isinstance(self._move, moves.Wait)

    def _load(self) -> None:
        self._damage()
        if not self._disk.checkpoints:
            self._do(self._state.loaded(policy_version=0))
            return
        last = self._disk.checkpoints[-1]
        self._history = list(last.history)
        self.reach("learner.before_saved")
        loaded = self._state.loaded(
            policy_version=last.policy_version,
            consumed=last.consumed,
            shaper_state=last.shaper_state,
            oldest_kept=self._oldest_kept,
        )
        self._do(loaded)

    def _damage(self) -> None:
        """The newest checkpoint may turn out to be damaged, if there is another point to continue from."""
        num_others = len(self._disk.checkpoints) - (not self._first_model_is_kept)
        if num_others > 0 and self.world.chance(self.world.plan.damaged_checkpoints):
            self.world.counts["checkpoints damaged"] += 1
            self._disk.damaged.append(self._disk.checkpoints.pop().policy_version)

    def _take_step(self, groups: Sequence[TrainGroup]) -> None:
        """Checks every group that enters a gradient."""
        version = len(self._history)
        trained = {group_id for group_ids in self._history for group_id in group_ids}
        for group in groups:
            assert group.step == version, f"group {group.group_id} of step {group.step} at {version}"
            assert group.group_id not in trained, f"group {group.group_id} is trained twice"
            trained.add(group.group_id)
            oldest, newest = int(group.versions.min()), int(group.versions.max())
            bound = self.world.config.staleness.max_staleness
            assert version - oldest <= bound, f"group {group.group_id}: {version} - {oldest} > {bound}"
            assert newest <= version, f"group {group.group_id}: a token of version {newest} at {version}"
            shaping = self.world.config.shaping
            assert shaping.smallest_group <= len(group.num_tokens) <= shaping.keep
        self._history.append(tuple(group.group_id for group in groups))

    def _write(self, checkpoint: Checkpoint, *, has_shaper: bool) -> Script:
        yield self.world.rng.uniform(0.0, WRITES_WITHIN_S)
        version, states = checkpoint.policy_version, self._state.shaper_states
        patience_s = self.world.now_s + SHAPER_PATIENCE_S
        if has_shaper:
            yield lambda: version in states or self.world.now_s >= patience_s
        yield lambda: not self.world.is_full
        self._disk.checkpoints.append(replace(checkpoint, shaper_state=states.get(version, b"")))
        del self._disk.checkpoints[: -self._config.keep_checkpoints]
        self._disk.damaged = [damaged for damaged in self._disk.damaged if damaged > version]
        self.reach("learner.before_saved")
        self._do(self._state.saved(version, oldest_kept=self._oldest_kept))

    @property
    def _oldest_kept(self) -> int:
        return 0 if self._first_model_is_kept else self._disk.checkpoints[0].policy_version

    @property
    def _first_model_is_kept(self) -> bool:
        return len(self._disk.checkpoints) + len(self._disk.damaged) < self._config.keep_checkpoints

    def _feed(self, event: weights.CoordinatorEvent) -> None:
        self._execute(self._coordinator.handle(event, self.world.now_s))

    def _execute(self, actions: Iterable[weights.CoordinatorAction]) -> None:
        for action in actions:
            match action:
                case weights.SendToMember(name, message):
                    self.send(WEIGHTS_LINK.name, name, message)
                case weights.FormGroup(epoch, _, members):
                    self._tasks[epoch] = members
                case weights.Broadcast(epoch, version):
                    self.run(self._broadcast(epoch, version, self._tasks[epoch]))
                case weights.Published(version) if version > self._state.newest_published:
                    self._do(self._state.published(version))
                case weights.Published(version) | weights.PublishFailed(version) if (
                    version == self._state.newest_published
                ):  # it was for late joiners, who may stay without
                    self._state.give_back()
                case weights.PublishFailed() | weights.Superseded():
                    self.world.counts["learners that gave up"] += 1
                    raise Crash
        self._keep_deadline()

    def settle(self) -> None:
        """Serve generators that joined after a version was published."""
        version = self._state.newest_published
        if not self._coordinator.is_busy and self._coordinator.lagging(version) and self._state.lend():
            self._execute(self._coordinator.offer(version, MANIFEST, self.world.now_s))

    def _keep_deadline(self) -> None:
        deadline = self._coordinator.deadline
        if deadline is not None and deadline != self._deadline_asked:
            self._deadline_asked = deadline
            self.world.at(deadline, lambda: self.guarded(self._tick_weights))

    def _tick_weights(self) -> None:
        self._deadline_asked = None
        self._execute(self._coordinator.tick(self.world.now_s))

    def _broadcast(self, epoch: int, version: int, members: tuple[str, ...]) -> Script:
        """The collective: all receivers get all buckets, or it breaks for all."""
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
            self._feed(weights.BroadcastFailed(epoch, "the broadcast broke"))
            return
        for receiver in receivers:
            checksum = version
            if world.chance(world.plan.wrong_checksums):
                world.counts["checksums wrong"] += 1
                checksum = version + 1
            receiver.guarded(partial(receiver.staged, epoch, version, [checksum]))
        self._feed(weights.BroadcastDone(epoch, (version,)))
