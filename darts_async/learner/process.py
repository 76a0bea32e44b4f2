"""The learner process: groups in, versions out.

    for each step:  B groups, each forward and backward as it arrives  ->  optimiser step  ->  commit  ->  publish

The broadcast of a version reads the parameters while the next step's forward and backward passes run; only the next
optimiser step waits for it. One task, `_train`, owns the trainer; `_weights` is locked from the optimiser step until
every generator has the result, so that nobody reads parameters of no version.
"""

import asyncio
from collections import deque
from dataclasses import asdict
from typing import cast

import numpy as np
import structlog
import transformers

from darts_async.actor import Gauges, Runtime, main
from darts_async.learner import checkpoint
from darts_async.learner.model import load_model
from darts_async.learner.step import Trainer
from darts_async.models import resolve_model_path
from darts_async.protocol import (
    GeneratorToLearner,
    Greet,
    GroupsCommitted,
    LearnerReady,
    LearnerToGenerator,
    MemberJoined,
    Message,
    Shutdown,
    StepCompleted,
    TrainGroup,
    VersionPublished,
)
from darts_async.transport import Event, PeerDown, PeerUp, Received
from darts_async.weights.publish import Publisher

CHECKPOINTS_DIR = "checkpoints"
MODEL_DIR = "model"
WARN_AFTER_S = 60.0
"""A learner that has had no group for this long says so, again and again."""

log = structlog.get_logger()


class LearnerActor:
    """See the module."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._config = runtime.config.learner
        self._groups: deque[TrainGroup] = deque()  # bounded by the shaper's staleness window
        self._arrived = asyncio.Event()
        self._seen: set[int] = set()
        self._trainer: Trainer | None = None
        self._publisher = Publisher(runtime.config.weights, runtime.config.network.host, self._send_generator)
        self._weights = asyncio.Lock()
        self._joined: set[str] = set()
        self._all_joined = asyncio.Event()
        self._published = -1
        self._shaper: str | None = None
        self._num_tokens = 0
        self._num_greetings = 0
        self._state = "loading"
        self._leaving: Shutdown | None = None
        self._trained = False

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Load the model, publish its weights, take groups."""
        self._tokenizer_dir = resolve_model_path(self._runtime.config.model.path)
        self._trainer = await asyncio.to_thread(self._make_trainer)
        trainer = self._trainer
        keep_current = self._publisher.run(trainer.model.named_parameters, self._weights)
        tasks.create_task(self._train(tasks, trainer), name="train")
        tasks.create_task(keep_current, name="late joiners")
        self._announce()

    def _make_trainer(self) -> Trainer:
        config = self._runtime.config
        model = load_model(str(self._tokenizer_dir), dtype=config.model.dtype)
        return Trainer(
            model,
            config.learner,
            temperature=config.sampling.temperature,
            max_staleness=config.staleness.max_staleness,
            baseline=config.shaping.baseline,
        )

    def handle(self, event: Event) -> None:
        """A group, or something about weights."""
        match event:
            case Received(link="learner", peer=peer, message=Greet()):
                self._shaper = peer
                self._announce()
            case PeerUp(link="weights", peer=peer):
                self._num_greetings += 1
                self._send_generator(peer, Greet(self._num_greetings))
            case PeerDown(link="weights", peer=peer, reason=reason):
                log.warning("peer_lost", peer=peer, reason=reason)
                self._publisher.peer_lost(peer)
            case Received(link="weights", peer=peer, incarnation=incarnation, message=message):
                self._publisher.handle(peer, incarnation, cast(GeneratorToLearner, message))
                if isinstance(message, MemberJoined):
                    self._member_joined(peer)
            case Received(link="learner", message=TrainGroup() as group):
                if group.group_id not in self._seen:
                    self._seen.add(group.group_id)
                    self._groups.append(group)
                    self._arrived.set()

    def tick(self, now_s: float) -> None:
        """Nothing to do."""

    def shutdown(self, message: Shutdown) -> None:
        """Leave; a complete run leaves its last checkpoint and its model behind."""
        self._leaving = message

    @property
    def done(self) -> bool:
        """A complete run ends when the last checkpoint is written, any other at once."""
        return self._leaving is not None and (self._trained or not self._leaving.finished)

    def gauges(self) -> Gauges:
        """For the status."""
        return Gauges(self._state, self._policy_version, self._num_tokens, len(self._groups))

    @property
    def _policy_version(self) -> int:
        return self._trainer.policy_version if self._trainer is not None else -1

    async def close(self) -> None:
        """Leave the weight group; write the final model if the run is complete."""
        await self._publisher.close()
        if self._leaving is not None and self._leaving.finished and self._trainer is not None:
            target = self._runtime.run_dir / MODEL_DIR
            await asyncio.to_thread(checkpoint.export, self._trainer.model, self._tokenizer_dir, target)

    # --- the trainer's owner ---------------------------------------------------------------------------------

    async def _train(self, tasks: asyncio.TaskGroup, trainer: Trainer) -> None:
        await self._until_generators_joined()
        await self._weights.acquire()
        await self._publish(trainer)
        while trainer.policy_version < self._config.steps:
            group_ids = await self._add_groups(trainer)
            self._state = "publishing"
            await self._weights.acquire()
            with self._runtime.clock.busy("step"):
                metrics = await asyncio.to_thread(trainer.finish_step)
            self._commit(trainer.policy_version - 1, group_ids, metrics)
            tasks.create_task(self._publish(trainer), name="publish")
            await self._checkpoint(trainer)
        self._state = "finished"
        self._trained = True

    async def _add_groups(self, trainer: Trainer) -> list[int]:
        """Forward and backward of the groups of one step, as they arrive."""
        group_ids: list[int] = []
        while len(group_ids) < self._config.groups_per_step:
            group = await self._next_group()
            with self._runtime.clock.busy("train"):
                await asyncio.to_thread(trainer.add_group, group)
            group_ids.append(group.group_id)
            self._num_tokens += len(group.token_ids)
        return group_ids

    async def _next_group(self) -> TrainGroup:
        while not self._groups:
            self._state = "waiting for groups"
            self._arrived.clear()
            try:
                async with asyncio.timeout(WARN_AFTER_S):
                    await self._arrived.wait()
            except TimeoutError:
                log.warning("no_group", step=self._policy_version, waited_s=WARN_AFTER_S)
        self._state = "training"
        return self._groups.popleft()

    def _commit(self, step: int, group_ids: list[int], metrics: dict[str, float]) -> None:
        self._send_shaper(GroupsCommitted(step, np.array(group_ids, np.int64)))
        self._runtime.tell_launcher(StepCompleted(step, {f"learner/{name}": x for name, x in metrics.items()}))

    async def _checkpoint(self, trainer: Trainer) -> None:
        version = trainer.policy_version
        if version % self._config.checkpoint_every and version != self._config.steps:
            return
        with self._runtime.clock.busy("checkpoint"):
            await asyncio.to_thread(
                checkpoint.save,
                self._runtime.run_dir / CHECKPOINTS_DIR,
                trainer,
                tokenizer_dir=self._tokenizer_dir,
                keep=self._config.keep_checkpoints,
                extra={"consumed_group_ids": sorted(self._seen - {group.group_id for group in self._groups})},
            )

    # --- weights ---------------------------------------------------------------------------------------------

    async def _publish(self, trainer: Trainer) -> None:
        """Broadcast the parameters, which are locked, and unlock them."""
        version = trainer.policy_version
        try:
            with self._runtime.clock.busy("publish"):
                report = await self._publisher.publish(version, trainer.model.named_parameters())
        finally:
            self._weights.release()
        self._published = version
        self._send_shaper(VersionPublished(version))
        log.info("published", **asdict(report))
        if version:
            metrics = {
                "weights/total_s": report.total_s,
                "weights/transfer_s": report.transfer_s,
                "weights/stall_s": max(report.stalls_s.values(), default=0.0),
                "weights/num_bytes": float(report.num_bytes),
            }
            self._runtime.tell_launcher(StepCompleted(version - 1, metrics))

    def _member_joined(self, peer: str) -> None:
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

    def _announce(self) -> None:
        """Tell the shaper where training stands."""
        if self._trainer is None or self._shaper is None:
            return
        self._send_shaper(LearnerReady(self._trainer.policy_version))
        if self._published >= 0:
            self._send_shaper(VersionPublished(self._published))

    def _send_shaper(self, message: Message) -> None:
        if self._shaper is not None:
            self._runtime.send("learner", self._shaper, message)

    def _send_generator(self, peer: str, message: LearnerToGenerator) -> None:
        self._runtime.send("weights", peer, message)


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()  # nobody watches the learner's standard error
    main(LearnerActor)
