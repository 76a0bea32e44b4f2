"""Starts a keeper that outlives its ssh connection, and ends a keeper by force.

    ssh session --> keeper, which forks and waits --+--> prints the keeper's pid and exits
                      `--> leads a session, forks    |
                             `--> THE KEEPER --"up"--'    once it has an agent

The first process waits for a moment in case the keeper dies at once, because its end cannot be seen over ssh later.
"""

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from darts_async.errors import DeadlineError
from darts_async.topology.roles import keeper_name
from darts_async.topology.run_files import LOGS_DIR, output_path
from launcher.nodes.node_record import find_process, read_node_record, runs
from launcher.nodes.scratch import sweep
from launcher.run_dir.logs import last_lines

KILLED_WITHIN_S = 20.0
_POLL_S = 0.025
_NUM_LAST_WORDS = 8


def detach(run_dir: Path, node: str, life: int, watched_s: float) -> Callable[[], None]:
    """Return in a process with its own session. The result is to be called when there is an agent.

    The other processes exit: if a keeper of this life exists, or when the new keeper is up or has died within
    `watched_s`.
    """
    there = read_node_record(run_dir, node)
    if there is not None and find_process(run_dir, there.keeper) is not None:
        if there.life == life:
            _say(alive=there.keeper.pid)
            sys.exit()
        end_keeper(run_dir, node)
    reading, writing = os.pipe()
    if (pid := os.fork()) != 0:
        os.close(writing)
        os.waitpid(pid, 0)
        sys.exit(_last_words_of_the_dead(run_dir, node, reading, watched_s))
    os.close(reading)
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    _say(pid=os.getpid())
    _redirect(output_path(run_dir / LOGS_DIR, keeper_name(node)))
    return lambda: _tell(writing)


def end_keeper(run_dir: Path, node: str) -> None:
    """Kill the keeper of a node, and wait for the end of its descendants. Raises `DeadlineError`."""
    record = read_node_record(run_dir, node)
    if record is None:
        return
    everyone = (record.keeper, *record.processes, *([record.agent] if record.agent else []))
    found = {each.name: process for each in everyone if (process := find_process(run_dir, each)) is not None}
    if record.keeper.name in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            found[record.keeper.name].kill()
    deadline_s = time.monotonic() + KILLED_WITHIN_S
    while left := [f"{name} (pid {process.pid})" for name, process in found.items() if runs(process)]:
        if time.monotonic() > deadline_s:
            raise DeadlineError(f"{', '.join(left)}: alive {KILLED_WITHIN_S} s after the keeper was killed")
        time.sleep(_POLL_S)
    sweep()


def _last_words_of_the_dead(run_dir: Path, node: str, reading: int, timeout_s: float) -> str | None:
    """None if the keeper has an agent, or is still alive at the end of the time."""
    readable, _, _ = select.select([reading], [], [], timeout_s)
    if not readable or os.read(reading, 1):
        return None
    words = last_lines(run_dir / LOGS_DIR, keeper_name(node), _NUM_LAST_WORDS)
    return "\n".join(["its keeper has ended at once:", *words])


def _tell(descriptor: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the waiting process has timed out
        os.write(descriptor, b"1")
    os.close(descriptor)


def _redirect(output_path: Path) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(output_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for ours, standard in ((null, 0), (output, 1), (output, 2)):
        os.dup2(ours, standard)
    os.close(null)
    os.close(output)


def _say(**words: int) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()
