"""The generator's ends of the links to the workers of its engine (see `worker_link` for the others)."""

import asyncio
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from darts_async.errors import DeadlineError, ProtocolError
from darts_async.protocol import (
    GeneratorToWorker,
    UpdateFailed,
    UpdateReady,
    UpdateStaged,
    WorkerConnected,
    WorkerToGenerator,
)
from darts_async.weights.receiving.member import Report
from darts_async.wire.channel import Channel

log = structlog.get_logger()


class Answers:
    """Merges the answers of all workers to an offer into one. Pure."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._ready: set[int] = set()
        self._staged: dict[int, NDArray[np.int64]] = {}

    def begin(self) -> None:
        """A new offer."""
        self._ready.clear()
        self._staged.clear()

    def add(self, number: int, message: UpdateReady | UpdateStaged | UpdateFailed) -> Report | None:
        """A worker has answered: what to report now, if anything."""
        match message:
            case UpdateFailed(epoch, version, error):
                return UpdateFailed(epoch, version, f"worker {number}: {error}")
            case UpdateReady():
                self._ready.add(number)
                return message if len(self._ready) == self._num_workers else None
            case UpdateStaged(epoch, version, checksums):
                self._staged[number] = checksums
                if len(self._staged) < self._num_workers:
                    return None
                first = self._staged[0]
                wrong = [worker for worker, sums in sorted(self._staged.items()) if not np.array_equal(sums, first)]
                if wrong:
                    error = f"workers {wrong} have other checksums of version {version} than worker 0"
                    return UpdateFailed(epoch, version, error)
                return message


class WorkerLinks:
    """The sockets to the workers. `heard` is called with a worker's number and its message."""

    def __init__(self, num_workers: int, heard: Callable[[int, Report], None]) -> None:
        self._num_workers = num_workers
        self._heard = heard
        self._directory: Path | None = None
        self._server: asyncio.Server | None = None
        self._channels: dict[int, Channel[WorkerToGenerator]] = {}
        self._readers: set[asyncio.Task[Any]] = set()
        self._complete = asyncio.Event()

    async def open(self) -> Path:
        """Listen; returns where."""
        self._directory = Path(tempfile.mkdtemp(prefix="darts-"))  # of mode 0700
        path = self._directory / "workers"
        self._server = await asyncio.start_unix_server(self._serve, path)
        return path

    async def all_connected(self, deadline_s: float) -> None:
        """Wait for the first message of every worker. Then the directory is removed, and no process can connect. Raises
        `DeadlineError` if some do not connect."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._complete.wait()
        except TimeoutError:
            missing = sorted(set(range(self._num_workers)) - self._channels.keys())
            raise DeadlineError(f"workers {missing} of vLLM did not connect within {deadline_s:g} s") from None
        finally:
            self._stop_listening()

    def tell(self, number: int, message: GeneratorToWorker) -> None:
        """Send to a worker, if it is still there: the engine itself notices that it is not."""
        if number in self._channels:
            self._channels[number].send(message)

    async def close(self, deadline_s: float) -> None:
        """End all links."""
        self._stop_listening()
        for task in self._readers:
            task.cancel()
        if self._readers:
            await asyncio.wait(self._readers, timeout=deadline_s)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._server = self._directory = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        channel: Channel[WorkerToGenerator] = Channel(reader, writer, WorkerToGenerator)
        try:
            _require_same_user(writer)
            await self._listen(channel)
        except ProtocolError as error:
            log.error("worker_refused", error=str(error))
        except asyncio.CancelledError:
            log.debug("worker_link_closed")
        finally:
            self._readers.discard(task)
            await channel.close()

    async def _listen(self, channel: Channel[WorkerToGenerator]) -> None:
        first = await channel.receive()
        if not isinstance(first, WorkerConnected) or first.rank in self._channels:
            raise ProtocolError(f"the first message of a worker is {first}")
        if not 0 <= first.rank < self._num_workers:
            raise ProtocolError(f"worker {first.rank} of {self._num_workers}")
        self._channels[first.rank] = channel
        if len(self._channels) == self._num_workers:
            self._complete.set()
        while (message := await channel.receive()) is not None:
            if isinstance(message, WorkerConnected):
                raise ProtocolError(f"worker {first.rank} connects twice")
            self._heard(first.rank, message)


def _require_same_user(writer: asyncio.StreamWriter) -> None:
    """The directory already keeps others out; this also holds on file systems that ignore its mode."""
    if not hasattr(socket, "SO_PEERCRED"):
        return
    peer = writer.get_extra_info("socket")
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user != os.getuid():
        raise ProtocolError(f"a process of user {user} connected")
