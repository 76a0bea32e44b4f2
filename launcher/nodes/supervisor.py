"""Starts processes, watches them end, and leaves none running.

Every process leads its own session, so its children can be ended with it, and a Ctrl-C in the terminal only reaches the
launcher. A process is identified by pid and start time, never by a name. Three invariants always hold:

- each process that was started gives exactly one `ProcessExit`;
- the exit is given only after the rest of the session (its children) has ended and its temporary files are removed
  (`scratch`), so that nothing of it can disturb the next incarnation;
- when the supervisor's process is killed, the kernel kills the processes (`darts_async.machine.lifetime`); when the
  supervisor's block is left in any way, all running processes have been killed and waited for.

Stopping asks first (SIGTERM), waits, and then kills the session.
"""

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
import psutil

from darts_async.errors import DeadlineError
from darts_async.machine.full_disk import is_no_space
from darts_async.machine.spawn import signal_name, spawn
from darts_async.topology.plan import ProcessSpec
from darts_async.topology.run_files import output_path
from launcher.nodes.scratch import Scratch
from launcher.nodes.warm_start import ForkedProcess, Forks

KILLED_AFTER_S = 10.0
"""A killed process that has not ended after this long hangs in a system call."""
_GONE_POLL_S = 0.02


class ProcessExit(msgspec.Struct, frozen=True):
    """A process ended, expectedly or not."""

    name: str
    pid: int
    code: int
    """Exit code, or minus the number of the signal that ended it."""
    incarnation: int = 1

    def __str__(self) -> str:
        if self.code < 0:
            return f"{self.name} was ended by {signal_name(-self.code)}"
        return f"{self.name} ended with exit code {self.code}"


class ProcessRecord(msgspec.Struct, frozen=True):
    """The data that identify a process."""

    name: str
    pid: int
    started_at_s: float
    argv: tuple[str, ...]
    incarnation: int = 1


@dataclass(slots=True)
class _Child:
    record: ProcessRecord
    process: asyncio.subprocess.Process | ForkedProcess
    watcher: asyncio.Task[None]


class Supervisor:
    """The processes of one machine. Use with `async with`; leaving the block kills those that still run. `forks` starts
    those that it can."""

    def __init__(self, logs_dir: Path, owner: str, forks: Forks | None = None) -> None:
        self._logs_dir, self._owner, self._forks = logs_dir, owner, forks
        self._children: dict[str, _Child] = {}
        self._ended: deque[ProcessExit] = deque()  # as many as were started and not yet read
        self._changed = asyncio.Event()
        self._watchers = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._watchers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()
        watchers = [child.watcher for child in self._children.values()]
        if watchers:  # first, because an error cancels the tasks of the task group
            await asyncio.wait(watchers, timeout=2 * KILLED_AFTER_S)
        await self._watchers.__aexit__(kind, error, trace)

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the processes that have not ended, in the order they were started."""
        return tuple(self._children)

    @property
    def records(self) -> dict[str, ProcessRecord]:
        return {name: child.record for name, child in self._children.items()}

    async def start(self, spec: ProcessSpec, incarnation: int = 1) -> ProcessRecord:
        """Start a process. Its output goes to `logs/ROLE-N.out`. Raises `OSError` if it cannot be executed."""
        assert spec.name not in self._children, f"{spec.name} is running"
        argv = _as_incarnation(spec.argv, incarnation)
        scratch = Scratch.make(self._owner)
        try:
            with self.open_output(spec.name) as output:
                env = {"TMPDIR": str(scratch.path), **spec.env}
                forked = await self._forks.fork(argv, env, output) if self._forks is not None else None
                process = forked or await spawn(argv, env=env, stdout=output, stderr=asyncio.subprocess.STDOUT)
        except OSError:
            scratch.remove()
            raise
        record = ProcessRecord(spec.name, process.pid, start_time_s(process.pid), argv, incarnation)
        watcher = self._watchers.create_task(self._watch(record, process, scratch), name=f"watch {spec.name}")
        self._children[spec.name] = _Child(record, process, watcher)
        return record

    async def exits(self) -> AsyncIterator[ProcessExit]:
        """Each process that ends, once, until the caller stops iterating."""
        while True:
            for ended in self.take_exits():
                yield ended
            self._changed.clear()
            await self._changed.wait()

    def take_exits(self) -> Iterator[ProcessExit]:
        """The exits that `exits` has not yielded yet."""
        while self._ended:
            yield self._ended.popleft()

    async def stop(self, name: str, grace_s: float) -> None:
        """Ask a process to leave, wait, and kill its session. Returns when it has ended. No effect after its end."""
        child = self._children.get(name)
        if child is None:
            return
        _send_signal(child.record.pid, signal.SIGTERM)
        _, late = await asyncio.wait([child.watcher], timeout=grace_s)
        if late:
            _kill_session(child.process.pid)
            await self._gone(child)

    async def stop_all(self, grace_s: float) -> None:
        await asyncio.gather(*(self.stop(name, grace_s) for name in self.running))

    def kill(self, name: str) -> None:
        """Kill the session of one process now. Its exit follows. No effect after its end."""
        if name in self._children:
            _kill_session(self._children[name].process.pid)

    def kill_all(self) -> None:
        """Kill every session now. The exits follow."""
        for child in self._children.values():
            _kill_session(child.process.pid)

    def open_output(self, name: str) -> BinaryIO:
        """See the function."""
        return open_output(self._logs_dir, name)

    async def _watch(
        self, record: ProcessRecord, process: asyncio.subprocess.Process | ForkedProcess, scratch: Scratch
    ) -> None:
        code = await process.wait()
        await end_session(process.pid)
        await asyncio.to_thread(scratch.remove)  # a reward function may leave much
        del self._children[record.name]
        self._ended.append(ProcessExit(record.name, process.pid, code, record.incarnation))
        self._changed.set()

    async def _gone(self, child: _Child) -> None:
        _, late = await asyncio.wait([child.watcher], timeout=KILLED_AFTER_S)
        if late:
            raise DeadlineError(
                f"{child.record.name} (pid {child.record.pid}) is alive {KILLED_AFTER_S} s after SIGKILL"
            )


def open_output(logs_dir: Path, name: str) -> BinaryIO:
    """What a process prints goes there, or nowhere on a disk that takes no further file. Raises `OSError`."""
    path = output_path(logs_dir, name)
    try:
        path.parent.mkdir(exist_ok=True)  # somebody may have removed it
        return path.open("ab")
    except OSError as error:
        if not is_no_space(error):
            raise
        return Path(os.devnull).open("ab")


def _as_incarnation(argv: tuple[str, ...], incarnation: int) -> tuple[str, ...]:
    """The command line with the value of `--incarnation` replaced, if it has one."""
    if "--incarnation" not in argv:
        return argv
    place = argv.index("--incarnation") + 1
    return (*argv[:place], str(incarnation), *argv[place + 1 :])


def start_time_s(pid: int) -> float:
    """When a process was started, in seconds since 1970; 0 if it has ended."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def _send_signal(pid: int, number: signal.Signals) -> None:
    """Without `asyncio`'s process object, whose poll can steal the exit code from its own watcher."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _session_members(session_id: int) -> list[int]:
    """Living processes of a session; zombies are gone as far as we care."""
    return [pid for pid in psutil.pids() if _is_member(pid, session_id)]


def _is_member(pid: int, session_id: int) -> bool:
    try:
        return os.getsid(pid) == session_id and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False


def _kill_session(session_id: int) -> None:
    """Send SIGKILL to every member separately, because a member may have its own process group."""
    for pid in _session_members(session_id):
        _send_signal(pid, signal.SIGKILL)


async def end_session(session_id: int) -> None:
    """Kill until no member is left; members may fork meanwhile. Raises `DeadlineError`."""
    deadline_s = asyncio.get_running_loop().time() + KILLED_AFTER_S
    while members := _session_members(session_id):
        if asyncio.get_running_loop().time() > deadline_s:
            raise DeadlineError(f"processes {members} are alive {KILLED_AFTER_S} s after SIGKILL")
        _kill_session(session_id)
        await asyncio.sleep(_GONE_POLL_S)
