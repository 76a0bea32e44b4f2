"""How processes of ours are started. No other module makes a command line of Python's or starts a process of ours.

    python -P -m darts_async.machine.lifetime MODULE ARGUMENT...

- `-P`: the directory of the caller is not on the path. A `structlog.py` that lies there is a file of the user's, and no
  process of ours is to execute it. A reward worker adds that directory itself, after its own imports.
- `lifetime` comes first and imports next to nothing: a process that still imports torch for half a minute does not
  outlive its parent either.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping, Sequence
from typing import IO, Any

from darts_async.machine.lifetime import PARENT_PID_VARIABLE

FIRST_MODULE = "darts_async.machine.lifetime"


def module_command(
    module: str, *arguments: str, python: str = sys.executable, outlives_parent: bool = False
) -> tuple[str, ...]:
    """The command line that runs a module of ours.

    With `outlives_parent` the kernel does not end it with its parent: for one that has to clean up after its parent and
    notices its end by itself.
    """
    return (python, "-P", "-m", *(() if outlives_parent else (FIRST_MODULE,)), module, *arguments)


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
    """Start a child of this process in a session of its own; `env` is added to the environment. Raises `OSError`.

    The kernel means the parent *thread* when it ends a child with its parent: call this from one that lives as long
    as the process.
    """
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
    """Of a signal that has ended a process. Most real-time signals have none in Python."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
