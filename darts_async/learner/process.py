"""The learner process: groups in, versions out.

    for each step:  B groups, forward and backward as they arrive  ->  optimiser step  ->  commit  ->  publish

The broadcast of a version reads the parameters while the next step's forward and backward passes run; only the next
optimiser step waits for it. One task, `_train`, owns the trainer; `_weights` is locked from the optimiser step until
every generator has the result, so that nobody reads parameters of no version.

Several ranks. This is rank 0, which alone talks to shaper and generators and has the others do the same on their rows
(`rank_leader`, `rank_follower`). One that is gone, or late, ends this process, and the whole learner is started again.

Restarts. A run directory with checkpoints is continued from the newest whole one: groups that it has consumed are not
trained again, however often the shaper sends them. The steps since then are taken again, with the same groups, and
nothing is published before the version that generators may use already: versions never go back anywhere else. That
version is published again, because the steps may not have come out the same to the last bit.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import ParamSpec, TypeVar, cast

import numpy as np
import structlog
import transformers

from darts_async.actor import Actor, Gauges, Runtime, main
from darts_async.errors import ConfigError
from darts_async.learner.boundary import Boundary
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.saver import Saver
from darts_async.learner.consumed_groups import ConsumedGroups
from darts_async.learner.intake import WARN_AFTER_S, Intake
from darts_async.learner.model import DTYPES
from darts_async.learner.nonfinite import stop_training
from darts_async.learner.packing.batch import num_packed_tokens
from darts_async.learner.probe import packed_reference
from darts_async.learner.rank_follower import MAX_ORDERS, FollowerActor
from darts_async.learner.rank_leader import Team
from darts_async.learner.ranks.rank_info import Place
from darts_async.learner.step import Trainer
from darts_async.learner.step_meter import StepMeter
from darts_async.learner.trainer_setup import make_trainer
from darts_async.models.location import resolve_model_path, vocab_size
from darts_async.protocol import (
    AddGroups,
    CatchUp,
    FinishStep,
    GatherWeights,
    GeneratorToLearner,
    Greet,
    GroupsCommitted,
    LeaderToRank,
    LearnerReady,
    LearnerToGenerator,
    MemberJoined,
    Message,
    RankToLeader,
    ShaperSnapshot,
    ShaperToLearner,
    Shutdown,
    StepCompleted,
    TrainGroup,
    VersionPublished,
    VersionSaved,
)
from darts_async.topology.links import LEARNER_LINK, RANKS_LINK, WEIGHTS_LINK
from darts_async.topology.roles import LEARNER
from darts_async.topology.run_files import CHECKPOINTS_DIR, MODEL_DIR
from darts_async.transport import Event, PeerDown, PeerUp, Received
from darts_async.weights.probe import Examiner, tolerance_of
from darts_async.weights.sending.publish import Publisher
from darts_async.weights.sending.source import WeightSource
from darts_async.wire.atomic_dir import remove_leftovers, remove_staging

MAX_TOGETHER = MAX_ORDERS // 4
"""Groups in a pass: the other ranks are at most one pass behind, and hold the orders of both."""

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()


class LearnerActor:
    """See the module."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._config = runtime.config.learner
        self._dtype = DTYPES[runtime.config.model.dtype]
        self._boundary = Boundary(runtime.config, _vocab_size(runtime))
        self._intake = Intake()
        self._trainer: Trainer | None = None
        self._team = Team(
            _other_ranks(runtime),
            epoch=runtime.incarnation,
            interface=runtime.host,
            send=self._send_rank,
            deadline_s=self._config.rank_deadline_s,
        )
        self._saver: Saver | None = None
        generators = runtime.config.roles.generator
        self._publisher = Publisher(
            runtime.config.weights,
            runtime.host,
            self._send_generator,
            absence_s=generators.restart.absence_s(generators.start_timeout_s),
        )
        tolerance_nats = tolerance_of(runtime.config.weights, runtime.config.model.dtype)
        self._examiner = Examiner(self._send_generator, tolerance_nats)
        self._meter = StepMeter(runtime.clock)
        self._weights = asyncio.Lock()
        self._joined: set[str] = set()
        self._all_joined = asyncio.Event()
        self._published = -1
        self._saved = self._oldest_kept = 0
        self._floor = -1  # nothing older is published
        self._newest_version = -1  # and no generator can hold a later one
        self._early: dict[str, Received] = {}
        """Members that have joined before that was known, by name."""
        self._told_floor = asyncio.Event()
        self._shaper: str | None = None
        self._taken_up = LearnerReady(0)
        """Of the checkpoint that this incarnation began with."""
        self._num_tokens = 0
        self._num_greetings = 0
        self._state = "loading"
        self._leaving: Shutdown | None = None
        self._asked_to_leave = asyncio.Event()
        self._stepping = asyncio.Lock()
        """Held while parameters change and until the change has been told."""
        self._takes_no_more = False
        self._trained = False

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Load the model, or continue from a checkpoint; publish its weights, take groups."""
        trainer = await self._load()
        self._trainer = trainer
        keep_current = self._publisher.run(lambda: self._source(trainer), self._weights)
        tasks.create_task(self._train(tasks, trainer), name="train")
        tasks.create_task(keep_current, name="late joiners")
        tasks.create_task(self._leave_a_checkpoint(tasks, trainer), name="leave a checkpoint")
        self._announce()

    async def _load(self) -> Trainer:
        root = self._runtime.run_dir / CHECKPOINTS_DIR
        model_dir = resolve_model_path(self._runtime.config.model.path)
        keep = self._config.keep_checkpoints
        await asyncio.to_thread(remove_leftovers, root)
        path = await asyncio.to_thread(checkpoint.latest, root, keep)
        self._team.prepare(path.name if path is not None else "")
        trainer = await self._in_thread(make_trainer, self._runtime.config, model_dir, self._team.ranks)
        if path is not None:
            manifest = await self._in_thread(checkpoint.restore, path, trainer)
            self._intake.consumed = ConsumedGroups(manifest.consumed)
            shaper_state = await asyncio.to_thread(checkpoint.shaper_state, path)
            next_group_id = max((stop for _, stop in manifest.consumed), default=0)
            self._taken_up = LearnerReady(trainer.policy_version, shaper_state, next_group_id)
            oldest_kept = await asyncio.to_thread(checkpoint.oldest_kept, root, keep)
            self._is_saved(trainer.policy_version, oldest_kept)
            log.info("resumed", path=str(path), policy_version=trainer.policy_version)
        await self._team.ready()
        self._saver = Saver(
            root,
            self._team,
            tokenizer_dir=model_dir,
            dtype=self._dtype,
            keep=keep,
            saved=self._is_saved,
            patience=self._runtime.patience,
        )
        return trainer

    def handle(self, event: Event) -> None:
        """A group, or something about weights, or about the other ranks."""
        match event:
            case Received(link=WEIGHTS_LINK.name, peer=peer, message=MemberJoined()) if not self._told_floor.is_set():
                self._early[peer] = event
            case Received(message=message) if reason := self._refusal(event):
                self._runtime.refuse(event, f"{type(message).__name__}: {reason}")
            case Received(link=LEARNER_LINK.name):
                self._hear_shaper(event)
            case Received(link=WEIGHTS_LINK.name, peer=peer, incarnation=incarnation, message=message):
                self._publisher.handle(peer, incarnation, cast(GeneratorToLearner, message))
                self._examiner.handle(peer, cast(GeneratorToLearner, message))
                if isinstance(message, MemberJoined):
                    self._member_joined(peer, message.policy_version)
            case Received(link=RANKS_LINK.name, peer=peer, message=message):
                self._team.handle(peer, cast(RankToLeader, message))
            case PeerUp(link=WEIGHTS_LINK.name, peer=peer):
                self._num_greetings += 1
                self._send_generator(peer, Greet(self._num_greetings))
            case PeerDown(link=WEIGHTS_LINK.name, peer=peer, reason=reason):
                log.warning("peer_lost", peer=peer, reason=reason)
                self._early.pop(peer, None)
                self._publisher.peer_lost(peer)
            case PeerDown(link=RANKS_LINK.name, peer=peer, reason=reason):
                self._team.lost(peer, reason)

    def _refusal(self, event: Received) -> str | None:
        """Why a message cannot be meant."""
        match event.link:
            case LEARNER_LINK.name:
                return self._boundary.of_shaper(cast(ShaperToLearner, event.message))
            case WEIGHTS_LINK.name:
                return self._boundary.of_generator(
                    cast(GeneratorToLearner, event.message),
                    newest_version=max(self._newest_version, self._policy_version),
                    newest_epoch=self._publisher.newest_epoch,
                )
        return self._boundary.of_rank(cast(RankToLeader, event.message))

    def _hear_shaper(self, event: Received) -> None:
        match event:
            case Received(peer=peer, message=Greet()):
                self._shaper = peer
                self._announce()
            case Received(message=CatchUp(policy_version=version, newest_version=newest_version)):
                self._floor = max(self._floor, version)
                self._newest_version = max(self._newest_version, newest_version)
                self._told_floor.set()
                early, self._early = self._early, {}
                for joined in early.values():
                    self.handle(joined)
            case Received(message=TrainGroup() as group):
                self._intake.take(group)
            case Received(message=ShaperSnapshot() as snapshot) if self._saver is not None:
                self._saver.take(snapshot)

    def tick(self, now_s: float) -> None:
        """Nothing to do."""

    def shutdown(self, message: Shutdown) -> None:
        """Leave; a complete run has its last checkpoint and its model, one that is stopped a checkpoint."""
        self._leaving = message
        self._asked_to_leave.set()

    @property
    def done(self) -> bool:
        """A complete run ends when its model is written, one that is stopped when a checkpoint is, any other at
        once."""
        if self._leaving is None or self._trained:
            return self._leaving is not None
        return not self._leaving.finished and not self._leaves_a_checkpoint

    @property
    def _leaves_a_checkpoint(self) -> bool:
        """Whether one is to be written yet. Of a step that the shaper has given up there must be none."""
        leaving = self._leaving
        is_theirs = leaving is not None and leaving.num_steps == self._policy_version
        return is_theirs and self._policy_version > self._saved and self._saver is not None

    def gauges(self) -> Gauges:
        """For the status."""
        is_behind = 0 <= self._policy_version < self._floor
        state = "catching up" if is_behind else self._state
        return Gauges(state, self._policy_version, self._num_tokens, self._intake.num_waiting)

    @property
    def _policy_version(self) -> int:
        return self._trainer.policy_version if self._trainer is not None else -1

    async def close(self) -> None:
        """Leave the groups."""
        if self._leaving is not None:
            self._team.dismiss()
        self._team.abort("rank 0 leaves")
        await self._publisher.close()

    # --- the trainer's owner ---------------------------------------------------------------------------------

    async def _train(self, tasks: asyncio.TaskGroup, trainer: Trainer) -> None:
        if self._runtime.incarnation == 1:
            await self._until_generators_joined()
        await self._until_told_floor()
        if not self._told_floor.is_set():  # the run has ended before the shaper had a word for this learner
            await self._finish_if_trained(trainer)
            return
        await self._weights.acquire()
        await self._offer(tasks, trainer)
        while trainer.policy_version < self._config.steps:
            groups = await self._add_groups(trainer)
            self._state = "publishing"
            with self._runtime.clock.waiting("waits for publishing"):
                await self._weights.acquire()
            async with self._stepping:
                if self._takes_no_more:
                    return
                await self._take_step(trainer, groups)
            await self._offer(tasks, trainer)
            await self._checkpoint(tasks, trainer)
        await self._finish()

    async def _take_step(self, trainer: Trainer, groups: list[TrainGroup]) -> None:
        """Change the parameters, and tell the shaper."""
        self._runtime.faults.reach("learner.before_step")
        metrics = await self._finish_step(trainer)
        if trainer.num_skipped_in_a_row >= self._config.max_skipped_steps:
            raise stop_training(self._runtime.run_dir, groups, trainer.num_skipped_in_a_row)
        self._runtime.faults.reach("learner.before_commit")
        self._commit(trainer.policy_version - 1, groups, metrics)

    async def _leave_a_checkpoint(self, tasks: asyncio.TaskGroup, trainer: Trainer) -> None:
        """When the run is stopped: of the last step that was taken. How long that may take is for the launcher."""
        await self._asked_to_leave.wait()
        async with self._stepping:
            self._takes_no_more = True
        if self._leaving is not None and not self._leaving.finished and self._leaves_a_checkpoint:
            self._state = "saving"
            assert self._saver is not None
            await self._saver.settled()
            if self._leaves_a_checkpoint:  # it was not of this version
                consumed = self._intake.consumed.intervals
                has_shaper = self._saver.has_shaper_state(trainer.policy_version)  # it is leaving: it says no more
                await self._saver.save(tasks, trainer, consumed, has_shaper=has_shaper)
                await self._saver.settled()

    async def _finish(self) -> None:
        """Leave the model behind: when the shaper hears that the last version is saved, it has nothing left to do."""
        self._state = "finished"
        assert self._saver is not None
        await self._saver.settled()
        last = checkpoint.directory_of(self._runtime.run_dir / CHECKPOINTS_DIR, self._config.steps)
        with checkpoint.naming_failures(self._runtime.run_dir):
            model = self._runtime.run_dir / MODEL_DIR
            write, undo = partial(checkpoint.export, last, model), partial(remove_staging, model)
            await asyncio.to_thread(self._runtime.patience.write, model, write, undo)
        self._trained = True
        self._is_saved(self._config.steps, self._oldest_kept)

    async def _finish_if_trained(self, trainer: Trainer) -> None:
        if self._leaving is not None and self._leaving.finished and trainer.policy_version == self._config.steps:
            await self._finish()

    async def _until_told_floor(self) -> None:
        """Or asked to leave. The shaper may be away for as long as the launcher lets it."""
        told = asyncio.create_task(self._told_floor.wait(), name="until told")
        leave = asyncio.create_task(self._asked_to_leave.wait(), name="until asked to leave")
        try:
            while not self._told_floor.is_set() and not self._asked_to_leave.is_set():
                done, _ = await asyncio.wait((told, leave), timeout=WARN_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    log.warning("no_word_of_the_shaper", waited_s=WARN_AFTER_S)
        finally:
            told.cancel()
            leave.cancel()

    async def _add_groups(self, trainer: Trainer) -> list[TrainGroup]:
        """Forward and backward of the groups of one step, as they arrive. Those that have come meanwhile go together:
        who waits for groups has one at a time at once, who lags behind catches up with larger passes."""
        groups: list[TrainGroup] = []
        while len(groups) < self._config.groups_per_step:
            step = trainer.policy_version
            self._state = "training" if self._intake.has(step) else "waiting for groups"
            with self._runtime.clock.waiting("waits for groups"):
                first = await self._intake.next(step)
            num_free = self._tokens_per_pass - num_packed_tokens(first)
            max_others = min(self._config.groups_per_step - len(groups), MAX_TOGETHER) - 1
            together = [first, *self._intake.others(step, max_others, num_free)]
            self._state = "training"
            num_tokens = sum(len(group.token_ids) for group in together)
            ids = [group.group_id for group in together]
            with self._runtime.clock.busy("train", groups=ids, tokens=num_tokens):
                self._team.tell(AddGroups(len(together)))
                for group in together:
                    self._team.tell(group)
                await self._in_thread(trainer.add_groups, together)
            groups += together
            self._num_tokens += num_tokens
        return groups

    @property
    def _tokens_per_pass(self) -> int:
        """Of all ranks."""
        return self._config.tokens_per_micro_batch * self._team.place.num_ranks

    async def _finish_step(self, trainer: Trainer) -> dict[str, float]:
        """The optimiser step, on all ranks."""
        step = trainer.policy_version
        self._team.tell(FinishStep(step))
        for tally in await self._team.tallies(step):
            trainer.tally.merge(tally)
        with self._runtime.clock.busy("step", step=step):
            metrics = await self._in_thread(trainer.finish_step)
        return metrics | self._meter.metrics()

    def _commit(self, step: int, groups: list[TrainGroup], metrics: dict[str, float]) -> None:
        group_ids = [group.group_id for group in groups]
        self._intake.commit(step, group_ids)
        self._send_shaper(GroupsCommitted(step, np.array(group_ids, np.int64)))
        self._runtime.tell_launcher(StepCompleted(step, {f"learner/{name}": x for name, x in metrics.items()}))

    async def _checkpoint(self, tasks: asyncio.TaskGroup, trainer: Trainer) -> None:
        if not self._config.is_saved(trainer.policy_version):
            return
        assert self._saver is not None
        with self._runtime.clock.busy("checkpoint", policy_version=trainer.policy_version):
            has_shaper = self._shaper is not None
            await self._saver.save(tasks, trainer, self._intake.consumed.intervals, has_shaper=has_shaper)

    def _is_saved(self, version: int, oldest_kept: int) -> None:
        """A checkpoint of this version is on the disk. Of the last version nothing is said before the model is."""
        self._runtime.faults.reach("learner.before_saved")
        self._oldest_kept = oldest_kept
        if version < self._config.steps or self._trained:
            self._saved = version
            if self._trainer is not None:  # while it loads, the shaper does not know where it is yet: see `_announce`
                self._send_shaper(VersionSaved(version, oldest_kept))

    # --- weights ---------------------------------------------------------------------------------------------

    def _source(self, trainer: Trainer) -> WeightSource:
        """The parameters of the present version."""
        if trainer.place.num_ranks == 1:
            return trainer.source()
        order = GatherWeights(trainer.policy_version, of_checkpoint=False)
        return self._team.gathered(trainer.rows(), trainer.row_shapes(), self._dtype, order)

    async def _offer(self, tasks: asyncio.TaskGroup, trainer: Trainer) -> None:
        """Have the present version published, and the parameters, which are locked, unlocked after it."""
        if trainer.policy_version < self._floor:
            self._weights.release()
            return
        await self._prepare_probe(trainer)
        tasks.create_task(self._publish(trainer), name="publish")

    async def _prepare_probe(self, trainer: Trainer) -> None:
        """Before the parameters are published, so that it is known what generators must say with them. With several
        ranks it would take all of them."""
        config = self._runtime.config
        if config.weights.probe and config.generator.capabilities.has_model and trainer.place.num_ranks == 1:
            reference = await self._in_thread(packed_reference, trainer.model, trainer.policy_version)
            self._examiner.expect(reference)

    async def _publish(self, trainer: Trainer) -> None:
        """Broadcast the parameters, which are locked, and unlock them."""
        version = trainer.policy_version
        self._runtime.faults.reach("learner.before_publish")
        script = self._config.script
        try:
            with self._runtime.clock.busy("publish", policy_version=version):
                if script is not None:
                    await asyncio.sleep(script.broadcast_s)
                report = await self._publisher.publish(version, self._source(trainer))
        finally:
            self._weights.release()
        self._published = version
        self._runtime.faults.reach("learner.before_published")
        self._send_shaper(VersionPublished(version))
        log.info("published", **asdict(report))
        self._runtime.trace.instant(
            "published",
            policy_version=version,
            num_members=len(report.members),
            num_dropped=len(report.dropped),
            forming_s=report.forming_s,
            transfer_s=report.transfer_s,
            apply_s=report.apply_s,
        )
        if version:
            metrics = {
                "weights/total_s": report.total_s,
                "weights/transfer_s": report.transfer_s,
                "weights/stall_s": max(report.stalls_s.values(), default=0.0),
                "weights/num_bytes": float(report.num_bytes),
            }
            self._runtime.tell_launcher(StepCompleted(version - 1, metrics))

    def _member_joined(self, peer: str, policy_version: int) -> None:
        self._floor = max(self._floor, policy_version)
        self._joined.add(peer)
        if len(self._joined) == self._runtime.config.roles.generator.replicas:
            self._all_joined.set()

    async def _until_generators_joined(self) -> None:
        """The first version goes to all generators at once; one that does not come up is not waited for for ever."""
        self._state = "waiting for generators"
        timeout_s = self._runtime.config.roles.generator.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_joined.wait()
        except TimeoutError:
            log.warning("generators_missing", joined=sorted(self._joined), waited_s=timeout_s)

    # --- inside ----------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Tell the shaper where training stands."""
        if self._trainer is None or self._shaper is None:
            return
        version = self._trainer.policy_version
        self._send_shaper(self._taken_up if self._taken_up.policy_version == version else LearnerReady(version))
        if self._published >= 0:
            self._send_shaper(VersionPublished(self._published))
        if self._saved:
            # Once the last checkpoint is written, and before the model is, the oldest may be later than what was said.
            self._send_shaper(VersionSaved(self._saved, min(self._oldest_kept, self._saved)))

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What may be a collective of all ranks."""
        with self._team.naming_failures():
            return await asyncio.to_thread(work, *args, **kwargs)

    def _send_shaper(self, message: Message) -> None:
        if self._shaper is not None:
            self._runtime.send(LEARNER_LINK.name, self._shaper, message)

    def _send_generator(self, peer: str, message: LearnerToGenerator) -> None:
        self._runtime.send(WEIGHTS_LINK.name, peer, message)

    def _send_rank(self, peer: str, message: LeaderToRank) -> None:
        self._runtime.send(RANKS_LINK.name, peer, message)


def make_actor(runtime: Runtime) -> Actor:
    """The actor of this process's rank. Raises `ConfigError` if environment and plan do not agree on it."""
    place = Place.from_environment(os.environ)
    num_ranks = 1 + len(_other_ranks(runtime))
    if (runtime.name, num_ranks) != (LEARNER.process(place.rank), place.num_ranks):
        raise ConfigError(
            f"{runtime.name} of {num_ranks} in the plan was started as RANK {place.rank} of WORLD_SIZE "
            f"{place.num_ranks}"
        )
    return FollowerActor(runtime, place) if place.rank else LearnerActor(runtime)


def _vocab_size(runtime: Runtime) -> int | None:
    """Of the model that is trained."""
    config = runtime.config
    if config.learner.script is not None:
        return None
    return vocab_size(resolve_model_path(config.model.path, with_weights=False))


def _other_ranks(runtime: Runtime) -> tuple[str, ...]:
    return next((link.members for link in runtime.plan.links if link.name == RANKS_LINK.name), ())


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()  # nobody watches the learner's standard error
    main(make_actor)
