"""The pool's handle of one worker process: start it, ask it, kill it.

An unfinished exchange (cancelled, late, or cut by the worker's end) leaves the pipe in an unknown state, so it always
kills the worker. The process of this handle is the worker's warden (see `warden`), which ends after the worker and all
processes that a reward function has started.
"""

import asyncio
import contextlib
import signal
import uuid
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from darts_async.errors import DeadlineError, ProcessDiedError, ProtocolError, RewardError
from darts_async.machine.spawn import module_command, signal_name, spawn
from darts_async.reward.descendants import kill_marked
from darts_async.reward.limits import Limits, breach_of, shown_exit_code
from darts_async.reward.warden import MARK
from darts_async.reward.worker_messages import (
    LoadFailed,
    WorkerReply,
    WorkItem,
)
from darts_async.wire.channel import Channel

REAP_S = 10.0
"""A killed process that has not ended after this long is stuck in the kernel."""
LAST_WORDS_S = 5.0
"""Time for a worker that has closed its pipe, and for its warden, to end by themselves."""


class LimitExceededError(ProcessDiedError):
    """A worker was ended because it or its descendants exceeded a limit of the settings."""


class Worker:
    """A running worker process. One exchange at a time."""

    def __init__(self, process: Process, limits: Limits, mark: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._channel: Channel[WorkerReply] = Channel(process.stdout, process.stdin, WorkerReply)
        self._limits = limits
        self._mark = mark
        self._killed = False
        self.num_responses = 0
        """Number of answered items."""

    @classmethod
    async def spawn(cls, function: str, tokenizer_dir: Path, limits: Limits) -> "Worker":
        """Start the process. It accepts items once `ready` has returned.

        Raises:
            RewardError: the system refuses a new process.
        """
        mark = uuid.uuid4().hex
        try:
            whose = ("--function", function, "--tokenizer", str(tokenizer_dir), "--limits", limits.as_argument())
            argv = module_command("darts_async.reward.warden", *whose, outlives_parent=True)
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
        """Wait until the worker has loaded the function.

        Raises:
            RewardError: it could not, it ended, or it took longer than the deadline.
        """
        try:
            reply = await self._exchange(None, deadline_s)
        except (TimeoutError, ProcessDiedError) as error:
            reason = str(error) or f"it was not ready within {deadline_s:g} s"
            raise RewardError(f"reward worker {self.pid} could not start: {reason}") from error
        if isinstance(reply, LoadFailed):
            self.kill()
            raise RewardError(reply.error)

    async def ask(self, item: WorkItem, deadline_s: float) -> WorkerReply:
        """The worker's reply.

        Raises:
            TimeoutError: there was none within the deadline; the worker is killed.
            LimitExceededError: it exceeded a limit; the worker is killed.
            ProcessDiedError: the worker ended.
        """
        reply = await self._exchange(item, deadline_s)
        self.num_responses += 1
        return reply

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
                if await self._process.wait() == -signal.SIGKILL:  # perhaps the warden itself, before it cleaned up
                    kill_marked(MARK, self._mark)
                await self._process.communicate()
        except TimeoutError as error:
            raise DeadlineError(f"reward worker {self.pid} was killed and has not ended within {REAP_S:g} s") from error

    async def _exchange(self, item: WorkItem | None, deadline_s: float) -> WorkerReply:
        assert self._process.stdin is not None
        reply = None
        try:
            async with asyncio.timeout(deadline_s):
                if item is not None:
                    self._channel.send(item)
                    with contextlib.suppress(ConnectionError):  # what it said before can still be read
                        await self._process.stdin.drain()
                reply = await self._channel.receive()
            if reply is None:
                raise await self._death()
        except ProtocolError as error:
            raise ProcessDiedError(f"reward worker {self.pid} wrote what is not a reply: {error}") from error
        finally:
            if reply is None:
                self.kill()
        return reply

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
