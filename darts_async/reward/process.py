"""The reward process scores responses with a pool of workers.

A failed reward is reported as such. If most rewards fail, the reward function is broken, and the run ends with its last
error instead of training on the rest.
"""

import asyncio
from collections import deque
from typing import cast

import structlog
from msgspec import structs

from darts_async.actor import Gauges, Runtime, main
from darts_async.config.reward import RewardConfig, RewardLimitsConfig
from darts_async.config.reward_judge import JudgeConfig
from darts_async.errors import RewardError
from darts_async.models.location import resolve_model_path
from darts_async.protocol import Greet, RewardReady, Score, ScoreFailed, ShaperToReward, Shutdown
from darts_async.reward.boundary import refusal_of_shaper
from darts_async.reward.descendants import become_subreaper
from darts_async.reward.limits import GIB, MIB, Limits
from darts_async.reward.sandbox.directory import remove_orphans
from darts_async.reward.sandbox.isolation import places
from darts_async.reward.worker_messages import CodeSpec, FunctionSpec, FunctionSpecs, JudgeSpec, failure_text
from darts_async.reward.worker_pool import RewardPool, kill_strays_beside
from darts_async.topology.links import REWARDS_LINK
from darts_async.transport import Event, Received

WATCHED_ITEMS = 200
"""Length of the window for the share of failures."""
STRAYS_END_AFTER = 500
"""Number of attempts to end strays, a hundredth of a second apart. Later they must be stuck in the kernel."""
SWEEP_EVERY_S = 60.0
MIN_ITEMS = 20
"""With fewer items the share is not computed."""

log = structlog.get_logger()


def limits_of(config: RewardLimitsConfig) -> Limits:
    """The settings, in bytes."""
    return Limits(
        memory_bytes=round((config.memory_gib or 0) * GIB),
        processes=config.processes or 0,
        file_bytes=round((config.file_gib or 0) * GIB),
        output_bytes=round((config.output_mib or 0) * MIB),
    )


def functions_of(config: RewardConfig, num_processes: int = 1) -> FunctionSpecs:
    """The functions of the settings, for one worker of so many reward processes."""
    if config.function is not None:
        return (FunctionSpec(config.function),)
    num_workers = config.workers * num_processes
    return tuple(
        FunctionSpec(
            part.kind,
            part.label,
            part.takes,
            part.weight,
            None if part.code is None else CodeSpec(**part.code.model_dump()),
            None if part.judge is None else judge_of(part.judge, config.concurrency, num_workers),
        )
        for part in config.functions
    )


def judge_of(config: JudgeConfig, concurrency: int, num_workers: int) -> JudgeSpec:
    """The settings of a judge for one of all workers of the run."""
    spec = JudgeSpec(**config.model_dump(), concurrency=concurrency)
    share = None if spec.requests_per_minute is None else spec.requests_per_minute / num_workers
    return structs.replace(spec, requests_per_minute=share)


class RewardActor:
    """The decisions and tasks of a reward process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        config = runtime.config
        own = {name: self._make_pool((FunctionSpec(name),)) for name in config.own_rewards}
        self._pools = {"": self._make_pool(functions_of(config.reward, config.roles.reward.replicas))} | own
        self._tasks: asyncio.TaskGroup | None = None
        self._shaper: str | None = None
        self._open = False
        self._num_scoring = 0
        self._failed = {name: deque[bool](maxlen=WATCHED_ITEMS) for name in self._pools}
        self._next_sweep_s = 0.0
        self.done = False

    def _make_pool(self, functions: FunctionSpecs) -> RewardPool:
        config = self._runtime.config
        return RewardPool(
            functions,
            resolve_model_path(config.model.path, with_weights=False),
            num_workers=config.reward.workers,
            deadline_s=config.reward.deadline_s,
            start_deadline_s=config.reward.start_deadline_s,
            limits=limits_of(config.reward.limits),
            concurrency=config.reward.concurrency,
            max_batch=config.reward.max_batch,
        )

    def _sweep(self) -> None:
        """Remove what killed workers have left of the programs in responses."""
        if self._tasks is not None and any(part.code for part in self._runtime.config.reward.functions):
            self._tasks.create_task(asyncio.to_thread(remove_orphans, places()), name="remove directories")

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Start the workers, then announce them."""
        become_subreaper()
        self._tasks = tasks
        for pool in self._pools.values():
            await pool.start()
        self._open = True
        self._announce()

    def handle(self, event: Event) -> None:
        """An item to score, or the shaper's greeting. Items before the greeting were meant for an earlier incarnation,
        and the shaper sends them again."""
        match event:
            case Received(message=message) if reason := refusal_of_shaper(cast(ShaperToReward, message)):
                self._runtime.refuse(event, f"{type(message).__name__}: {reason}")
            case Received(peer=peer, message=Greet()):
                self._shaper = peer
                self._announce()
            case Received(message=Score(function=function)) if function not in self._pools:
                self._runtime.refuse(event, f"Score: reward function {function!r}")
            case Received(peer=peer, message=Score() as item) if self._open and self._tasks is not None:
                self._runtime.faults.reach("reward.before_score")
                self._tasks.create_task(self._score(peer, item), name=f"score {item.sample_id}")
                self._num_scoring += 1

    def tick(self, now_s: float) -> None:
        """End the orphans of a killed warden, which this process inherits, and remove directories without a worker."""
        kill_strays_beside([*self._pools.values()])
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + SWEEP_EVERY_S
            self._sweep()

    def shutdown(self, message: Shutdown) -> None:
        """Leave."""
        self.done = True

    def gauges(self) -> Gauges:
        """The gauges of the status."""
        state = "scoring" if self._num_scoring else "ready" if self._open else "starting"
        return Gauges(state, num_in_flight=self._num_scoring)

    async def close(self) -> None:
        """End the workers and the orphans of killed wardens."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))
        for _ in range(STRAYS_END_AFTER):
            if not kill_strays_beside([*self._pools.values()]):
                return
            await asyncio.sleep(0.01)

    def _announce(self) -> None:
        if self._open and self._shaper is not None:
            self._runtime.send(REWARDS_LINK.name, self._shaper, RewardReady(self._runtime.config.reward.workers))

    async def _score(self, peer: str, item: Score) -> None:
        with self._runtime.clock.busy("score"):
            reply = await self._pools[item.function].score(item)
        self._num_scoring -= 1
        self._runtime.faults.reach("reward.before_reply")
        self._runtime.send(REWARDS_LINK.name, peer, reply)
        self._runtime.trace.sample("scored", item.sample_id)
        if isinstance(reply, ScoreFailed):
            log.warning("score_failed", sample_id=reply.sample_id, kind=reply.kind, error=reply.error)
        self._watch(item.function, reply)

    def _watch(self, function: str, reply: object) -> None:
        """The share of failures is that of one reward function: the one of the settings, or a part's own."""
        if isinstance(reply, ScoreFailed) and reply.kind == "unavailable":
            return  # no fault of the reward function
        config, failed = self._runtime.config.reward, self._failed[function]
        failed.append(isinstance(reply, ScoreFailed))
        share, limit = sum(failed) / len(failed), config.max_failed_share
        if isinstance(reply, ScoreFailed) and len(failed) >= MIN_ITEMS and share > limit:
            described = f"reward function {function!r}" if function else config.description
            raise RewardError(
                f"{described} failed on {share:.0%} of the last {len(failed)} responses, more than "
                f"reward.max_failed_share ({limit:g}); the last failure was "
                f"{failure_text(reply.kind, reply.error)}"
            )


if __name__ == "__main__":
    main(RewardActor)
