"""Starts the processes of this package. No other module builds a Python command line or starts such a process.

    python -P -m darts_async.machine.lifetime MODULE ARGUMENT...

- `-P`: the caller's directory is not on the path, because a `structlog.py` of the user there must not be imported. A
  reward worker adds that directory itself, after its own imports.
- `lifetime` comes first and has few imports, so that even a process that imports torch for half a minute does not
  outlive its parent.
"""

import asyncio
import os
import resource
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping, Sequence
from typing import IO, Any

from darts_async.machine.lifetime import PARENT_PID_VARIABLE

FIRST_MODULE = "darts_async.machine.lifetime"
MAX_OPEN_FILES = 1 << 20
"""The soft limit is not raised above this, because some libraries do work for every possible descriptor."""


def module_command(
    module: str, *arguments: str, python: str = sys.executable, outlives_parent: bool = False
) -> tuple[str, ...]:
    """The command line that runs a module of this package. With `outlives_parent` the kernel does not end the process
    with its parent: for a process that cleans up after its parent and notices its end by itself."""
    return (python, "-P", "-m", *(() if outlives_parent else (FIRST_MODULE,)), module, *arguments)


def is_module_command(argv: Sequence[str], *, python: str) -> bool:
    """Whether this is a command line of `module_command` for that Python, of a process that ends with its parent."""
    return tuple(argv[:4]) == module_command("", python=python)[:4] and len(argv) > 4


def outlives_parent(argv: Sequence[str]) -> bool:
    """Whether this is a command line of `module_command` with `outlives_parent`."""
    return list(argv[1:3]) == ["-P", "-m"] and list(argv[3:4]) != [FIRST_MODULE]


async def spawn(
    argv: Sequence[str],
    *,
    stdout: int | IO[Any],
    env: Mapping[str, str] | None = None,
    stdin: int = DEVNULL,
    stderr: int | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
) -> Process:
    """Start a child of this process in its own session; `env` is added to the environment. Raises `OSError`. The kernel
    ends a child when the parent *thread* ends, so call this from a thread that lives as long as the process."""
    return await asyncio.create_subprocess_exec(
        *argv,
        env={**os.environ, **(env or {}), PARENT_PID_VARIABLE: str(os.getpid())},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def signal_name(number: int) -> str:
    """The name of a signal. Most real-time signals have no name in Python."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard limit; child processes inherit it. The usual soft limit of 1,024
    is for programs that use `select`. A process of a run uses `epoll`, and several descriptors for every peer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
