"""The warden of a reward worker ends the worker's descendants with it, and enforces its limits.

    darts_async.reward.warden --functions JSON --tokenizer DIRECTORY --limits BYTES,COUNT,BYTES,BYTES

    reward process  <- jobs, replies  ->  worker  ->  whatever a reward function starts
          |                                 ^
          +----------- starts ->  warden  --+ forks; reads what it prints

The warden forks the worker before any import, and runs no foreign code. It is a subreaper, so no descendant escapes it.
It ends all its descendants and then itself when the worker has ended, when the reward process asks (SIGTERM) or has
ended (its end of the pipe is closed), or when a limit is exceeded. It ends by the worker's signal, or with the exit
code of the worker or of the limit (see `limits`). If the warden is killed, the kernel ends the worker, and the reward
process ends the other descendants, which it knows by their environment (`MARK`).

Memory and processes are measured several times a second; shorter peaks are missed.
"""

import argparse
import contextlib
import mmap
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from darts_async.machine.lifetime import die_with_parent, wake_with_parent
from darts_async.reward.descendants import become_subreaper, descendants, kill_descendants, memory_bytes
from darts_async.reward.limits import Limits, exit_code_of, passed_on

MARK = "DARTS_REWARD_WORKER"
"""An environment variable of a warden and its descendants, with a unique value."""
LOOK_EVERY_S = 0.2
END_WITHIN_S = 30.0
"""Killed processes that have not ended after this long are stuck in the kernel."""
_CHUNK_BYTES = select.PIPE_BUF
"""A writable pipe takes this many bytes at once, so that a warden never waits for the reader of its output."""


class Warden:
    """Watches one worker."""

    def __init__(self, worker_pid: int, limits: Limits, output: int, num_jobs: "SharedCount") -> None:
        """`output` receives what the worker prints; `num_jobs` counts the jobs that it has begun."""
        self._worker_pid = worker_pid
        self._limits = limits
        self._output = output
        self._num_jobs = num_jobs
        self._job = 0
        self._printed_bytes = 0
        self._pending = b""
        self._is_open = True
        self._status: int | None = None
        self._is_told_to_end = False
        self._next_look_s = 0.0
        self._signals = _wake_up_on_signals(self._told_to_end)

    def watch(self) -> str | None:
        """Wait until the worker has ended or must end. Returns the exceeded limit, if any."""
        while not self._is_told_to_end and not self._has_ended():
            readable = self._wait()
            if 0 in readable:
                return None
            if self._signals in readable:
                os.read(self._signals, _CHUNK_BYTES)
            breach = self._pass_on(self._output in readable) or self._look()
            if breach is not None:
                return breach
        return None

    def end(self, breach: str | None) -> None:
        """End all descendants, and then this process in the same way as the worker."""
        with contextlib.suppress(ProcessLookupError):
            if self._status is None:
                os.kill(self._worker_pid, signal.SIGKILL)
        kill_descendants(END_WITHIN_S)
        self._print_the_rest()
        if breach is not None:
            os._exit(exit_code_of(breach))
        if self._status is None or os.WIFEXITED(self._status):
            os._exit(0 if self._status is None else passed_on(os.WEXITSTATUS(self._status)))
        number = os.WTERMSIG(self._status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _told_to_end(self) -> None:
        self._is_told_to_end = True

    def _has_ended(self) -> bool:
        """Whether the worker has ended. Also reaps orphans."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == self._worker_pid:
                    self._status = status
                if pid == 0:
                    break
        return self._status is not None

    def _wait(self) -> set[int]:
        """Descriptors that are ready; standard input only when its other end is closed."""
        poller = select.poll()
        poller.register(0, 0)
        poller.register(self._signals, select.POLLIN)
        if self._pending:
            poller.register(2, select.POLLOUT)
        elif self._is_open:
            poller.register(self._output, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll(1000 * LOOK_EVERY_S)}

    def _pass_on(self, is_readable: bool) -> str | None:
        """Copy a piece of the worker's output to our standard error."""
        if is_readable and not self._pending:
            self._pending = os.read(self._output, _CHUNK_BYTES)
            self._is_open = bool(self._pending)
            job, self._job = self._job, self._num_jobs.value
            self._printed_bytes = len(self._pending) + (self._printed_bytes if job == self._job else 0)
        if self._pending and _can_write(2):
            with contextlib.suppress(OSError):  # the disk may be full or the reader gone: scoring continues
                os.write(2, self._pending)
            self._pending = b""
        return self._limits.breached_by(output_bytes=self._printed_bytes)

    def _look(self) -> str | None:
        """Measure the descendants from time to time."""
        if time.monotonic() < self._next_look_s:
            return None
        self._next_look_s = time.monotonic() + LOOK_EVERY_S
        pids = descendants(os.getpid(), self._limits.processes or sys.maxsize)
        used_bytes = memory_bytes(pids, self._limits.memory_bytes) if self._limits.memory_bytes else 0
        return self._limits.breached_by(memory_bytes=used_bytes, processes=len(pids))

    def _print_the_rest(self) -> None:
        """Copy the last output, as far as it fits."""
        os.set_blocking(self._output, False)
        left = self._limits.output_bytes or sys.maxsize
        with contextlib.suppress(OSError):
            while left > 0 and _can_write(2):
                left -= os.write(2, self._pending)
                self._pending = os.read(self._output, _CHUNK_BYTES)
                if not self._pending:
                    return


class SharedCount:
    """A number that a process counts up and its parent reads."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        """The count so far."""
        return int.from_bytes(self._memory[:8], "little")

    def up(self) -> None:
        """Count one more."""
        self._memory[:8] = (self.value + 1).to_bytes(8, "little")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="darts_async.reward.warden")
    parser.add_argument("--functions", required=True)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--limits", required=True, type=Limits.of_argument)
    options = parser.parse_args(arguments)
    wake_with_parent()  # a reward function may stop its warden, which would otherwise stay
    become_subreaper()
    _limit(resource.RLIMIT_CORE, 0)  # how a worker has crashed is printed
    output, prints_to = os.pipe()
    num_jobs, warden_pid = SharedCount(), os.getpid()
    worker_pid = os.fork()
    if worker_pid == 0:
        os.close(output)
        _become_worker(warden_pid, prints_to, options.limits)
        _work(options.functions, options.tokenizer, num_jobs)
        return
    os.close(prints_to)
    _let_go_of_replies()
    warden = Warden(worker_pid, options.limits, output, num_jobs)
    warden.end(warden.watch())


def _become_worker(warden_pid: int, prints_to: int, limits: Limits) -> None:
    """Bind the new worker to its warden, give it its own session, and set its limits."""
    die_with_parent(warden_pid)
    os.setsid()
    os.dup2(prints_to, 2)
    os.close(prints_to)
    if limits.file_bytes:
        _limit(resource.RLIMIT_FSIZE, limits.file_bytes)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (most, most))


def _work(functions: str, tokenizer_dir: Path, num_jobs: SharedCount) -> None:
    from darts_async.reward.worker import work  # slow, and runs the user's code
    from darts_async.reward.worker_messages import of_argument

    work(of_argument(functions), tokenizer_dir, num_jobs.up)


def _let_go_of_replies() -> None:
    """Close the pipe of the replies, so that the other end sees the worker's end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _wake_up_on_signals(told_to_end: Callable[[], None]) -> int:
    """A descriptor that is readable after a child has ended or SIGTERM has arrived. Other signals are ignored."""
    signals, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: told_to_end())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    return signals


def _can_write(descriptor: int) -> bool:
    return bool(select.select([], [descriptor], [], 0)[1])


if __name__ == "__main__":
    main()
