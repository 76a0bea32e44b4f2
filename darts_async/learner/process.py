"""The learner process: groups in, versions out.

    for each step:  B groups, forward and backward as they arrive  ->  optimiser step  ->  commit  ->  publish

`LearnerState` decides; this does it. One task, `_train`, owns the trainer and makes one move after another.

This is rank 0, which alone talks to shaper and generators. The other ranks do the same on their rows (`rank_leader`,
`rank_follower`). If one of them is gone or late, this process ends, and the whole learner is started again.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import structlog
import transformers

from darts_async.actor import Actor, Gauges, Runtime, main
from darts_async.errors import ConfigError, DeadlineError
from darts_async.learner import moves
from darts_async.learner.boundary import Boundary
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.saver import Saver
from darts_async.learner.condition import Changes
from darts_async.learner.model import DTYPES
from darts_async.learner.nonfinite import stop_training
from darts_async.learner.publishing import Publishing
from darts_async.learner.rank_follower import FollowerActor
from darts_async.learner.rank_leader import Team
from darts_async.learner.ranks.rank_group import in_thread
from darts_async.learner.ranks.rank_info import RankInfo
from darts_async.learner.state import LearnerState
from darts_async.learner.step import Trainer
from darts_async.learner.step_meter import StepMeter
from darts_async.learner.trainer_setup import make_trainer
from darts_async.models.location import resolve_model_path, vocab_size
from darts_async.protocol import (
    AddGroups,
    FinishStep,
    RankToLeader,
    Shutdown,
    StepCompleted,
    TrainGroup,
)
from darts_async.topology.links import RANKS_LINK, WEIGHTS_LINK
from darts_async.topology.roles import LEARNER
from darts_async.topology.run_files import CHECKPOINTS_DIR, MODEL_DIR
from darts_async.transport import Event, PeerDown, Received
from darts_async.weights.sending.events import MemberLost, MemberMessage
from darts_async.wire.atomic_dir import remove_leftovers, remove_staging

WARN_AFTER_S = 60.0
"""After each such wait the learner logs a warning. The launcher, which sees the whole run, decides what is too long."""

log = structlog.get_logger()


class LearnerActor:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._config = runtime.config.learner
        self._checkpoints = runtime.run_dir / CHECKPOINTS_DIR
        self._boundary = Boundary(runtime.config, _vocab_size(runtime))
        self._state = LearnerState(runtime.config, self._boundary, is_first=runtime.incarnation == 1)
        self._team = Team(
            _other_ranks(runtime),
            epoch=runtime.incarnation,
            interface=runtime.host,
            send=partial(runtime.send, RANKS_LINK.name),
            deadline_s=self._config.rank_deadline_s,
        )
        self._publishing = Publishing(runtime, self._team, partial(runtime.send, WEIGHTS_LINK.name))
        self._meter = StepMeter(runtime.clock)
        self._changes = Changes()
        self._num_tokens = 0
        self._doing = "loading"
        self._begin_farewell: Callable[[moves.Save], object] = lambda save: None

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Load the model, or continue from a checkpoint; begin to publish and to train."""
        keep, model_dir = self._config.keep_checkpoints, resolve_model_path(self._runtime.config.model.path)
        await asyncio.to_thread(remove_leftovers, self._checkpoints)
        path = await asyncio.to_thread(checkpoint.latest, self._checkpoints, keep)
        self._team.prepare(path.name if path is not None else "")
        trainer = await in_thread(self._team.ranks, make_trainer, self._runtime.config, model_dir, self._team.ranks)
        loaded = self._state.loaded
        if path is not None:
            manifest = await in_thread(self._team.ranks, checkpoint.restore, path, trainer)
            loaded = partial(
                loaded,
                consumed=manifest.consumed,
                shaper_state=await asyncio.to_thread(checkpoint.shaper_state, path),
                oldest_kept=await asyncio.to_thread(checkpoint.oldest_kept, self._checkpoints, keep),
            )
            log.info("resumed", path=str(path), policy_version=trainer.policy_version)
        await self._team.ready()
        saver = Saver(
            self._checkpoints,
            self._team,
            tokenizer_dir=model_dir,
            dtype=DTYPES[self._runtime.config.model.dtype],
            keep=keep,
            saved=self._is_saved,
            patience=self._runtime.patience,
            shaper_states=self._state.shaper_states,
            changes=self._changes,
        )
        self._begin_farewell = lambda save: tasks.create_task(
            self._save(tasks, trainer, saver, save), name="leave a checkpoint"
        )
        self._do(loaded(policy_version=trainer.policy_version))
        tasks.create_task(self._train(tasks, trainer, saver), name="train")
        tasks.create_task(self._publishing.serve_late_joiners(trainer, self._lent), name="late joiners")

    def handle(self, event: Event) -> None:
        """An event of the shaper, a generator or another rank."""
        match event:
            case Received(link=RANKS_LINK.name, peer=peer, message=message):
                if reason := self._boundary.of_rank(cast(RankToLeader, message)):
                    self._runtime.refuse(event, f"{type(message).__name__}: {reason}")
                else:
                    self._team.handle(peer, cast(RankToLeader, message))
                return
            case PeerDown(link=RANKS_LINK.name, peer=peer, reason=reason):
                self._team.lost(peer, reason)
                return
            case PeerDown(link=WEIGHTS_LINK.name, peer=peer, reason=reason):
                log.warning("peer_lost", peer=peer, reason=reason)
        self._do(self._state.handle(event, newest_epoch=self._publishing.publisher.newest_epoch))

    def _do(self, actions: Iterable[moves.Action]) -> None:
        """Carry out what the state has decided, and have all waiters look again."""
        for action in actions:
            match action:
                case moves.Tell(link, peer, message):
                    self._runtime.send(link, peer, message)
                case moves.Refuse(event, reason):
                    self._runtime.refuse(event, reason)
                case MemberMessage():
                    self._publishing.handle(action)
                case MemberLost(name):
                    self._publishing.publisher.peer_lost(name)
        if (save := self._state.farewell()) is not None:
            self._doing = "saving"
            self._begin_farewell(save)
        self._changes.notify()

    def tick(self, now_s: float) -> None:
        """Nothing to do."""

    def shutdown(self, message: Shutdown) -> None:
        """Leave. A complete run writes its last checkpoint and its model, one that is stopped a checkpoint. The
        launcher limits the time."""
        self._state.leave(message)
        self._do(())

    @property
    def done(self) -> bool:
        """Whether everything is written that is to be."""
        return self._state.is_done

    def gauges(self) -> Gauges:
        doing = "catching up" if self._state.is_catching_up else self._doing
        return Gauges(doing, self._state.policy_version, self._num_tokens, self._state.intake.num_waiting)

    async def close(self) -> None:
        """Leave the groups."""
        if self._state.leaving is not None:
            self._team.dismiss()
        self._team.abort("rank 0 leaves")
        await self._publishing.publisher.close()

    # --- the trainer's owner ---------------------------------------------------------------------------------

    async def _train(self, tasks: asyncio.TaskGroup, trainer: Trainer, saver: Saver) -> None:
        while True:
            match await self._next_move():
                case moves.Train(groups):
                    await self._add_groups(trainer, groups)
                case moves.TakeStep(groups):
                    await self._take_step(trainer, groups)
                case moves.Publish():
                    await self._publishing.prepare(trainer)
                    tasks.create_task(self._publish(trainer), name="publish")
                case moves.Save() as save:
                    await self._save(tasks, trainer, saver, save)
                case moves.WriteModel():
                    await self._write_model()
                case moves.Leave():
                    return

    async def _next_move(self) -> moves.Move:
        move = self._state.next_move()
        while isinstance(move, moves.Wait):
            move = await self._wait(move)
        self._doing = "training"
        return move

    async def _wait(self, wait: moves.Wait) -> moves.Move:
        move: moves.Move = wait

        def is_over() -> bool:
            nonlocal move
            move = self._state.next_move()
            return move != wait

        if wait != moves.FOR_SHAPER:  # until then it does not serve, and the status stays as it was
            self._doing = f"waiting for {wait.what}"
        with self._runtime.clock.waiting(f"waits for {wait.what}"):
            await self._until(is_over, wait)
        return move

    async def _until(self, is_true: Callable[[], bool], wait: moves.Wait) -> None:
        start_timeout_s = self._runtime.config.roles.generator.start_timeout_s
        timeout_s = start_timeout_s if wait == moves.FOR_GENERATORS else WARN_AFTER_S
        while True:
            try:
                return await self._changes.until(is_true, timeout_s, lambda: wait.what)
            except DeadlineError as error:
                log.warning("late", error=str(error), joined=sorted(self._state.joined))
                self._state.timed_out(wait)

    async def _add_groups(self, trainer: Trainer, groups: tuple[TrainGroup, ...]) -> None:
        num_tokens = sum(len(group.token_ids) for group in groups)
        ids = [group.group_id for group in groups]
        with self._runtime.clock.busy("train", groups=ids, tokens=num_tokens):
            self._team.tell(AddGroups(len(groups)))
            for group in groups:
                self._team.tell(group)
            await in_thread(self._team.ranks, trainer.add_groups, groups)
        self._num_tokens += num_tokens

    async def _take_step(self, trainer: Trainer, groups: tuple[TrainGroup, ...]) -> None:
        step = trainer.policy_version
        self._runtime.faults.reach("learner.before_step")
        self._team.tell(FinishStep(step))
        for tally in await self._team.tallies(step):
            trainer.tally.merge(tally)
        with self._runtime.clock.busy("step", step=step):
            metrics = await in_thread(self._team.ranks, trainer.finish_step)
        metrics |= self._meter.metrics()
        if trainer.num_skipped_in_a_row >= self._config.max_skipped_steps:
            raise stop_training(self._runtime.run_dir, groups, trainer.num_skipped_in_a_row)
        self._runtime.faults.reach("learner.before_commit")
        self._do(self._state.step_taken())
        self._runtime.tell_launcher(StepCompleted(step, {f"learner/{name}": x for name, x in metrics.items()}))

    async def _publish(self, trainer: Trainer) -> None:
        version = trainer.policy_version
        await self._publishing.publish(trainer)
        self._runtime.faults.reach("learner.before_published")
        self._do(self._state.published(version))

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator[None]:
        """Holds the parameters, for generators that joined late; see `LearnerState.lend`."""
        await self._until(self._state.lend, moves.Wait("the parameters"))
        try:
            yield
        finally:
            self._state.give_back()
            self._do(())

    async def _save(self, tasks: asyncio.TaskGroup, trainer: Trainer, saver: Saver, save: moves.Save) -> None:
        with self._runtime.clock.busy("checkpoint", policy_version=save.version):
            await saver.save(tasks, trainer, self._state.intake.consumed.intervals, has_shaper=save.has_shaper)

    def _is_saved(self, version: int, oldest_kept: int) -> None:
        self._runtime.faults.reach("learner.before_saved")
        self._do(self._state.saved(version, oldest_kept=oldest_kept))

    async def _write_model(self) -> None:
        self._doing = "finished"
        last = checkpoint.directory_of(self._checkpoints, self._config.steps)
        with checkpoint.naming_failures(self._runtime.run_dir):
            model = self._runtime.run_dir / MODEL_DIR
            write, undo = partial(checkpoint.export, last, model), partial(remove_staging, model)
            await asyncio.to_thread(self._runtime.patience.write, model, write, undo)
        self._do(self._state.model_written())


def make_actor(runtime: Runtime) -> Actor:
    """The actor of this process's rank. Raises `ConfigError` if environment and plan do not agree on it."""
    rank_info = RankInfo.from_environment(os.environ)
    num_ranks = 1 + len(_other_ranks(runtime))
    if (runtime.name, num_ranks) != (LEARNER.process(rank_info.rank), rank_info.num_ranks):
        started = f"RANK {rank_info.rank} of WORLD_SIZE {rank_info.num_ranks}"
        raise ConfigError(f"{runtime.name} of {num_ranks} in the plan was started as {started}")
    return FollowerActor(runtime, rank_info) if rank_info.rank else LearnerActor(runtime)


def _vocab_size(runtime: Runtime) -> int | None:
    if runtime.config.learner.script is not None:
        return None
    return vocab_size(resolve_model_path(runtime.config.model.path, with_weights=False))


def _other_ranks(runtime: Runtime) -> tuple[str, ...]:
    return next((link.members for link in runtime.plan.links if link.name == RANKS_LINK.name), ())


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()  # the learner's standard error is a file
    main(make_actor)
