"""The process group of the ranks that train one model together.

A learner of one rank has no process group. There is no TCPStore, which would listen without authentication: the
rendezvous is a `RelayStore`, whose values go over the run's own link between the ranks; rank 0 relays them.

Two groups are formed. In the default one FSDP gathers and reduces, in the order of the passes. The other, always gloo,
carries parameters to rank 0 for a broadcast or a checkpoint while passes run. It is separate, because operations of two
threads in one group would be matched in any order, and not NCCL, because two communicators that wait for each other's
kernels can deadlock.

A rank that does not come, or that keeps an operation waiting, is given up after `deadline_s`. `abort` ends all waits.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from darts_async.errors import ProcessDiedError
from darts_async.learner.ranks.rank_info import RankInfo
from darts_async.protocol import StoreValue
from darts_async.weights.broadcast.close_gloo_sockets import addresses_in, sever
from darts_async.weights.broadcast.collective import gloo_group
from darts_async.weights.broadcast.gloo_listener import refuse_strangers
from darts_async.weights.broadcast.relay_store import RelayStore

_c10d: Any = distributed_c10d  # the parts used here are not in torch's type stubs
_GLOO = "darts_gloo"


P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(ranks: "RankGroup | None", work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what may be a collective of all ranks; None: there is one. Raises as `RankGroup.naming_failures`."""
    with contextlib.nullcontext() if ranks is None else ranks.naming_failures():
        return await asyncio.to_thread(work, *args, **kwargs)


class RankGroup:
    """This process's end of the two groups. `form` and the collectives block; call them in threads.

    Args:
        rank_info: this process among the ranks; more than one.
        interface: local address that gloo's sockets bind to.
        epoch: the same for all ranks; values of another one are not of this group.
        send: called on the event loop with each value of the rendezvous.
    """

    def __init__(
        self, rank_info: RankInfo, *, interface: str, epoch: int, send: Callable[[StoreValue], None], deadline_s: float
    ) -> None:
        self.rank_info = rank_info
        self.deadline_s = deadline_s
        self._interface = interface
        self._epoch = epoch
        self._store = RelayStore(epoch, send, asyncio.get_running_loop(), deadline_s=deadline_s)
        self._gathering: Any = None
        self._failure: str | None = None

    def put(self, message: StoreValue) -> None:
        """Take in a value that another rank has set. Raises `ProtocolError`."""
        if message.epoch == self._epoch:
            self._store.put(message.key, message.value)

    def form(self, device: torch.device) -> DeviceMesh:
        """Join both groups; returns the mesh of the default one. Raises `DeadlineError` if some ranks have not come,
        `WeightUpdateError` if the group was aborted meanwhile."""
        rank, num_ranks = self.rank_info.rank, self.rank_info.num_ranks
        self._store.meet(rank, num_ranks)
        timeout = timedelta(seconds=self.deadline_s)
        new_group = functools.partial(gloo_group, self._interface, num_threads=2)
        self._gathering = new_group(_c10d.PrefixStore("gather", self._store), rank, num_ranks, timeout)
        dist.Backend.register_backend(_GLOO, new_group, devices=["cpu"])
        backend = f"cpu:{_GLOO}" if device.type == "cpu" else "cuda:nccl"
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=num_ranks, timeout=timeout)
        refuse_strangers(addresses_in(self._store.own_values()))
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device.type)

    def send_to_leader(self, content: torch.Tensor) -> None:
        """Send bytes to rank 0: uint8 on the host, contiguous; blocks until they are taken."""
        self._wait(self._gathering.send([content], 0, 0))

    def receive_from(self, contents: Mapping[int, torch.Tensor]) -> None:
        """On rank 0: fill the buffer of each rank with the next bytes that it sends."""
        for work in [self._gathering.recv([content], rank, 0) for rank, content in contents.items()]:
            self._wait(work)

    def abort(self, reason: str) -> None:
        """Free every thread of this process that waits for another rank. Idempotent."""
        if self._failure is not None:
            return
        self._failure = reason
        self._store.fail(reason)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            _c10d._abort_process_group()
        sever(addresses_in(self._store.values()))

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Raise `ProcessDiedError` where a collective fails: all that torch knows is which connection broke."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            reason = self._failure or str(error).split("\n")[0]
            raise ProcessDiedError(
                f"rank {self.rank_info.rank} of the learner cannot continue without the others: one has died, hangs "
                f"or was told to leave: {reason}"
            ) from error

    def _wait(self, work: Any) -> None:
        with self.naming_failures():
            work.wait(timedelta(seconds=self.deadline_s))
