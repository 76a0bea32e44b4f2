"""Reward functions that live in the calling Python process: closures, and functions of a notebook.

    worker process of a reward actor                  the process that called `run`
    score(prompt=..., response=...)  --- Sample --->  function(prompt=..., response=...)
                                     <-- Scored ---   its number, or its exception as text

The workers connect to a local socket in a directory that only this user may enter, and its path comes with the
environment. Nothing is pickled: the function stays where it is. Calls come from several threads at once, one for each
worker. A function of a module is faster by its name (`reward.function: module:name`), because every worker then has a
copy of its own.
"""

import contextlib
import math
import os
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from darts_async.errors import ProtocolError
from darts_async.wire.channel import read_message, write_message

FUNCTION = f"{__name__}:score"
SOCKET_VARIABLE = "DARTS_CALLABLE_REWARD"
"""Path of the socket, in the environment of the run."""
MAX_CONNECTIONS = 256

RewardFunction = Callable[..., float]


class Sample(msgspec.Struct, frozen=True):
    """The arguments of a reward function."""

    prompt: str
    response: str
    answer: str
    metadata: dict[str, Any]
    finish_reason: str


class Scored(msgspec.Struct, frozen=True):
    """A reward, or why there is none."""

    reward: float
    error: str = ""


_SAMPLE = msgspec.msgpack.Decoder(Sample)
_SCORED = msgspec.msgpack.Decoder(Scored)


def score(**sample: Any) -> float:
    """The reward of the calling process's function. Called in a worker.

    Raises:
        RuntimeError: the function raised, or its process is gone.
    """
    try:
        connection = connection_of(os.getpid())
        write_message(connection, Sample(**sample))
        scored = read_message(connection, _SCORED)
    except (OSError, ValueError) as error:  # the next call connects again
        connection_of.cache_clear()
        raise RuntimeError(f"the process that called run() cannot be reached: {error}") from error
    if scored is None:
        connection_of.cache_clear()
        raise RuntimeError("the process that called run() is gone")
    if scored.error:
        raise RuntimeError(scored.error)
    return scored.reward


@cache
def connection_of(pid: int) -> BinaryIO:
    """The connection of a process to its caller: a worker that was forked from another needs its own.

    Raises:
        RuntimeError: there is no caller.
        OSError: it cannot be reached.
    """
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        raise RuntimeError(f"{SOCKET_VARIABLE} is not set: {pid} was not started by launcher.api.run(reward=...)")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        return _file_of(connection)


def _file_of(connection: socket.socket) -> BinaryIO:
    """A file that reads and writes, and keeps the connection open."""
    return cast(BinaryIO, connection.makefile("rwb"))


@contextlib.contextmanager
def served(function: RewardFunction) -> Iterator[Path]:
    """Answer workers while inside the block. Yields the path of the socket."""
    with tempfile.TemporaryDirectory(prefix="darts-") as home, socket.socket(socket.AF_UNIX) as listener:
        path = Path(home) / "reward.sock"
        listener.bind(str(path))
        listener.listen(MAX_CONNECTIONS)
        connections: set[socket.socket] = set()
        accepting = threading.Thread(
            target=_accept, args=(listener, function, connections), name="reward connections", daemon=True
        )
        accepting.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for connection in tuple(connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, function: RewardFunction, connections: set[socket.socket]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the block has ended
            return
        if len(connections) >= MAX_CONNECTIONS:
            connection.close()
            continue
        connections.add(connection)
        answering = threading.Thread(
            target=_answer, args=(connection, function, connections), name="reward calls", daemon=True
        )
        answering.start()


def _answer(connection: socket.socket, function: RewardFunction, connections: set[socket.socket]) -> None:
    try:
        with connection, _file_of(connection) as file:
            while (sample := read_message(file, _SAMPLE)) is not None:
                write_message(file, _scored(function, sample))
    except (OSError, ProtocolError, ValueError):  # the worker is gone, or the file is closed
        return
    finally:
        connections.discard(connection)


def _scored(function: RewardFunction, sample: Sample) -> Scored:
    try:
        reward = float(function(**msgspec.structs.asdict(sample)))
    except BaseException as error:  # noqa: BLE001 - a user's function may also call exit(), or skip a test
        *_, last = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno}, in {last.name})"
        return Scored(0.0, text.encode(errors="replace").decode())
    return Scored(reward) if math.isfinite(reward) else Scored(0.0, f"ValueError: the reward is {reward}")
