"""A pool of worker processes that score responses. Each handles one item at a time and is replaced when it fails.

Invariants. Every item ends in a reward, in a `ScoreFailed` with the reason, or in the cancellation of its task: a
failure is never a zero. A place has at most one process, which starts when an item needs it and the previous one has
certainly ended. With each death in a row the replacement waits longer, so that a function that crashes at once does not
cause a storm of processes. A late or cancelled item does not count as a death.

The wait for a free worker has no deadline of its own: the earlier items and their deadlines bound it.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from darts_async.errors import DeadlineError, ProcessDiedError, RewardError
from darts_async.protocol import SampleScored, Score, ScoreFailed
from darts_async.reward.descendants import kill_strays
from darts_async.reward.limits import Limits
from darts_async.reward.worker_handle import REAP_S, LimitExceededError, Worker
from darts_async.reward.worker_messages import Failed, Rewarded, WorkerReply, WorkItem
from darts_async.wire.backoff import backoff_s

START_DEADLINE_S = 60.0
NO_LIMITS = Limits()
MAX_LATE_STARTS = 3
"""After this many slow first items in a row, the function hangs and is not loading: the normal deadline applies."""
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0


class _Place:
    """A place for one worker at a time."""

    def __init__(
        self, function: str, tokenizer_dir: Path, limits: Limits, start_deadline_s: float, closing: asyncio.Event
    ) -> None:
        self._function = function
        self._tokenizer_dir = tokenizer_dir
        self._limits = limits
        self._start_deadline_s = start_deadline_s
        self._closing = closing
        self.worker: Worker | None = None
        self.is_spawning = False
        self.num_deaths_in_a_row = 0
        self.num_late_starts = 0
        """Workers in a row whose first item took longer than the start deadline."""

    async def spawn(self) -> Worker:
        """Start a process, without waiting until it is ready."""
        self.is_spawning = True
        try:
            self.worker = await Worker.spawn(self._function, self._tokenizer_dir, self._limits)
        finally:
            self.is_spawning = False
        return self.worker

    async def usable_worker(self) -> Worker:
        """The worker of this place, or a new one."""
        if self.worker is not None and self.worker.is_usable:
            return self.worker
        await self.reap()
        await self._back_off()
        worker = await self.spawn()
        _refuse_if(self._closing)
        await worker.ready(self._start_deadline_s)
        return worker

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


class RewardPool:
    """Scores responses in `num_workers` processes.

    Shutdown order: cancel the tasks that score, then `close`. A pending call at `close` raises `RewardError`.
    """

    def __init__(
        self,
        function: str,
        tokenizer_dir: Path,
        *,
        num_workers: int,
        deadline_s: float,
        start_deadline_s: float = START_DEADLINE_S,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """`start_deadline_s` bounds the start of a worker and its first item, at which a function may still load
        something. `deadline_s` bounds later items."""
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        self._closing = asyncio.Event()
        self._places = [
            _Place(function, tokenizer_dir, limits, start_deadline_s, self._closing) for _ in range(num_workers)
        ]
        self._free: asyncio.Queue[_Place] = asyncio.Queue(num_workers)
        self._started = False

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
            RewardError: the reward function cannot be loaded. No process is left.
        """
        try:
            workers = [await place.spawn() for place in self._places]
            for worker in workers:
                await worker.ready(self._start_deadline_s)
        except BaseException:  # also cancellation: no worker may be left; the error is raised again
            await self.close()
            raise
        self._started = True
        for place in self._places:
            self._free.put_nowait(place)

    async def score(self, item: Score) -> SampleScored | ScoreFailed:
        """Score one response. Cancelling the call frees its worker.

        Raises:
            RewardError: the pool is closed.
        """
        assert self._started, "start the pool first"
        place = await self._free.get()
        try:
            _refuse_if(self._closing)
            return await self._score_at(place, item)
        finally:
            self._free.put_nowait(place)

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
        if self._started:
            await self._until_nothing_is_under_way()
        for place in self._places:
            await place.reap()
            self._free.put_nowait(place)  # calls that still wait for it are refused

    async def _until_nothing_is_under_way(self) -> None:
        try:
            async with asyncio.timeout(REAP_S):
                for _ in self._places:
                    await self._free.get()
        except TimeoutError as error:
            raise DeadlineError(f"items are still being scored {REAP_S:g} s after their workers were killed") from error

    async def _score_at(self, place: _Place, score: Score) -> SampleScored | ScoreFailed:
        item = WorkItem(score.prompt, score.answer, score.metadata_json, score.finish_reason, score.token_ids.tobytes())
        is_first = False
        try:
            worker = await place.usable_worker()
            is_first = worker.num_responses == 0 and place.num_late_starts < MAX_LATE_STARTS
            reply = await worker.ask(item, self._deadline_of(is_first))
        except LimitExceededError as error:
            _refuse_if(self._closing)
            place.num_deaths_in_a_row += 1
            return ScoreFailed(score.sample_id, "limit", str(error))
        except (ProcessDiedError, RewardError, DeadlineError) as error:
            _refuse_if(self._closing)
            place.num_deaths_in_a_row += 1
            return ScoreFailed(score.sample_id, "worker_died", str(error))
        except TimeoutError:
            place.num_late_starts += is_first
            setting = "start_deadline_s, the time for a worker's first item," if is_first else "deadline_s"
            reason = f"the reward function took longer than reward.{setting} ({self._deadline_of(is_first):g} s)"
            return ScoreFailed(score.sample_id, "timeout", reason)
        place.num_deaths_in_a_row = place.num_late_starts = 0
        return _reply(score.sample_id, reply)

    def _deadline_of(self, is_first: bool) -> float:
        return max(self._start_deadline_s, self._deadline_s) if is_first else self._deadline_s


def _refuse_if(closing: asyncio.Event) -> None:
    if closing.is_set():
        raise RewardError("the reward pool is closed")


def _reply(sample_id: int, reply: WorkerReply) -> SampleScored | ScoreFailed:
    match reply:
        case Rewarded(reward):
            return SampleScored(sample_id, reward)
        case Failed(kind, error):
            return ScoreFailed(sample_id, kind, error)
    raise AssertionError(f"a worker answered an item with {reply}")


def kill_strays_beside(pools: Sequence[RewardPool]) -> bool:
    """End the orphans of killed wardens. For a subreaper whose only children are those of these pools. Returns whether
    there may be more."""
    pids = [pool.known_pids for pool in pools]
    return True if None in pids else kill_strays([pid for some in pids for pid in some or ()])
