"""Starts processes by the fork server of a node, where that can be done: see `darts_async.machine.fork_server`.

`Forks.fork` says None wherever it cannot, for whichever reason, and the caller starts the process in the ordinary way.
So a server that is missing, late, dead or out of date costs time and nothing else.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import msgspec
import psutil
import structlog

from darts_async.machine.fork_server import Answer, Forked, ForkRequest, NotForked, adopt_orphans, module_of, open_gate
from darts_async.machine.spawn import is_module_command, module_command, spawn

FORKED_WITHIN_S = 45.0
"""A server that has not answered after this long, the imports included, is given up."""
UNKNOWN_EXIT_CODE = 255
MAX_SERVERS = 3
"""So many are started in the life of a keeper."""
_ROOM = "." * 512
"""For longer command lines than that of the server."""
_ANSWER_BYTES = 8192
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""In the server. A library with several threads starts them when it is loaded, and a fork loses them."""

log = structlog.get_logger()


class ForkedProcess:
    """A child of this process that a server has forked. Only one task may wait for it."""

    def __init__(self, pid: int) -> None:
        """Raises `OSError` if there is no such child."""
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    async def wait(self) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
        return await asyncio.to_thread(_exit_code, self.pid)


class Forks:
    """The fork server of a node. `whose` are words for its command line, `modules` what it imports, in this order."""

    def __init__(self, whose: Sequence[str], modules: Sequence[str], open_output: Callable[[], BinaryIO]) -> None:
        self._whose, self._modules, self._open_output = tuple(whose), tuple(modules), open_output
        self._numbers = itertools.count()
        self._num_servers = 0
        self._starting = asyncio.Lock()
        self._has_ended = False
        self._channel: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._asked: dict[int, asyncio.Future[Answer | None]] = {}  # at most as many as processes of the node

    @property
    def pid(self) -> int | None:
        """Of the server, if there was one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start a server, if none runs, and if the system can do what it needs."""
        async with self._starting:
            is_possible = self._num_servers < MAX_SERVERS and self._modules and adopt_orphans()
            if self._channel is None and is_possible and not self._has_ended:
                await self._start()

    async def _start(self) -> None:
        self._num_servers += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        words = ("--parent", str(os.getpid()), "--channel", str(theirs.fileno()), "--room", _ROOM, *self._modules)
        argv = module_command("darts_async.machine.fork_server", *self._whose, *words)
        try:
            with theirs, self._open_output() as output:
                self._process = await spawn(
                    argv, stdout=output, stderr=asyncio.subprocess.STDOUT, env=_ONE_THREAD, pass_fds=(theirs.fileno(),)
                )
        except OSError as error:
            log.warning("no_fork_server", error=str(error))
            ours.close()
            return
        if self._has_ended:
            ours.close()  # at which it ends
            return
        self._channel = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._read)

    async def fork(self, argv: Sequence[str], env: Mapping[str, str], output: BinaryIO) -> ForkedProcess | None:
        """A process with this command line, or None if it must be started in the ordinary way. Raises `OSError` if
        `end` was called."""
        if not is_module_command(argv, python=sys.executable) or module_of(argv) not in self._modules:
            return None
        await self.start()
        if self._channel is None:
            return None
        number = next(self._numbers)
        as_here = {name: os.environ.get(name) for name in _ONE_THREAD}
        request = msgspec.msgpack.encode(ForkRequest(number, tuple(argv), {**as_here, **env}))
        self._asked[number] = asyncio.get_running_loop().create_future()
        theirs, gate = os.pipe()
        try:
            socket.send_fds(self._channel, [request], [output.fileno(), theirs])
            async with asyncio.timeout(FORKED_WITHIN_S):
                answer = await self._asked[number]
        except (OSError, TimeoutError) as error:
            log.warning("fork_server_given_up", error=str(error) or f"no answer after {FORKED_WITHIN_S} s")
            self._give_up()
            return None
        else:
            if self._has_ended:
                raise InterruptedError("the node ends")
            return _begin(answer, gate)
        finally:
            self._asked.pop(number, None)
            os.close(theirs)
            os.close(gate)

    def end(self) -> None:
        """End the server. Processes that wait for it are not started any more."""
        self._has_ended = True
        self._give_up()

    async def close(self) -> None:
        """End, and wait for the end of the server."""
        self.end()
        if self._process is not None:
            await self._process.wait()

    def _read(self) -> None:
        assert self._channel is not None
        try:
            data = self._channel.recv(_ANSWER_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("fork_server_unreadable", error=str(error))
            data = b""
        if not data:
            self._give_up()
            return
        answer = msgspec.msgpack.decode(data, type=Answer)
        asked = self._asked.get(answer.number)
        if asked is not None and not asked.done():
            asked.set_result(answer)

    def _give_up(self) -> None:
        """End the server, if there is one. Processes that wait for it are started in the ordinary way."""
        if self._channel is None:
            return
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._channel.close()
        self._channel = None
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(None)


def _exit_code(pid: int) -> int:
    """Of a child that has ended. Waits where a debugger still holds it."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # somebody else has waited for it
        return UNKNOWN_EXIT_CODE
    return os.waitstatus_to_exitcode(status)


def _begin(answer: Answer | None, gate: int) -> ForkedProcess | None:
    match answer:
        case None:
            return None
        case NotForked(reason=reason):
            log.info("not_forked", reason=reason)
            return None
        case Forked(pid=pid):
            try:
                process = ForkedProcess(pid)
                open_gate(gate)
            except OSError as error:
                log.warning("forked_process_gone", pid=pid, error=str(error))
                return None
            return process


class Orphans:
    """The processes that came to this one because their parent has ended, as `adopt_orphans` asks for."""

    def __init__(self) -> None:
        self._ended: set[int] = set()

    def reap(self, ours: set[int]) -> None:
        """Let go of those that have ended, if they had ended at the last call too; `ours` are waited for elsewhere."""
        ended = {child.pid for child in psutil.Process().children() if _is_zombie(child)} - ours
        for pid in ended & self._ended:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._ended = ended


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
