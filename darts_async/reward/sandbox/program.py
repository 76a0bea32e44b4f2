"""Runs one program in a sandbox and says what it printed and how it ended.

A program that exceeds a limit is killed, with all that it has started, and that is how it ended: it is not an error. An
error is a sandbox that could not be set up or taken down.
"""

import contextlib
import itertools
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from darts_async.errors import SandboxError
from darts_async.reward.descendants import descendants, memory_bytes
from darts_async.reward.sandbox.confine import SET_UP
from darts_async.reward.sandbox.directory import bytes_in, own_directory
from darts_async.reward.sandbox.isolation import Isolation, environment_in

LOOK_EVERY_S = 0.02
SET_UP_WITHIN_S = 10.0
END_WITHIN_S = 10.0
"""A killed program that has not ended after this long is stuck in the kernel."""
MAX_SUPERVISORS = 3
"""Processes of the sandbox itself: bubblewrap, its init, or a supervisor."""
_CHUNK_BYTES = 1 << 16
_numbers = itertools.count()
"""Of the programs of this process."""

Breach = Literal["wall_s", "memory", "processes", "output", "files"]
"""A limit that only the process which waits can enforce; the kernel enforces the others."""


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """What a program may use."""

    wall_s: float = 5.0
    cpu_s: int = 5
    """Of each of its processes."""
    memory_bytes: int = 512 << 20
    """Of all its processes together; address space of each, twice as much."""
    processes: int = 16
    """Processes and threads at a time, itself included."""
    file_bytes: int = 16 << 20
    """Size of each file."""
    files_bytes: int = 64 << 20
    """Size of all files that it has at a time. In bubblewrap they are in memory, and `memory_bytes` limits them."""
    output_bytes: int = 1 << 20
    """Of standard output and standard error, each."""

    def of_kernel(self, *, of_own_user: bool) -> dict[str, int]:
        """Those that the kernel enforces, by their name in `resource`. It counts processes by user, and so those of the
        sandbox itself too, unless the program has a user of its own."""
        return {
            "RLIMIT_NPROC": self.processes + (0 if of_own_user else MAX_SUPERVISORS),
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_AS": 2 * self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": 256,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    """128 and more: it was ended by a signal."""
    breach: Breach | None = None
    """The limit for which it was killed."""

    @property
    def is_good(self) -> bool:
        """It ended by itself, with exit code 0."""
        return self.breach is None and self.exit_code == 0


def run_program(
    argv: Sequence[str],
    files: Mapping[str, bytes],
    isolation: Isolation,
    limits: ProgramLimits,
    stdin: bytes = b"",
) -> Outcome:
    """Run a program in a directory of its own, to its end or to a limit.

    Args:
        argv: an executable with its path, and arguments.
        files: what is in its directory, which is its working directory.
        isolation: see `choose_isolation`.
        limits: what it may use.
        stdin: what it reads.

    Raises:
        SandboxError: the sandbox cannot be set up, or a process in it does not end.

    Example:
        >>> import sys
        >>> from darts_async.reward.sandbox.choice import choose_isolation
        >>> walls = choose_isolation("auto", sys.executable, allow_weaker=False).isolation
        >>> program = {"double.py": b"print(2 * int(input()))"}
        >>> run_program([sys.executable, "-I", "double.py"], program, walls, ProgramLimits(), b"21").stdout
        b'42\\n'
    """
    isolation = isolation.of_program(next(_numbers))
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(own_directory(isolation.place()))
        for name, content in files.items():
            (directory / name).write_bytes(content)
        isolation.give(directory)
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(stdin)
        given.seek(0)
        of_kernel = limits.of_kernel(of_own_user=bool(isolation.user_id))
        told, tells = os.pipe()
        stack.callback(os.close, told)
        with os.fdopen(tells, "wb"):
            command = isolation.command(argv, of_kernel, directory, limits.memory_bytes, tells)
            process = _start(command, directory, given, tells)
        watch = _Watch(process, limits, directory)
        stack.callback(watch.close)
        try:
            select.select([told], [], [], SET_UP_WITHIN_S)  # this is not the time of the program
            breach = watch.until_it_ends()
        finally:
            _kill(process, isolation)
        outcome = Outcome(watch.stdout, watch.stderr, _exit_code(process.returncode), breach)
        if not _was_executed(told):  # a program may end with any exit code and print anything
            said = outcome.stderr.decode(errors="replace").strip()[-500:] or f"it ended with {outcome.exit_code}"
            why = f"it was not set up within {SET_UP_WITHIN_S:g} s" if breach else said
            raise SandboxError(f"{isolation.describe()}: {why}")
    return outcome


def _was_executed(told: int) -> bool:
    """Whether the sandbox said that it was set up and then no more, because the program was executed."""
    os.set_blocking(told, False)
    try:
        return os.read(told, len(SET_UP) + 1) == SET_UP
    except BlockingIOError:  # a killed process has not ended yet, and has said nothing
        return False


def _start(command: Sequence[str], directory: Path, stdin: IO[bytes], tells: int) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env=environment_in(str(directory)),
            start_new_session=True,
            pass_fds=(tells,),
        )
    except OSError as error:
        raise SandboxError(f"a program cannot be started: {error}") from error


class _Watch:
    """Reads what a program prints, and measures what it uses."""

    def __init__(self, process: "subprocess.Popen[bytes]", limits: ProgramLimits, directory: Path) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._limits = limits
        self._directory = directory
        self._pipes = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        self._open = set(self._pipes)
        self._next_look_s = 0.0

    @property
    def stdout(self) -> bytes:
        """So far, as much as is allowed."""
        return self._printed(0)

    @property
    def stderr(self) -> bytes:
        """So far, as much as is allowed."""
        return self._printed(1)

    def until_it_ends(self) -> Breach | None:
        """Wait until the program has ended, or must end: for which limit. Its time begins now."""
        ends_at_s = time.monotonic() + self._limits.wall_s
        while True:
            has_ended = self._process.poll() is not None  # first: what it printed before is read below
            self._read(0.0 if has_ended else LOOK_EVERY_S)
            if any(len(printed) > self._limits.output_bytes for printed in self._pipes.values()):
                return "output"
            if has_ended:
                return None
            if time.monotonic() > ends_at_s:
                return "wall_s"
            breach = self._measured()
            if breach is not None:
                return breach

    def close(self) -> None:
        """Close the pipes."""
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _printed(self, place: int) -> bytes:
        return bytes(list(self._pipes.values())[place][: self._limits.output_bytes])

    def _read(self, wait_s: float) -> None:
        """What is there; all of it where nothing more can come."""
        while self._open:
            readable, _, _ = select.select(list(self._open), [], [], wait_s)
            for descriptor in readable:
                chunk = os.read(descriptor, _CHUNK_BYTES)
                self._pipes[descriptor] += chunk
                if not chunk:
                    self._open.discard(descriptor)
            if wait_s or not readable or any(len(p) > self._limits.output_bytes for p in self._pipes.values()):
                return
        if wait_s:
            time.sleep(wait_s)  # it has closed its output and is not at its end

    def _measured(self) -> Breach | None:
        if time.monotonic() < self._next_look_s:
            return None
        self._next_look_s = time.monotonic() + LOOK_EVERY_S
        most = self._limits.processes + MAX_SUPERVISORS
        pids = descendants(self._process.pid, most)
        if len(pids) > most:
            return "processes"
        if memory_bytes(pids, self._limits.memory_bytes) > self._limits.memory_bytes:
            return "memory"
        most_bytes = self._limits.files_bytes
        return "files" if bytes_in(self._directory, most_bytes) > most_bytes else None


def _kill(process: "subprocess.Popen[bytes]", isolation: Isolation) -> None:
    """End the program and all that it has started. Bubblewrap's processes end with it; a supervisor ends the others."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL if isolation.kind == "bubblewrap" else signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # the program may have stopped its supervisor
    try:
        process.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise SandboxError(f"a program was killed and has not ended within {END_WITHIN_S:g} s") from error


def _exit_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode
