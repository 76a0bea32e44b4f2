"""Starts the keeper of this machine as a child of the launcher, with which it always ends."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from darts_async.machine.spawn import outlives_parent, signal_name, spawn
from launcher.nodes.backends import AgentCommand, NodeError
from launcher.nodes.scratch import sweep

ENDED_WITHIN_S = 10.0
"""A killed process that has not ended after this long hangs in a system call."""


class LocalBackend:
    """The keeper of this machine. `output` is the file for its output."""

    def __init__(self, node: str, output: Path) -> None:
        self._node = node
        self._output = output
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def launch(self, command: AgentCommand, on_end: Callable[[str], None]) -> None:
        """Start the keeper, if it does not run. Raises `NodeError` if the system does not start it."""
        if self._process is not None and self._process.returncode is None:
            return
        try:
            with self._output.open("ab") as output:
                self._process = await spawn(
                    command.argv, cwd=command.cwd, env=command.env, stdout=output, stderr=asyncio.subprocess.STDOUT
                )
        except OSError as error:
            raise NodeError(self._node, f"its keeper cannot be started: {error}") from error
        self._watcher = asyncio.create_task(
            self._watch(self._process, on_end), name=f"watch the keeper of {self._node}"
        )

    async def kill(self) -> None:
        """Kill the keeper, and wait until all of its descendants have ended.

        A process that cleans up after its parent (the warden of a reward worker) is not killed: it ends its descendants
        itself. If it were killed, new descendants could escape.
        """
        if self._process is None:
            return
        below = _descendants(self._process.pid)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        _kill(_ended_by_us(below))  # the kernel ends them with the keeper; this makes sure
        _, stuck = await asyncio.to_thread(psutil.wait_procs, below, timeout=ENDED_WITHIN_S)
        _kill(stuck)  # a warden that is stopped, say
        await asyncio.to_thread(psutil.wait_procs, stuck, timeout=ENDED_WITHIN_S)

    async def close(self) -> None:
        """Wait for the end of the keeper. Kills it if it does not come. What a killed one has left is removed."""
        if self._watcher is None:
            return
        _, late = await asyncio.wait([self._watcher], timeout=ENDED_WITHIN_S)
        if late:
            await self.kill()
            await asyncio.wait([self._watcher], timeout=ENDED_WITHIN_S)
        await asyncio.to_thread(sweep)

    async def _watch(self, process: asyncio.subprocess.Process, on_end: Callable[[str], None]) -> None:
        code = await process.wait()
        how = f"by {signal_name(-code)}" if code < 0 else f"with exit code {code}"
        on_end(f"its keeper has ended {how}")


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ended_by_us(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes, except those that clean up after their parent and their descendants."""
    wardens = [process for process in processes if _outlives_parent(process)]
    spared = {*wardens, *(each for warden in wardens for each in _descendants(warden.pid))}
    return [process for process in processes if process not in spared]


def _outlives_parent(process: psutil.Process) -> bool:
    try:
        return outlives_parent(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _kill(processes: Iterable[psutil.Process]) -> None:
    """Kill the listed processes, never others that have their pids now."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
