"""One broadcast group: formed, used and dropped by a thread of its own, freed by `abort` from any other.

The group is a raw process group of torch.distributed: the default group is never touched, so a learner may have
one of its own. Everything that can block runs in the group's single thread, in the order submitted; outcomes
come back on the event loop. Nothing blocks beyond a deadline: joining by `deadline_s` (and `CONNECT_LIMIT_S` at
most for connecting), each broadcast by the deadline it is posted with. Aborting ends both at once, connecting
excepted: cutting it half-way would have the other side wait for a second attempt, so it is let finish.

Gloo's port takes connections only until the group is formed (see `gloo_listener`).

Under NCCL the thread works on the device of its rank, on a stream of its own beside the one that computes: it waits for
what was queued there before, not the other way round. What it hands over has arrived: each wait ends on the host.

Invariants: the group object lives and dies in its thread; after `abort` no operation is posted; the thread ends
once what it was doing has ended.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.distributed import distributed_c10d

from darts_async.errors import ConfigError, DartsError, DeadlineError, WeightUpdateError
from darts_async.weights.broadcast.close_gloo_sockets import addresses_in, sever
from darts_async.weights.broadcast.gloo_listener import refuse_strangers
from darts_async.weights.broadcast.relay_store import RelayStore

T = TypeVar("T")
_c10d: Any = distributed_c10d  # the parts used here are not in torch's type stubs

CONNECT_LIMIT_S = 5.0
"""Bound on the one wait that `abort` cannot end: gloo waiting for a peer to connect, where there is no connection to
cut yet. Members first meet in the store, a wait that can be ended, so connecting takes milliseconds unless a member
dies or hangs in just these."""

_NCCL_WATCHDOG = 10.0  # in deadlines of joining
_POLL_S = 0.0005
_GLOO_CONNECT_ATTEMPTS = 5  # gloo waits this many of its timeouts (seen in torch 2.13)


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What a member must know to join."""

    epoch: int
    rank: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    interface: str
    """Local address that gloo's sockets bind to."""
    deadline_s: float
    """Members wait for each other no longer than this."""
    device: torch.device | None = None
    """Of NCCL; None: the current device of the thread that asks to join."""


class PendingBroadcast:
    """A broadcast that has been posted."""

    def __init__(self, work: Any, deadline: float, group: str, *, polls: bool = False) -> None:
        self._work: Any = work
        self._deadline = deadline
        self._group = group
        self._polls = polls

    def wait(self) -> None:
        """Block until the buffer has been sent or filled.

        Raises:
            DeadlineError: it was not by the deadline.
            WeightUpdateError: a peer is gone, or the group was aborted.
        """
        # Dropped in any case: a work kept alive by a traceback would keep the group's sockets open.
        work, self._work = self._work, None
        try:
            if self._polls:
                self._poll(work)
            work.wait(_timeout_until(self._deadline))
        except RuntimeError as error:
            failure = str(error).split("\n")[0]
        else:
            return
        finally:
            del work
        if time.monotonic() >= self._deadline:
            raise DeadlineError(f"a broadcast in {self._group} did not end by its deadline: a member hangs ({failure})")
        raise WeightUpdateError(f"a broadcast in {self._group} failed: {failure}")

    def _poll(self, work: Any) -> None:
        """Until it is over. NCCL's own wait makes a stream wait, not the host, and so knows no deadline."""
        while not work.is_completed():
            if time.monotonic() >= self._deadline:
                raise RuntimeError("it is still under way")  # told as any other failure of torch's
            time.sleep(_POLL_S)


class Collective:
    """A broadcast group whose rank 0 sends.

    Args:
        spec: this member's place in the group.
        store: the rendezvous; `abort` fails it.
        loop: where outcomes are reported.
    """

    def __init__(self, spec: GroupSpec, store: RelayStore, loop: asyncio.AbstractEventLoop) -> None:
        self._spec = spec
        self._device = spec.device
        if spec.backend == "nccl" and spec.device is None and torch.cuda.is_available():
            self._device = device_of("nccl")  # here, because the group's thread has a current device of its own
        self._store = store
        self._loop = loop
        self._name = f"the group of epoch {spec.epoch} (rank {spec.rank} of {spec.world_size})"
        self._group: Any = None
        self._abort_reason: str | None = None
        self._ended: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"weights-epoch-{spec.epoch}-rank-{spec.rank}")

    @property
    def ended(self) -> bool:
        """Whether the group was aborted and nothing of it runs any more."""
        return self._ended is not None and self._ended.done()

    # --- the event loop's side -------------------------------------------------------------------------------

    def form(self, done: Callable[[Future[None]], None]) -> None:
        """Join the group; `done` is called on the event loop."""
        self.submit(self._form, done)

    def submit(self, work: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        """Run `work` in the group's thread, after what was submitted before; `done` is called on the event loop."""
        self._thread.submit(self._in_order, work).add_done_callback(partial(self._report, done))

    def abort(self, reason: str) -> None:
        """Give the group up: whatever blocks in it fails, the group is dropped and its thread ends. Idempotent."""
        if self._abort_reason is not None:
            return
        self._abort_reason = reason
        self._store.fail(reason)
        if (group := self._group) is not None:
            group.abort()  # of use to NCCL only
            sever(addresses_in(self._store.values()))
        self._ended = self._thread.submit(self._drop)
        self._thread.shutdown(wait=False)

    async def close(self, deadline_s: float) -> None:
        """Abort, and wait until nothing of the group is left.

        Raises:
            DeadlineError: its thread still hangs in a call.
        """
        self.abort("closed")
        assert self._ended is not None
        await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=deadline_s)
        if not self.ended:
            raise DeadlineError(f"the thread of {self._name} did not end within {deadline_s:.1f} s after its abort")
        self._thread.shutdown(wait=True)  # it has nothing left to do

    # --- the thread's side -----------------------------------------------------------------------------------

    def post(self, buffer: torch.Tensor, deadline: float) -> PendingBroadcast:
        """Begin a broadcast: rank 0 sends `buffer`, the others fill theirs, which has the same size.

        Args:
            buffer: contiguous, on the device of the backend; unchanged (rank 0) or untouched until waited for.
            deadline: on `time.monotonic`.
        """
        self._raise_if_aborted()
        if self._group is None:
            raise WeightUpdateError(f"{self._name} was not formed")
        options = _c10d.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = _timeout_until(deadline)
        polls = self._spec.backend == "nccl"
        return PendingBroadcast(self._group.broadcast([buffer], options), deadline, self._name, polls=polls)

    def _form(self) -> None:
        self._raise_if_aborted()
        if self._spec.backend == "nccl" and not distributed_c10d.is_nccl_available():
            raise ConfigError("weights.backend is nccl, but this build of torch has no NCCL; set it to gloo")
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        self._store.meet(self._spec.rank, self._spec.world_size)
        try:
            self._group = _new_group(self._spec, self._store, self._device)
            if self._spec.backend == "nccl":
                self._connect()
            else:
                refuse_strangers(addresses_in(self._store.own_values()))
        except RuntimeError as error:
            raise WeightUpdateError(f"joining {self._name} failed: {str(error).split(chr(10))[0]}") from None

    def _connect(self) -> None:
        """NCCL makes its connections in the first broadcast, which blocks the host until every member takes part. That
        must not be the first of an update: a receiver posts it before it says that it is ready to be sent anything."""
        self.post(torch.zeros(1, device=self._device), time.monotonic() + self._spec.deadline_s).wait()

    def _in_order(self, work: Callable[[], T]) -> T:
        """Work that sees what the computing stream had queued before."""
        if self._group is not None and self._device is not None and self._device.type == "cuda":
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream(self._device))
        return work()

    def _drop(self) -> None:
        self._group = None

    def _raise_if_aborted(self) -> None:
        if self._abort_reason is not None:
            raise WeightUpdateError(f"{self._name} was aborted: {self._abort_reason}")

    def _report(self, done: Callable[[Future[T]], None], outcome: Future[T]) -> None:
        # Closed: the thread outlived the deadline of `close`, and nobody is there to be told.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(done, outcome)


def device_of(backend: Literal["gloo", "nccl"]) -> torch.device:
    """Where the buffers of a backend's broadcasts lie."""
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def describe(error: BaseException) -> str:
    """One line for a message to the other side."""
    return str(error) if isinstance(error, DartsError) else f"{type(error).__name__}: {error}"


def _timeout_until(deadline: float) -> timedelta:
    # torch cuts off fractions of a millisecond, and takes 0 for no timeout at all.
    return timedelta(seconds=max(0.0, deadline - time.monotonic()), milliseconds=1)


def _new_group(spec: GroupSpec, store: RelayStore, device: torch.device | None) -> Any:
    if spec.backend == "gloo":
        options = _c10d.ProcessGroupGloo._Options()
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=spec.interface, lazy_init=False)]
        options._timeout = timedelta(seconds=CONNECT_LIMIT_S / _GLOO_CONNECT_ATTEMPTS)
        options._threads = 1
        return _c10d.ProcessGroupGloo(store, spec.rank, spec.world_size, options)
    options = _c10d.ProcessGroupNCCL.Options()
    # NCCL's watchdog ends the process, so it must be the last to lose patience.
    options._timeout = timedelta(seconds=_NCCL_WATCHDOG * spec.deadline_s)
    group = _c10d.ProcessGroupNCCL(store, spec.rank, spec.world_size, options)
    # Otherwise NCCL would join at the first broadcast, after this member has said that it is ready.
    group.eager_connect_single_device(device)
    return group
