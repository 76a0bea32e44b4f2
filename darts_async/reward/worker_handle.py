"""The pool's handle of one worker process: start it, ask it, kill it.

A job that is not answered (cancelled, late, or cut by the worker's end) leaves the worker in an unknown state, so it
always kills the worker. Other jobs of that worker are not at fault and are told so (`EndedForAnotherError`). The
process of this handle is the worker's warden (see `warden`), which ends after the worker and all processes that a
reward function has started.
"""

import asyncio
import contextlib
import signal
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from darts_async.errors import DeadlineError, ProcessDiedError, ProtocolError, RewardError
from darts_async.machine.spawn import module_command, signal_name, spawn
from darts_async.reward.descendants import kill_marked
from darts_async.reward.limits import Limits, breach_of, shown_exit_code
from darts_async.reward.warden import MARK
from darts_async.reward.worker_messages import (
    Begun,
    Done,
    Failed,
    FunctionSpecs,
    Job,
    LoadFailed,
    Ready,
    Rewarded,
    WorkerReply,
    WorkItem,
    as_argument,
)
from darts_async.wire.channel import Channel

REAP_S = 10.0
"""A killed process that has not ended after this long is stuck in the kernel."""
LAST_WORDS_S = 5.0
"""Time for a worker that has closed its pipe, and for its warden, to end by themselves."""


class LimitExceededError(ProcessDiedError):
    """A worker was ended because it or its descendants exceeded a limit of the settings."""


class EndedForAnotherError(ProcessDiedError):
    """A worker was ended because another one of its jobs was late or cancelled."""


GRACE_S = 1.0
"""A worker cancels late coroutines by itself, and says so. It is killed if it has not done so for this long."""


@dataclass(frozen=True, slots=True, eq=False)
class _OpenJob:
    """A job that is not answered yet."""

    answer: asyncio.Future[list[Rewarded | Failed]]
    limit: asyncio.Timeout
    allowed_s: float


class Worker:
    """A running worker process."""

    def __init__(self, process: Process, limits: Limits, mark: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._channel: Channel[WorkerReply] = Channel(process.stdout, process.stdin, WorkerReply)
        self._limits = limits
        self._mark = mark
        self._killed = False
        self._jobs: dict[int, _OpenJob] = {}
        self._num_jobs = 0
        self._listener: asyncio.Task[None] | None = None
        self._error = ProcessDiedError("it has not ended")
        """Why it ended, once `_listener` is done."""
        self.is_async = False
        """Whether it may have several jobs at a time."""
        self.num_responses = 0
        """Number of answered jobs."""

    @classmethod
    async def spawn(cls, functions: FunctionSpecs, tokenizer_dir: Path, limits: Limits) -> "Worker":
        """Start the process. It accepts jobs once `ready` has returned.

        Raises:
            RewardError: the system refuses a new process.
        """
        mark = uuid.uuid4().hex
        try:
            whose = ("--functions", as_argument(functions), "--tokenizer", str(tokenizer_dir))
            held_to = ("--limits", limits.as_argument())
            argv = module_command("darts_async.reward.warden", *whose, *held_to, outlives_parent=True)
            process = await spawn(argv, stdin=PIPE, stdout=PIPE, env={"TOKENIZERS_PARALLELISM": "false", MARK: mark})
        except OSError as error:
            raise RewardError(f"a reward worker could not be started: {error}") from error
        return cls(process, limits, mark)

    @property
    def is_usable(self) -> bool:
        """Whether it is running and was not killed."""
        return not self._killed and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The pid of its warden."""
        return self._process.pid

    async def ready(self, deadline_s: float) -> None:
        """Wait until the worker has loaded the functions.

        Raises:
            RewardError: it could not, it ended, or it took longer than the deadline.
        """
        reply = None
        try:
            async with asyncio.timeout(deadline_s):
                reply = await self._channel.receive()
                if reply is None:
                    raise await self._death()
        except (TimeoutError, ProcessDiedError, ProtocolError) as error:
            reason = str(error) or f"it was not ready within {deadline_s:g} s"
            raise RewardError(f"reward worker {self.pid} could not start: {reason}") from error
        finally:
            if not isinstance(reply, Ready):
                self.kill()
        if isinstance(reply, LoadFailed):
            raise RewardError(reply.error)
        if not isinstance(reply, Ready):
            raise RewardError(f"reward worker {self.pid} could not start: it wrote what is not a reply")
        self.is_async = reply.is_async
        self._listener = asyncio.create_task(self._listen(), name=f"listen to reward worker {self.pid}")

    async def ask(self, items: Sequence[WorkItem], deadline_s: float) -> list[Rewarded | Failed]:
        """The worker's replies to a job, one for each item.

        Raises:
            TimeoutError: there were none within the deadline, which counts from the moment when the worker takes the
                job up; the worker is killed.
            LimitExceededError: it exceeded a limit; the worker is killed.
            EndedForAnotherError: the worker was killed because of another job.
            ProcessDiedError: the worker ended.
        """
        assert self._process.stdin is not None
        assert self._listener is not None, "wait until it is ready"
        job_id, self._num_jobs = self._num_jobs, self._num_jobs + 1
        answer: asyncio.Future[list[Rewarded | Failed]] = asyncio.get_running_loop().create_future()
        allowed_s = deadline_s + (GRACE_S if self.is_async else 0.0)
        is_answered = False
        try:
            async with asyncio.timeout(allowed_s * (1 + len(self._jobs))) as limit:
                self._jobs[job_id] = _OpenJob(answer, limit, allowed_s)
                self._channel.send(Job(job_id, deadline_s, list(items)))
                if self._listener.done():  # it has ended: what it said has been read
                    raise self._error
                with contextlib.suppress(ConnectionError):  # what it said before can still be read
                    await self._process.stdin.drain()
                replies = await answer
            is_answered = True
        finally:
            del self._jobs[job_id]
            if not is_answered:
                self.kill()
        self.num_responses += 1
        return replies

    def kill(self) -> None:
        """End the process and its descendants, without waiting."""
        self._killed = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
                self._process.send_signal(signal.SIGCONT)  # a stopped warden receives no other signal

    async def reap(self) -> None:
        """Wait for the end of a killed process and its pipes.

        Raises:
            DeadlineError: it has not ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(REAP_S):
                code = await self._process.wait()
                if self._listener is not None:
                    await self._listener
                if code == -signal.SIGKILL:  # perhaps the warden itself, before it cleaned up
                    kill_marked(MARK, self._mark)
                await self._process.communicate()
        except TimeoutError as error:
            raise DeadlineError(f"reward worker {self.pid} was killed and has not ended within {REAP_S:g} s") from error

    async def _listen(self) -> None:
        """Hand the replies to those that wait for them, until the worker ends, which these are told then."""
        try:
            while (reply := await self._channel.receive()) is not None:
                self._take(reply)
            self._error = await self._end()
        except ProtocolError as error:
            self._error = ProcessDiedError(f"reward worker {self.pid} wrote what is not a reply: {error}")
        self.kill()
        for job in self._jobs.values():
            if not job.answer.done():
                job.answer.set_exception(self._error)

    def _take(self, reply: WorkerReply) -> None:
        job = self._jobs.get(reply.job_id) if isinstance(reply, (Begun, Done)) else None
        if job is None:
            if not self._killed:  # an answer to what it was killed for may still come
                raise ProtocolError(f"{type(reply).__name__} of no job of its own")
        elif isinstance(reply, Begun) and not job.limit.expired():
            job.limit.reschedule(asyncio.get_running_loop().time() + job.allowed_s)
        elif isinstance(reply, Done) and not job.answer.done():
            job.answer.set_result(reply.replies)

    async def _end(self) -> ProcessDiedError:
        if self._killed:
            return EndedForAnotherError(f"reward worker {self.pid} was ended because another response was late")
        return await self._death()

    async def _death(self) -> ProcessDiedError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._process.wait()
        code = self._process.returncode
        if code is None:
            return ProcessDiedError(f"reward worker {self.pid} closed its pipe")
        if code < 0:
            return ProcessDiedError(f"reward worker {self.pid} was ended by {signal_name(-code)}")
        breach = breach_of(code)
        if breach is not None:
            return LimitExceededError(f"the reward function {self._limits.describe(breach)}, and was ended")
        return ProcessDiedError(f"reward worker {self.pid} ended with exit code {shown_exit_code(code)}")
