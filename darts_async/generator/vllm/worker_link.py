"""A worker's end of the link to its generator, with a rank of the broadcast group, beside the running model.

Messages of the learner reach a worker through its generator, over a socket in a directory that only the user can enter.
A thread with an event loop of its own reads them and owns the `Rank`. The worker's main thread continues to decode, and
only fetches what was received. This module does not use vLLM.
"""

import asyncio
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Generic, TypeVar

import torch

from darts_async.errors import DartsError, DeadlineError, WeightUpdateError
from darts_async.protocol import GeneratorToWorker, UpdateCommitted, WorkerConnected
from darts_async.weights.receiving.receiving_rank import Rank
from darts_async.weights.receiving.staging import Staging, TensorStream
from darts_async.wire.channel import Channel

CONNECT_S: Final = 10.0
FETCH_S: Final = 10.0
"""What is fetched was announced on another way before: it is there, or is about to be."""
CLOSE_S: Final = 10.0

T = TypeVar("T")


class _Counter(Generic[T]):
    """Holds one thing for another thread. A newer one replaces it."""

    def __init__(self) -> None:
        self._queue: queue.Queue[T] = queue.Queue(maxsize=1)

    def leave(self, thing: T) -> T | None:
        """Returns what was not fetched. Called by one thread only."""
        unused = self.fetch(0.0)
        self._queue.put_nowait(thing)
        return unused

    def fetch(self, timeout_s: float) -> T | None:
        """None: there was nothing."""
        with suppress(queue.Empty):
            return self._queue.get(timeout=timeout_s)
        return None


class WorkerLink:
    """All methods are called by the worker's main thread.

    Args:
        number: of this worker among those of its generator, from 0.
        interface: local address that the collective's sockets bind to.
        is_direct: updates are not staged but streamed (see `stream`).
        lost: called, in the link's thread, when the generator is gone or sends an invalid message.
    """

    def __init__(
        self,
        socket_path: Path,
        number: int,
        interface: str,
        device: torch.device,
        *,
        is_direct: bool,
        lost: Callable[[], None],
    ) -> None:
        self._socket_path = socket_path
        self._number = number
        self._interface = interface
        self._device = device
        self._is_direct = is_direct
        self._lost = lost
        self._committed: _Counter[tuple[int, Staging | None]] = _Counter()
        self._streams: _Counter[TensorStream] = _Counter()
        self._connected: _Counter[OSError | bool] = _Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._conversation: asyncio.Task[None] | None = None
        self._rank: Rank | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"weights-link-{number}", daemon=True)

    def open(self) -> None:
        """Connect. Raises `OSError` if the generator does not listen, `DeadlineError` if it takes too long."""
        self._thread.start()
        outcome = self._connected.fetch(CONNECT_S)
        if outcome is None:
            raise DeadlineError(f"worker {self._number} could not connect within {CONNECT_S:g} s")
        if isinstance(outcome, OSError):
            raise outcome

    def staged(self, policy_version: int) -> Staging:
        """The weights of a version that was committed, to be given back. Raises `WeightUpdateError` without them."""
        version, staging = self._committed.fetch(FETCH_S) or (-1, None)
        if staging is None or version != policy_version:
            raise WeightUpdateError(f"version {policy_version} is not staged; the last one committed is {version}")
        return staging

    def give_back(self, staging: Staging) -> None:
        """This memory is no longer read."""
        if self._rank is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._rank.give_back, staging)

    def stream(self, policy_version: int) -> TensorStream:
        """The tensors of a version that was offered. Raises `WeightUpdateError` if it was not."""
        stream = self._streams.fetch(FETCH_S)
        if stream is None or stream.policy_version != policy_version:
            raise WeightUpdateError(f"version {policy_version} is not under way here")
        return stream

    def close(self) -> None:
        """Leave the group and end the thread. Idempotent. Raises `DeadlineError` if the thread hangs."""
        self._closing = True
        if self._loop is not None and self._conversation is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._conversation.cancel)
        if self._thread.ident is not None:
            self._thread.join(2 * CLOSE_S)
        if self._thread.is_alive():
            raise DeadlineError(f"the weight link of worker {self._number} did not end within {2 * CLOSE_S:g} s")

    # --- the link's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner() as runner, suppress(asyncio.CancelledError):
                self._loop = runner.get_loop()
                self._conversation = self._loop.create_task(self._converse(), name="weights link")
                self._loop.run_until_complete(self._conversation)
        except DartsError as error:
            sys.stderr.write(f"the weight link of worker {self._number} ended: {error}\n")
        finally:  # after any end no weights reach this worker, and no other process would notice
            if not self._closing:
                self._lost()

    async def _converse(self) -> None:
        """Until the generator is gone, or `close`."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket_path)
        except OSError as error:
            self._closing = True
            self._connected.leave(error)
            return

        channel: Channel[GeneratorToWorker] = Channel(reader, writer, GeneratorToWorker)
        device = self._device if self._device.type == "cuda" else None
        load = self._streams.leave if self._is_direct else None
        self._rank = rank = Rank(self._interface, channel.send, device, load)
        channel.send(WorkerConnected(self._number))
        self._connected.leave(True)
        try:
            while (message := await channel.receive()) is not None:
                if not isinstance(message, UpdateCommitted):
                    rank.handle(message)
                elif not self._is_direct:
                    self._commit(rank, message)
        finally:
            writer.close()
            await rank.close(CLOSE_S)

    def _commit(self, rank: Rank, message: UpdateCommitted) -> None:
        staging = rank.take(message) if rank.has_staged(message) else None
        unused = self._committed.leave((message.policy_version, staging))
        if unused is not None and unused[1] is not None:
            rank.give_back(unused[1])
