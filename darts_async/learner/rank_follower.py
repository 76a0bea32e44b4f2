"""A rank other than 0: carries out the orders of rank 0, one after another.

One task, `_work`, owns the trainer; another answers requests for parameters while passes run. The parameters of a
version do not change until the next optimiser step, which rank 0 does not order before it has them all.

When the launcher asks for the end, rank 0 may still need this one for the last checkpoint. So it runs until rank 0
dismisses it, or until a deadline.
"""

import asyncio
from collections.abc import Mapping
from typing import cast

import structlog
from torch import Tensor

from darts_async.actor import Gauges, Runtime
from darts_async.errors import ProcessDiedError
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.saver import write_part
from darts_async.learner.condition import Changes
from darts_async.learner.model import DTYPES
from darts_async.learner.ranks.gather import send_rows
from darts_async.learner.ranks.order_grammar import OrderGrammar
from darts_async.learner.ranks.rank_group import RankGroup, in_thread
from darts_async.learner.ranks.rank_info import RankInfo
from darts_async.learner.state import MAX_TOGETHER
from darts_async.learner.step import Trainer
from darts_async.learner.trainer_setup import make_trainer
from darts_async.models.location import resolve_model_path
from darts_async.protocol import (
    AddGroups,
    Dismiss,
    FinishStep,
    GatherWeights,
    LeaderToRank,
    PartSaved,
    Prepare,
    RankReady,
    RankToLeader,
    SaveCheckpoint,
    Shutdown,
    StoreValue,
    TrainGroup,
)
from darts_async.topology.links import RANKS_LINK
from darts_async.topology.run_files import CHECKPOINTS_DIR
from darts_async.transport import Event, PeerDown, Received
from darts_async.wire.atomic_dir import staging_beside

STOP_WITHIN_S = 5.0
"""Time for rank 0 to dismiss this one when the run is stopped."""
MAX_ORDERS = 4 * MAX_TOGETHER

log = structlog.get_logger()


class FollowerActor:
    def __init__(self, runtime: Runtime, rank_info: RankInfo) -> None:
        self._runtime = runtime
        self._config = runtime.config
        self._rank_info = rank_info
        self._leader = runtime.plan.link(RANKS_LINK.name).hub
        self._dtype = DTYPES[self._config.model.dtype]
        self._checkpoint = ""  # to continue from, as rank 0 says
        self._ranks: RankGroup | None = None
        self._trainer: Trainer | None = None
        # Rank 0 carries out its own orders, so it is never far ahead.
        self._orders: asyncio.Queue[LeaderToRank] = asyncio.Queue(MAX_ORDERS)
        self._grammar = OrderGrammar(MAX_ORDERS)
        self._requests: asyncio.Queue[GatherWeights] = asyncio.Queue(MAX_ORDERS)
        self._snapshot: checkpoint.Snapshot | None = None
        self._changes = Changes()
        self._state = "loading"
        self._is_dismissed = False
        self._leave_at_s: float | None = None
        self._leave_within_s: float | None = None

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Load the model with the others, when rank 0 orders it."""
        deadline_s = self._config.learner.rank_deadline_s
        await self._changes.until(lambda: self._ranks is not None, deadline_s, lambda: f"{self._leader} (rank 0)")
        assert self._ranks is not None
        model_dir = resolve_model_path(self._config.model.path)
        trainer = await in_thread(self._ranks, make_trainer, self._config, model_dir, self._ranks)
        if self._checkpoint:
            path = self._runtime.run_dir / CHECKPOINTS_DIR / self._checkpoint
            await in_thread(self._ranks, checkpoint.restore, path, trainer)
        self._trainer = trainer
        tasks.create_task(self._work(tasks, trainer), name="work")
        tasks.create_task(self._answer(trainer, self._ranks), name="send parameters")
        self._tell(RankReady(trainer.policy_version))

    def handle(self, event: Event) -> None:
        match event:
            case PeerDown(link=RANKS_LINK.name, reason=reason):
                if not self._is_dismissed:
                    raise ProcessDiedError(f"{self._leader}, rank 0 of the learner, is gone ({reason})")
            case Received(message=message) if why := self._grammar.refusal(cast(LeaderToRank, message)):
                self._runtime.refuse(event, f"{type(message).__name__}: {why}")
            case Received(message=message):
                self._take(cast(LeaderToRank, message))

    def _take(self, message: LeaderToRank) -> None:
        match message:
            case Prepare():
                self._ranks = RankGroup(
                    self._rank_info,
                    interface=self._runtime.host,
                    epoch=message.epoch,
                    send=self._tell,
                    deadline_s=self._config.learner.rank_deadline_s,
                )
                self._checkpoint = message.checkpoint
                self._changes.notify()
            case StoreValue():
                assert self._ranks is not None, "the grammar has Prepare come first"
                self._ranks.put(message)
            case GatherWeights():
                self._requests.put_nowait(message)
            case Dismiss():
                self._is_dismissed = True
            case _:
                self._orders.put_nowait(message)

    def tick(self, now_s: float) -> None:
        """Stop waiting to be dismissed."""
        if self._leave_within_s is not None and self._leave_at_s is None:
            self._leave_at_s = now_s + self._leave_within_s
        if self._leave_at_s is not None and now_s > self._leave_at_s:
            log.warning("not_dismissed", leader=self._leader)
            self._is_dismissed = True

    def shutdown(self, message: Shutdown) -> None:
        """Stay until rank 0 needs nothing more."""
        self._leave_within_s = self._config.learner.finish_timeout_s if message.finished else STOP_WITHIN_S
        if message.num_steps is not None and not message.finished:
            self._leave_within_s += self._config.learner.stop_timeout_s

    @property
    def done(self) -> bool:
        return self._is_dismissed

    def gauges(self) -> Gauges:
        """For the status. Rank 0 counts the tokens."""
        version = self._trainer.policy_version if self._trainer is not None else -1
        return Gauges(self._state, version, 0, self._orders.qsize())

    async def close(self) -> None:
        """Leave the group, which frees the threads that wait in it."""
        if self._ranks is not None:
            self._ranks.abort("this rank leaves")

    # --- the trainer's owner ---------------------------------------------------------------------------------

    async def _work(self, tasks: asyncio.TaskGroup, trainer: Trainer) -> None:
        while True:
            self._state = "waiting for groups"
            with self._runtime.clock.waiting("waits for groups"):
                order = await self._orders.get()
            self._state = "training"
            match order:
                case AddGroups(num_groups=num_groups):
                    groups = [cast(TrainGroup, await self._orders.get()) for _ in range(num_groups)]
                    with self._runtime.clock.busy("train", groups=[group.group_id for group in groups]):
                        await in_thread(self._ranks, trainer.add_groups, groups)
                case FinishStep(step=step):
                    self._runtime.faults.reach("rank.before_step")
                    self._tell(trainer.tally.message(step))
                    with self._runtime.clock.busy("step", step=step):
                        await in_thread(self._ranks, trainer.finish_step)
                case SaveCheckpoint(policy_version=version):
                    with self._runtime.clock.busy("checkpoint", policy_version=version):
                        self._snapshot = await asyncio.to_thread(checkpoint.Snapshot.of, trainer)
                    tasks.create_task(self._save(version, self._snapshot), name="write a checkpoint")
            self._changes.notify()

    async def _save(self, version: int, snapshot: checkpoint.Snapshot) -> None:
        root = self._runtime.run_dir / CHECKPOINTS_DIR
        staging = staging_beside(checkpoint.directory_of(root, version))
        self._runtime.faults.reach("rank.before_part")
        with checkpoint.naming_failures(root):
            part = await write_part(self._runtime.patience, staging, snapshot)
        self._tell(PartSaved(version, part.num_bytes, part.crc32))

    # --- parameters for rank 0 -------------------------------------------------------------------------------

    async def _answer(self, trainer: Trainer, ranks: RankGroup) -> None:
        while True:
            request = await self._requests.get()
            rows = await self._rows(trainer, request)
            with self._runtime.clock.busy("gather", policy_version=request.policy_version):
                await asyncio.to_thread(send_rows, ranks, rows, self._dtype)

    async def _rows(self, trainer: Trainer, request: GatherWeights) -> Mapping[str, Tensor]:
        version, patience_s = request.policy_version, self._config.learner.rank_deadline_s
        if request.of_checkpoint:
            await self._changes.until(
                lambda: self._snapshot is not None and self._snapshot.policy_version == version,
                patience_s,
                lambda: f"the order to save version {version}, whose parameters rank 0 wants",
            )
            assert self._snapshot is not None
            snapshot, self._snapshot = self._snapshot, None
            return snapshot.weights
        await self._changes.until(
            lambda: trainer.policy_version == version,
            patience_s,
            lambda: f"version {version}, whose parameters rank 0 wants; this rank is at {trainer.policy_version}",
        )
        return trainer.rows()

    # --- inside ----------------------------------------------------------------------------------------------

    def _tell(self, message: RankToLeader) -> None:
        self._runtime.send(RANKS_LINK.name, self._leader, message)
