"""One worker process as its pool sees it: start it, ask it, kill it.

An exchange that was begun and not finished (cancelled, late, or cut by the worker's end) leaves the pipe in an
unknown place, so it always kills the worker. A worker leads a process group of its own, and the kill goes to the
group: what a reward function has started goes with it.
"""

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from darts_async.errors import DeadlineError, ProcessDiedError, RewardError
from darts_async.reward.wire import LENGTH_BYTES, LoadFailed, WorkerReply, WorkItem, decode_reply, encode_frame
from darts_async.spawn import module_command, spawn

REAP_S = 10.0
"""A killed process that has not ended by then is stuck in the kernel."""
LAST_WORDS_S = 1.0
"""A worker that has closed its pipe gets this long to end with an exit status of its own."""


class Worker:
    """A running worker process. One exchange at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._killed = False

    @classmethod
    async def spawn(cls, function: str, tokenizer_dir: Path) -> "Worker":
        """Start the process. It takes items when `ready` has returned.

        Raises:
            RewardError: the system refuses a new process.
        """
        try:
            whose = ("--function", function, "--tokenizer", str(tokenizer_dir))
            argv = module_command("darts_async.reward.worker", *whose)
            process = await spawn(argv, stdin=PIPE, stdout=PIPE, env={"TOKENIZERS_PARALLELISM": "false"})
        except OSError as error:
            raise RewardError(f"a reward worker could not be started: {error}") from error
        return cls(process)

    @property
    def is_usable(self) -> bool:
        """It has not been killed and has not ended."""
        return not self._killed and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    async def ready(self, deadline_s: float) -> None:
        """Wait until the worker has loaded the function.

        Raises:
            RewardError: it cannot, ended, or took longer than the deadline.
        """
        try:
            reply = await self._exchange(b"", deadline_s)
        except (TimeoutError, ProcessDiedError) as error:
            reason = str(error) or f"it was not ready within {deadline_s:g} s"
            raise RewardError(f"reward worker {self.pid} could not start: {reason}") from error
        if isinstance(reply, LoadFailed):
            self.kill()
            raise RewardError(reply.error)

    async def ask(self, item: WorkItem, deadline_s: float) -> WorkerReply:
        """The worker's judgement.

        Raises:
            TimeoutError: there was none within the deadline; the worker is killed.
            ProcessDiedError: the worker ended.
        """
        return await self._exchange(encode_frame(item), deadline_s)

    def kill(self) -> None:
        """End the process and all that it started, without waiting."""
        self._killed = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def reap(self) -> None:
        """Wait for a killed process to be gone, pipes included.

        Raises:
            DeadlineError: it is still there.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(REAP_S):
                await self._process.communicate()
        except TimeoutError as error:
            raise DeadlineError(f"reward worker {self.pid} was killed and has not ended within {REAP_S:g} s") from error

    async def _exchange(self, request: bytes, deadline_s: float) -> WorkerReply:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        finished = False
        try:
            async with asyncio.timeout(deadline_s):
                self._process.stdin.write(request)
                await self._process.stdin.drain()
                header = await self._process.stdout.readexactly(LENGTH_BYTES)
                body = await self._process.stdout.readexactly(int.from_bytes(header, "little"))
            finished = True
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ProcessDiedError(f"reward worker {self.pid} {await self._cause_of_death()}") from error
        finally:
            if not finished:
                self.kill()
        return decode_reply(body)

    async def _cause_of_death(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._process.wait()
        match self._process.returncode:
            case None:
                return "closed its pipe"
            case code if code < 0:
                return f"was ended by {signal.Signals(-code).name}"
            case code:
                return f"ended with exit code {code}"
