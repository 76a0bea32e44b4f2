"""A pool of worker processes that score responses. Each is replaced when it fails.

A worker has one job at a time, or several where a function is a coroutine function: each worker has so many *seats*. A
job is one response, or several that wait at the same time where a function takes a batch.

Invariants. Every item ends in a reward, in a `ScoreFailed` with the reason, or in the cancellation of its task: a
failure is never a zero. A place has at most one process, which starts when an item needs it and the previous one has
certainly ended. With each death in a row the replacement waits longer, so that a function that crashes at once does not
cause a storm of processes. A late or cancelled item does not count as a death, and what its worker had beside it is
scored again.

The wait for a free seat has no deadline of its own: the earlier items and their deadlines bound it.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from darts_async.errors import DeadlineError, ProcessDiedError, RewardError
from darts_async.protocol import FailureKind, SampleScored, Score, ScoreFailed
from darts_async.reward.descendants import kill_strays
from darts_async.reward.limits import Limits
from darts_async.reward.worker_handle import REAP_S, EndedForAnotherError, LimitExceededError, Worker
from darts_async.reward.worker_messages import Failed, FunctionSpecs, Rewarded, WorkItem
from darts_async.wire.backoff import backoff_s

START_DEADLINE_S = 60.0
NO_LIMITS = Limits()
MAX_LATE_STARTS = 3
"""After this many slow first items in a row, the function hangs and is not loading: the normal deadline applies."""
MAX_BATCH_BYTES = 1 << 24
"""Limit of a batch of more than one item."""
MAX_ATTEMPTS = 3
"""So often is a job begun whose worker had to end for another job."""
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0


class _Place:
    """A place for one worker at a time."""

    def __init__(
        self,
        functions: FunctionSpecs,
        tokenizer_dir: Path,
        limits: Limits,
        start_deadline_s: float,
        closing: asyncio.Event,
    ) -> None:
        self._functions = functions
        self._tokenizer_dir = tokenizer_dir
        self._limits = limits
        self._start_deadline_s = start_deadline_s
        self._closing = closing
        self._renewing = asyncio.Lock()
        self.worker: Worker | None = None
        self._dead: Worker | None = None
        self.is_spawning = False
        self.num_deaths_in_a_row = 0
        self.num_late_starts = 0
        """Workers in a row whose first item took longer than the start deadline."""

    async def spawn(self) -> Worker:
        """Start a process, without waiting until it is ready."""
        self.is_spawning = True
        try:
            self.worker = await Worker.spawn(self._functions, self._tokenizer_dir, self._limits)
        finally:
            self.is_spawning = False
        return self.worker

    async def usable_worker(self) -> Worker:
        """The worker of this place, or a new one."""
        async with self._renewing:
            if self.worker is not None and self.worker.is_usable:
                return self.worker
            await self.reap()
            await self._back_off()
            worker = await self.spawn()
            _refuse_if(self._closing)
            await worker.ready(self._start_deadline_s)
            return worker

    def died(self, worker: Worker | None) -> None:
        """A worker of this place has ended, or not come up; all its jobs say so, and it counts once."""
        if worker is None or worker is not self._dead:
            self.num_deaths_in_a_row += 1
        self._dead = worker

    def kill(self) -> None:
        """End the process, if there is one, without waiting."""
        if self.worker is not None:
            self.worker.kill()

    async def reap(self) -> None:
        """Wait until the process has ended."""
        if self.worker is not None:
            self.worker.kill()
            await self.worker.reap()
            self.worker = None

    async def _back_off(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(backoff_s(self.num_deaths_in_a_row, FIRST_BACKOFF_S, MAX_BACKOFF_S)):
                await self._closing.wait()
        _refuse_if(self._closing)


@dataclass(slots=True, eq=False)
class _Waiting:
    """An item that waits for a seat, and whatever job it becomes a part of."""

    item: WorkItem
    reply: asyncio.Future[Rewarded | Failed] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _JobFailedError(Exception):
    """A job has no replies, for this reason."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class RewardPool:
    """Scores responses in `num_workers` processes.

    Shutdown order: cancel the tasks that score, then `close`. A pending call at `close` raises `RewardError`.
    """

    def __init__(
        self,
        functions: FunctionSpecs,
        tokenizer_dir: Path,
        *,
        num_workers: int,
        deadline_s: float,
        start_deadline_s: float = START_DEADLINE_S,
        limits: Limits = NO_LIMITS,
        concurrency: int = 1,
        max_batch: int = 1,
    ) -> None:
        """`start_deadline_s` bounds the start of a worker and its first job, at which a function may still load
        something. `deadline_s` bounds later jobs. `concurrency` is the number of jobs that a worker has at a time if
        a function is a coroutine function, `max_batch` of items in a job if a function takes a batch."""
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        self._concurrency = concurrency
        self._max_batch = max_batch if any(function.takes == "batch" for function in functions) else 1
        self._closing = asyncio.Event()
        self._places = [
            _Place(functions, tokenizer_dir, limits, start_deadline_s, self._closing) for _ in range(num_workers)
        ]
        self._seats: list[_Place] = []
        self._free: asyncio.Queue[_Place] = asyncio.Queue(num_workers * concurrency)
        self._waiting: deque[_Waiting] = deque()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The pids of the usable processes."""
        workers = [place.worker for place in self._places]
        return tuple(worker.pid for worker in workers if worker is not None and worker.is_usable)

    @property
    def known_pids(self) -> list[int] | None:
        """The pids of the workers; None while one is being started, whose pid is not known yet."""
        if any(place.is_spawning for place in self._places):
            return None
        return [place.worker.pid for place in self._places if place.worker is not None]

    def kill_strays(self) -> bool:
        """End the orphans of a killed warden. For a subreaper whose only children are those of this pool. Returns
        whether there may be more."""
        return kill_strays_beside([self])

    async def start(self) -> None:
        """Start all workers, at once.

        Raises:
            RewardError: a reward function cannot be loaded. No process is left.
        """
        try:
            workers = [await place.spawn() for place in self._places]
            for worker in workers:
                await worker.ready(self._start_deadline_s)
        except BaseException:  # also cancellation: no worker may be left; the error is raised again
            await self.close()
            raise
        num_seats = self._concurrency if all(worker.is_async for worker in workers) else 1
        self._seats = self._places * num_seats
        for place in self._seats:
            self._free.put_nowait(place)

    async def score(self, item: Score) -> SampleScored | ScoreFailed:
        """Score one response. Cancelling the call frees its worker.

        Raises:
            RewardError: the pool is closed.
        """
        assert self._seats, "start the pool first"
        tokens = item.token_ids.tobytes()
        own = _Waiting(WorkItem(item.prompt, item.answer, item.metadata_json, item.finish_reason, tokens))
        self._waiting.append(own)
        try:
            place = await self._free.get()
            try:
                _refuse_if(self._closing)
                if own in self._waiting:  # else it is part of another job by now
                    await self._score_at(place, self._taken(own))
            finally:
                self._free.put_nowait(place)
            match await own.reply:
                case Rewarded(reward, parts):
                    return SampleScored(item.sample_id, reward, parts)
                case Failed(kind, error):
                    return ScoreFailed(item.sample_id, kind, error)
        except _JobFailedError as failed:
            return ScoreFailed(item.sample_id, failed.kind, str(failed))
        finally:
            if own in self._waiting:
                self._waiting.remove(own)

    async def close(self) -> None:
        """End all workers. No process is left. Idempotent.

        Raises:
            DeadlineError: a killed process has not ended.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        for place in self._places:
            place.kill()
        await self._until_nothing_is_under_way()
        for place in self._places:
            await place.reap()
        for place in self._seats:
            self._free.put_nowait(place)  # calls that still wait for it are refused

    async def _until_nothing_is_under_way(self) -> None:
        try:
            async with asyncio.timeout(REAP_S):
                for _ in self._seats:
                    await self._free.get()
        except TimeoutError as error:
            raise DeadlineError(f"items are still being scored {REAP_S:g} s after their workers were killed") from error

    def _taken(self, own: _Waiting) -> list[_Waiting]:
        """A job of this item and of others that wait, as many as make a batch."""
        self._waiting.remove(own)
        job, num_bytes = [own], own.item.num_bytes
        while self._waiting and len(job) < self._max_batch:
            num_bytes += self._waiting[0].item.num_bytes
            if num_bytes > MAX_BATCH_BYTES:
                break
            job.append(self._waiting.popleft())
        return job

    async def _score_at(self, place: _Place, job: list[_Waiting]) -> None:
        """Give each item of a job its reply, or the reason why it has none."""
        try:
            replies = await self._replies(place, [each.item for each in job])
            for each, reply in zip(job, replies, strict=True):
                if not each.reply.done():  # its own call was cancelled
                    each.reply.set_result(reply)
        except (_JobFailedError, RewardError) as error:
            for each in job:
                if not each.reply.done():
                    each.reply.set_exception(error)
        finally:
            for each in job:
                each.reply.cancel()  # unless it is done: this call was cancelled

    async def _replies(self, place: _Place, items: list[WorkItem]) -> list[Rewarded | Failed]:
        for _ in range(MAX_ATTEMPTS):
            worker, is_first = None, False
            try:
                worker = await place.usable_worker()
                is_first = worker.num_responses == 0 and place.num_late_starts < MAX_LATE_STARTS
                replies = await worker.ask(items, self._deadline_of(is_first))
            except EndedForAnotherError:
                _refuse_if(self._closing)
                continue
            except (ProcessDiedError, RewardError, DeadlineError) as error:
                _refuse_if(self._closing)
                place.died(worker)
                kind: FailureKind = "limit" if isinstance(error, LimitExceededError) else "worker_died"
                raise _JobFailedError(kind, str(error)) from error
            except TimeoutError as error:
                place.num_late_starts += is_first
                setting = "start_deadline_s, the time for a worker's first item," if is_first else "deadline_s"
                reason = f"the reward function took longer than reward.{setting} ({self._deadline_of(is_first):g} s)"
                raise _JobFailedError("timeout", reason) from error
            place.num_deaths_in_a_row = place.num_late_starts = 0
            return replies
        raise _JobFailedError("worker_died", f"its worker was ended {MAX_ATTEMPTS} times because of other responses")

    def _deadline_of(self, is_first: bool) -> float:
        return max(self._start_deadline_s, self._deadline_s) if is_first else self._deadline_s


def _refuse_if(closing: asyncio.Event) -> None:
    if closing.is_set():
        raise RewardError("the reward pool is closed")


def kill_strays_beside(pools: Sequence[RewardPool]) -> bool:
    """End the orphans of killed wardens. For a subreaper whose only children are those of these pools. Returns whether
    there may be more."""
    pids = [pool.known_pids for pool in pools]
    return True if None in pids else kill_strays([pid for some in pids for pid in some or ()])
