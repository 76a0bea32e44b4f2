"""One broadcast group: a dedicated thread forms, uses and drops it, and `abort` frees it from any other thread.

The group is a raw process group of torch.distributed, not its default group, which the learner may use. All blocking
calls run in the group's single thread, in the order submitted; their results arrive on the event loop. Each has a
deadline: `deadline_s` for joining (and at most `CONNECT_LIMIT_S` for connecting), and the given deadline for each
broadcast. `abort` ends them at once, except connecting: an interrupted attempt would make the other side wait for a
second one.

Gloo's port accepts connections only until the group is formed (see `gloo_listener`).

Under NCCL the thread uses the device of its rank and a separate stream. It waits for earlier work of the computing
stream, and not the reverse. Each wait ends on the host, so received data have arrived.

Invariants: the group object lives and dies in its thread; after `abort` no operation is posted; the thread ends once
its current call has ended.
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
"""Bound of the only wait that `abort` cannot end: gloo waits for a peer to connect, and has no connection to close yet.
Members first meet in the store, so connecting takes milliseconds unless a member dies or hangs at that moment."""

_NCCL_WATCHDOG = 10.0  # in deadlines of joining
_POLL_S = 0.0005
_GLOO_CONNECT_ATTEMPTS = 5  # gloo waits this many of its timeouts (seen in torch 2.13)


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What a member needs to join a group."""

    epoch: int
    rank: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    interface: str
    """Local address that gloo's sockets bind to."""
    deadline_s: float
    """Longest time that members wait for each other."""
    device: torch.device | None = None
    """The device of NCCL; None: the current device of the thread that asks to join."""


class PendingBroadcast:
    def __init__(self, work: Any, deadline_at_s: float, group: str, *, polls: bool = False) -> None:
        self._work: Any = work
        self._deadline_at_s = deadline_at_s
        self._group = group
        self._polls = polls

    def wait(self) -> None:
        """Block until the buffer has been sent or filled. Raises `DeadlineError` if it was not in time,
        `WeightUpdateError` if a peer has ended or the group was aborted."""
        # Always dropped: a traceback that keeps the work alive would keep the group's sockets open.
        work, self._work = self._work, None
        try:
            if self._polls:
                self._poll(work)
            work.wait(_timeout_until(self._deadline_at_s))
        except RuntimeError as error:
            failure = str(error).split("\n")[0]
        else:
            return
        finally:
            del work
        if time.monotonic() >= self._deadline_at_s:
            raise DeadlineError(f"a broadcast in {self._group} did not end by its deadline: a member hangs ({failure})")
        raise WeightUpdateError(f"a broadcast in {self._group} failed: {failure}")

    def _poll(self, work: Any) -> None:
        """Wait until it has finished. NCCL's own wait blocks a stream and not the host, so it has no deadline."""
        while not work.is_completed():
            if time.monotonic() >= self._deadline_at_s:
                raise RuntimeError("it is still under way")  # reported like any other failure of torch
            time.sleep(_POLL_S)


class Collective:
    """A broadcast group whose rank 0 sends. `store` is the rendezvous; `loop` is where results are reported."""

    def __init__(self, spec: GroupSpec, store: RelayStore, loop: asyncio.AbstractEventLoop) -> None:
        self._spec = spec
        self._device = spec.device
        if spec.backend == "nccl" and spec.device is None and torch.cuda.is_available():
            self._device = device_of("nccl")  # here, because the group's thread has its own current device
        self._store = store
        self._loop = loop
        self._name = f"the group of epoch {spec.epoch} (rank {spec.rank} of {spec.world_size})"
        self._group: Any = None
        self._abort_reason: str | None = None
        self._ended: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"weights-epoch-{spec.epoch}-rank-{spec.rank}")

    @property
    def ended(self) -> bool:
        """Whether the group was aborted and its thread has ended."""
        return self._ended is not None and self._ended.done()

    # --- the event loop's side -------------------------------------------------------------------------------

    def form(self, done: Callable[[Future[None]], None]) -> None:
        """Join the group; `done` is called on the event loop."""
        self.submit(self._form, done)

    def submit(self, work: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        """Run `work` in the group's thread, after earlier work. `done` is called on the event loop."""
        self._thread.submit(self._in_order, work).add_done_callback(partial(self._report, done))

    def abort(self, reason: str) -> None:
        """Give up the group: blocking calls fail, the group is dropped, and its thread ends. Idempotent."""
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
        """Abort, and wait until the group has ended. Raises `DeadlineError` if its thread hangs in a call."""
        self.abort("closed")
        assert self._ended is not None
        await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=deadline_s)
        if not self.ended:
            raise DeadlineError(f"the thread of {self._name} did not end within {deadline_s:.1f} s after its abort")
        self._thread.shutdown(wait=True)  # it has nothing left to do

    # --- the thread's side -----------------------------------------------------------------------------------

    def post(self, buffer: torch.Tensor, deadline_at_s: float) -> PendingBroadcast:
        """Begin a broadcast: rank 0 sends `buffer`, the others fill theirs of the same size. It is contiguous, on the
        device of the backend, and not to be used until waited for; rank 0 may read it. `deadline_at_s` is on
        `time.monotonic`."""
        self._raise_if_aborted()
        if self._group is None:
            raise WeightUpdateError(f"{self._name} was not formed")
        options = _c10d.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = _timeout_until(deadline_at_s)
        polls = self._spec.backend == "nccl"
        return PendingBroadcast(self._group.broadcast([buffer], options), deadline_at_s, self._name, polls=polls)

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
        """Do a first broadcast, in which NCCL connects and blocks the host until every member takes part. It must come
        before an update, because a receiver posts the update's first broadcast before it reports that it is ready."""
        self.post(torch.zeros(1, device=self._device), time.monotonic() + self._spec.deadline_s).wait()

    def _in_order(self, work: Callable[[], T]) -> T:
        """Run `work` after all earlier work of the computing stream."""
        if self._group is not None and self._device is not None and self._device.type == "cuda":
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream(self._device))
        return work()

    def _drop(self) -> None:
        self._group = None

    def _raise_if_aborted(self) -> None:
        if self._abort_reason is not None:
            raise WeightUpdateError(f"{self._name} was aborted: {self._abort_reason}")

    def _report(self, done: Callable[[Future[T]], None], outcome: Future[T]) -> None:
        # Closed: the thread outlived the deadline of `close`, and there is no loop to report to.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(done, outcome)


def device_of(backend: Literal["gloo", "nccl"]) -> torch.device:
    """The device of the buffers of a backend's broadcasts."""
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def describe(error: BaseException) -> str:
    """One line for a message to the other side."""
    return str(error) if isinstance(error, DartsError) else f"{type(error).__name__}: {error}"


def _timeout_until(deadline_at_s: float) -> timedelta:
    # torch truncates fractions of a millisecond, and 0 means no timeout.
    return timedelta(seconds=max(0.0, deadline_at_s - time.monotonic()), milliseconds=1)


def gloo_group(interface: str, store: Any, rank: int, world_size: int, timeout: timedelta, *, num_threads: int) -> Any:
    """A process group on the run's interface: torch's own would take the interface of the host name."""
    options = _c10d.ProcessGroupGloo._Options()
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=interface, lazy_init=False)]
    options._timeout = timeout
    options._threads = num_threads
    return _c10d.ProcessGroupGloo(store, rank, world_size, options)


def _new_group(spec: GroupSpec, store: RelayStore, device: torch.device | None) -> Any:
    if spec.backend == "gloo":
        timeout = timedelta(seconds=CONNECT_LIMIT_S / _GLOO_CONNECT_ATTEMPTS)
        return gloo_group(spec.interface, store, spec.rank, spec.world_size, timeout, num_threads=1)
    options = _c10d.ProcessGroupNCCL.Options()
    # NCCL's watchdog ends the process, so its timeout must be the longest.
    options._timeout = timedelta(seconds=_NCCL_WATCHDOG * spec.deadline_s)
    group = _c10d.ProcessGroupNCCL(store, spec.rank, spec.world_size, options)
    # Otherwise NCCL would join at the first broadcast, after this member has said that it is ready.
    group.eager_connect_single_device(device)
    return group
