"""Forks processes that need not import anything any more, so that a process is back at once after its death.

    python -P -m darts_async.machine.lifetime darts_async.machine.fork_server --parent PID --channel FD MODULE...

The modules are imported one after another, in this order. A request is served as soon as its own module is imported,
so put those first that are small. The server runs nothing else: it has one thread, no event loop and no device, or a
fork of it would not be safe. It looks before each fork, and refuses where this does not hold, or where a file of this
package has changed since it was imported: then the process is to be started in the ordinary way.

    KEEPER -> server   `ForkRequest`, with two descriptors: the file for the output, and the gate
    server -> KEEPER   `Forked` by the new process itself, or `NotForked`

The new process is a child of the keeper, not of the server: it is forked twice, and the kernel gives an orphan to the
nearest ancestor that has asked for orphans (`adopt_orphans`). So a server may die without effect on what it has forked.
The process runs nothing before it can read a byte from the gate. So a keeper that does not wait any longer closes the
gate, and no process is left that it does not know.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
import random
import runpy
import select
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from darts_async.machine.lifetime import die_with_parent

MAX_REQUEST_BYTES = 64 * 1024
BOUND_WITHIN_S = 5.0
"""How long a new process waits for being a child of the keeper."""
PACKAGES = ("darts_async.", "launcher.")
"""Their files may be edited while a run continues. The next start has to see it."""
THREADS_VARIABLE = "OMP_NUM_THREADS"

_PR_SET_CHILD_SUBREAPER = 36
_DEVICES = "/dev/nvidia"
_GO = b"g"


class ForkRequest(msgspec.Struct, frozen=True):
    """Run a command of `module_command`. The answer has the same `number`."""

    number: int
    argv: tuple[str, ...]
    env: dict[str, str | None]
    """Variables to set in the environment of the server, and to remove from it."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The process is there, and waits at its gate."""

    number: int
    pid: int


class NotForked(msgspec.Struct, frozen=True, tag=True):
    """It is to be started in the ordinary way."""

    number: int
    reason: str


Answer = Forked | NotForked


def adopt_orphans(*, wanted: bool = True) -> bool:
    """Let this process be the parent of descendants whose own parent has ended, or no longer. Whether the system can
    do that."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) == 0)


def open_gate(gate: int) -> None:
    """Let the process run. Raises `OSError` if it has ended."""
    os.write(gate, _GO)


@dataclass(frozen=True, slots=True)
class _Birth:
    """What a forked process is to become."""

    request: ForkRequest
    output: int
    gate: int

    def close(self) -> None:
        """Close its descriptors."""
        os.close(self.output)
        os.close(self.gate)


class ForkServer:
    """See the module."""

    def __init__(self, channel: socket.socket, parent_pid: int, modules: Sequence[str]) -> None:
        self._channel = channel
        self._parent_pid = parent_pid
        self._coming = list(modules)
        self._waiting: list[_Birth] = []
        self._files: dict[str, int] = {}
        """When each file of `PACKAGES` was last written, as of its import."""

    def run(self) -> _Birth | None:
        """Serve until the keeper has gone: then None. In each process that was forked: what it is to become."""
        while self._coming:
            module = self._coming.pop(0)
            _import(module)
            self._note_files()
            gc.collect()
            gc.freeze()  # a collection would write to the memory that all share
            while select.select([self._channel], [], [], 0.0)[0]:
                if not self._receive():
                    return None
            if (born := self._serve()) is not None:
                return born
        while self._receive():
            if (born := self._serve()) is not None:
                return born
        return None

    def _receive(self) -> bool:
        """Take one request. False once the keeper has closed the channel."""
        data, descriptors, _, _ = socket.recv_fds(self._channel, MAX_REQUEST_BYTES, 2)
        if not data:
            return False
        output, gate = descriptors
        self._waiting.append(_Birth(msgspec.msgpack.decode(data, type=ForkRequest), output, gate))
        return True

    def _serve(self) -> _Birth | None:
        """Fork for all requests whose module is there."""
        for birth in [*self._waiting]:
            if module_of(birth.request.argv) in self._coming:
                continue
            self._waiting.remove(birth)
            reason = self._reason_against()
            if reason is not None:
                self._answer(NotForked(birth.request.number, reason))
            elif self._fork(birth.request.number):
                for other in self._waiting:
                    other.close()
                return birth
            birth.close()
        return None

    def _reason_against(self) -> str | None:
        num_threads = len(os.listdir("/proc/self/task"))
        if num_threads > 1:
            return f"the imports have left {num_threads - 1} threads, which a fork would lose"
        if any(name.startswith(_DEVICES) for name in _open_files()):
            return "the imports have opened a GPU, which a fork cannot use"
        for path, written_ns in self._files.items():
            if _written_ns(path) != written_ns:
                return f"{path} has changed since it was imported"
        return None

    def _fork(self, number: int) -> bool:
        """Whether this is the new process."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            middle = os.fork()
            if middle != 0:
                _, status = os.waitpid(middle, 0)
                if status != 0:
                    self._answer(NotForked(number, "the system has no room for another process"))
                return False
        except OSError as error:
            self._answer(NotForked(number, str(error)))
            return False
        try:
            if os.fork() != 0:
                os._exit(0)  # now the new process is an orphan
        except OSError:
            os._exit(1)
        os.setsid()
        self._bind(number)
        self._answer(Forked(number, os.getpid()))
        self._channel.close()
        return True

    def _answer(self, answer: Answer) -> None:
        self._channel.send(msgspec.msgpack.encode(answer))

    def _bind(self, number: int) -> None:
        """Wait until the keeper is the parent, and end with it from now on."""
        deadline_s = time.monotonic() + BOUND_WITHIN_S
        while os.getppid() != self._parent_pid:
            if time.monotonic() > deadline_s:
                self._answer(NotForked(number, "the keeper did not become the parent of the new process"))
                os._exit(1)
            time.sleep(0.0005)
        die_with_parent(self._parent_pid)

    def _note_files(self) -> None:
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if path and f"{name}.".startswith(PACKAGES) and path not in self._files:
                self._files[path] = _written_ns(path)


def module_of(argv: Sequence[str]) -> str:
    """The module that a command of `module_command` runs."""
    return argv[4]


def _open_files() -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return names


def _written_ns(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return -1


def _import(module: str) -> None:
    """An import that fails here fails again in the process that needs it, which says so."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        sys.stderr.write(f"{module} is not imported in advance: {error}\n")


def _become(birth: _Birth) -> None:
    """Take output, environment and command line, wait at the gate, and run the module."""
    passed = os.read(birth.gate, 1)
    if passed != _GO:
        os._exit(1)
    os.dup2(birth.output, 1)
    os.dup2(birth.output, 2)
    birth.close()
    for name, value in birth.request.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None  # it is another directory now
    _set_threads()
    _reseed()
    _show_command_line(birth.request.argv)
    module = module_of(birth.request.argv)
    sys.argv = list(birth.request.argv[4:])
    sys.modules.pop(module, None)  # it is run under the name `__main__`, as ever
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _set_threads() -> None:
    """What libraries have read from the environment when they were loaded."""
    torch = sys.modules.get("torch")
    wanted = os.environ.get(THREADS_VARIABLE)
    if torch is not None and wanted is not None:
        torch.set_num_threads(int(wanted))


def _reseed() -> None:
    """Two processes of one server must not draw the same numbers. Code that needs certain numbers sets a seed."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _show_command_line(argv: Sequence[str]) -> None:
    """Let `ps` and this project's own records of processes see the command line of the process, as far as the room of
    the server's own goes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, fields 48 and 49 of the manual
        text = b"\0".join(word.encode() for word in argv)[: end - begin - 1]
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", help="for people and records: whose server this is")
    parser.add_argument("--parent", type=int, required=True, help="pid of the keeper")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the keeper")
    parser.add_argument("--room", help="ignored: the longer it is, the longer the command line of a process may be")
    parser.add_argument("modules", nargs="*")
    arguments = parser.parse_args()
    channel = socket.socket(fileno=arguments.channel)
    born = ForkServer(channel, arguments.parent, arguments.modules).run()
    if born is not None:
        _become(born)


if __name__ == "__main__":
    main()
