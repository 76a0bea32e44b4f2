"""Starts a follower for each sink, and starts one that has died again: for a run, and for `darts-launch follow`.

    starting ---> following ---> left: no further lines come, and it has taken all of them
                    |   ^
              died  |   |  after a wait that doubles
                    v   |
                  waiting ---> given up: it died `MAX_FAILURES` times and took no line in between, or may not start

Nothing here fails a run, and no line is lost: what a sink has not taken is in `metrics.jsonl`, and
`darts-launch follow` gives it the rest at any time.
"""

import asyncio
import contextlib
import os
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from darts_async.config import RunConfig
from darts_async.errors import NO_SPACE_EXIT_CODE, PERMANENT_EXIT_CODE
from darts_async.machine.spawn import module_command, signal_name, spawn
from darts_async.topology.run_files import LOGS_DIR, output_path
from darts_async.wire.backoff import backoff_s
from launcher.run_dir.logs import bound_outputs, last_words
from launcher.sinks.follower import process_name, read_memory

MAX_FAILURES: Final = 5
FIRST_WAIT_S: Final = 1.0
MAX_WAIT_S: Final = 30.0
CLOSE_WITHIN_S: Final = 10.0
"""How long the end of a run waits for the sinks to take what is left, and to close."""
_LOOK_AT_OUTPUT_S: Final = 5.0


@dataclass(slots=True)
class Attempts:
    """Decides whether a follower starts again.

    >>> attempts = Attempts()
    >>> [attempts.died(1, has_taken=False) for _ in range(5)]
    [1.0, 2.0, 4.0, 8.0, None]
    >>> Attempts(4).died(1, has_taken=True)
    1.0
    """

    num_failures: int = 0
    """Deaths in a row without a line in between."""

    def died(self, code: int, *, has_taken: bool) -> float | None:
        """The wait before the next one, in seconds; None if there is none. `has_taken`: it has taken a line."""
        if code == PERMANENT_EXIT_CODE:
            return None
        if code == NO_SPACE_EXIT_CODE:
            return MAX_WAIT_S
        self.num_failures = 1 if has_taken else self.num_failures + 1
        if self.num_failures >= MAX_FAILURES:
            return None
        return backoff_s(self.num_failures, FIRST_WAIT_S, MAX_WAIT_S)


@dataclass(slots=True)
class Followers:
    """The followers of a run, while the block of `async with` lasts. At its end they take what is left."""

    run_dir: Path
    config: RunConfig
    names: Sequence[str]
    close_within_s: float | None = CLOSE_WITHIN_S
    """None: they have all the time they need."""
    unserved: set[str] = field(default_factory=set)
    """Sinks that have not taken everything."""
    _notices: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._keep(name), name=process_name(name)) for name in self.names]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        try:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=self.close_within_s)
        finally:
            for task in self._tasks:
                task.cancel()
            results = await asyncio.gather(*self._tasks, return_exceptions=True)
            for name, result in zip(self.names, results, strict=True):
                if isinstance(result, Exception):  # an error of ours, or the run directory was removed
                    self._note(name, f"gets no further metrics: {type(result).__name__}: {result}")

    def finish(self) -> None:
        """No further lines come: each takes what is left, and leaves."""
        self._closing.set()

    @property
    def all_done(self) -> bool:
        """Whether every one has left or was given up."""
        return all(task.done() for task in self._tasks)

    def take_notices(self) -> list[str]:
        """What the user is to be told since the last call."""
        notices, self._notices = self._notices, []
        return notices

    async def _keep(self, name: str) -> None:
        """One sink, from its first follower to the last."""
        attempts, is_told = Attempts(), False
        self.unserved.add(name)
        while True:
            before = read_memory(self.run_dir, name)
            code = await self._follow_once(name)
            if code == 0:
                self.unserved.discard(name)
                return
            after = read_memory(self.run_dir, name)
            wait_s = attempts.died(code, has_taken=after.num_lines > before.num_lines)
            reason = self._reason(name, code)
            if wait_s is None or (self._closing.is_set() and self.close_within_s is not None):
                self._note(name, f"gets no further metrics: {reason}; {self._advice(name)}")
                return
            if not is_told:  # the later ones have the same cause, mostly
                self._note(name, f"has failed and is started again: {reason}; no metrics are lost")
            is_told = True
            await self._wait(wait_s)

    async def _wait(self, wait_s: float) -> None:
        """Before another attempt. The end of the block ends the wait, unless there is time."""
        if self._closing.is_set():
            await asyncio.sleep(wait_s)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), wait_s)

    async def _follow_once(self, name: str) -> int:
        """The exit code of one follower. It is told when the block ends, and killed when this is cancelled."""
        process = await self._started(name)
        if process is None:
            return 1
        try:
            await self._tell(process, self.config.model_dump_json().encode() + b"\n")
            ended = asyncio.create_task(process.wait(), name=f"{process_name(name)} ends")
            closing = asyncio.create_task(self._closing.wait(), name=f"{process_name(name)} may close")
            try:
                while not (ended.done() or closing.done()):
                    await asyncio.wait((ended, closing), timeout=_LOOK_AT_OUTPUT_S, return_when="FIRST_COMPLETED")
                    await asyncio.to_thread(self._bound_output, name)
                _close_input(process)
                return await ended
            finally:
                ended.cancel()
                closing.cancel()
        except asyncio.CancelledError:
            limit = "" if self.close_within_s is None else f" within {self.close_within_s:g} s"
            self._note(name, f"did not finish{limit}; {self._advice(name)}")
            raise
        finally:
            if process.returncode is None:
                process.kill()
                with contextlib.suppress(TimeoutError):  # one that a dead file system holds ends when that does
                    await asyncio.wait_for(process.wait(), CLOSE_WITHIN_S)

    async def _started(self, name: str) -> Process | None:
        command = module_command("launcher.sinks.follower", str(self.run_dir), name)
        try:
            with self._output(name).open("ab") as output:
                return await spawn(command, stdin=PIPE, stdout=output, stderr=output.fileno())
        except OSError as error:
            self._note(name, f"cannot be started: {error}")
            return None

    async def _tell(self, process: Process, line: bytes) -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has died: its exit code says why
            process.stdin.write(line)
            await process.stdin.drain()

    def _output(self, name: str) -> Path:
        return output_path(self.run_dir / LOGS_DIR, process_name(name))

    def _bound_output(self, name: str) -> None:
        max_bytes = int(self.config.telemetry.log_max_mb * 1e6)
        bound_outputs(self.run_dir / LOGS_DIR, (process_name(name),), max_bytes)

    def _reason(self, name: str, code: int) -> str:
        if code < 0:
            return f"its follower was killed ({signal_name(-code)})"
        said = last_words(self.run_dir / LOGS_DIR, process_name(name))
        return said or f"exit code {code}; see {os.path.relpath(self._output(name))}"

    def _advice(self, name: str) -> str:
        return f"`darts-launch follow {self.run_dir} --sink {name}` gives it the rest"

    def _note(self, name: str, text: str) -> None:
        self._notices.append(f"the sink {name} {text}")


def _close_input(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
