"""Gathers parameters that are spread over ranks on rank 0, one at a time, through host memory.

Rank 0 asks (`GatherWeights`), and from then on every other rank sends its rows of each parameter, in the order of the
model, cast to the type that generators and files have. A send ends when rank 0 takes the rows, so no rank runs ahead.

Invariant. A rank that has begun to send is read to the end: rank 0 receives the rows even if it does not need
them, because remaining rows would be read as the beginning of the next answer.
"""

import threading
from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor

from darts_async.errors import DeadlineError
from darts_async.learner.ranks.rank_group import RankGroup
from darts_async.learner.ranks.rank_info import rows_of
from darts_async.protocol import TensorSpec
from darts_async.weights.bucket_layout import bytes_of, dtype_name

Shapes = Mapping[str, tuple[int, ...]]


def send_rows(ranks: RankGroup, rows: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Answer one request of rank 0; blocks until it has taken everything.

    Args:
        rows: this rank's rows of every parameter, in the order of the model.

    Raises:
        ProcessDiedError: rank 0 is gone, or does not take them.
    """
    for local in rows.values():
        if local.numel():
            ranks.send_to_leader(bytes_of(local.detach().to("cpu", dtype)))


class GatheredTensors:
    """A `WeightSource` on rank 0. One request at a time, from any caller.

    Args:
        rows: rank 0's own rows, in the order of the model.
        shapes: of the whole parameters, by the same names.
        dtype: what they are cast to.
        lock: shared by all sources of this group.
        request: has the other ranks send theirs; called in the thread that iterates.
    """

    def __init__(
        self,
        ranks: RankGroup,
        rows: Mapping[str, Tensor],
        shapes: Shapes,
        dtype: torch.dtype,
        lock: threading.Lock,
        request: Callable[[], None],
    ) -> None:
        self._ranks = ranks
        self._rows = rows
        self._shapes = shapes
        self._dtype = dtype
        self._lock = lock
        self._request = request

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """One for each parameter."""
        return tuple(TensorSpec(name, dtype_name(self._dtype), self._shapes[name]) for name in self._rows)

    def tensors(self) -> Generator[Tensor]:
        """Each parameter, whole, on the host.

        Raises:
            ProcessDiedError: a rank is gone, or does not send.
            DeadlineError: the request before this one does not come to its end.
        """
        if not self._lock.acquire(timeout=self._ranks.deadline_s):
            raise DeadlineError(f"waited {self._ranks.deadline_s:g} s for the learner's ranks to send other parameters")
        try:
            self._request()
            names = iter(self._rows)
            try:
                for name in names:
                    yield self._assemble(name)
            finally:
                for name in names:
                    self._assemble(name)
        finally:
            self._lock.release()

    def _assemble(self, name: str) -> Tensor:
        shape = self._shapes[name]
        tensor = torch.empty(shape, dtype=self._dtype)
        contents = {}
        for rank in range(1, self._ranks.rank_info.num_ranks):
            start, stop = rows_of(shape[0], rank, self._ranks.rank_info.num_ranks)
            if tensor[start:stop].numel():
                contents[rank] = bytes_of(tensor[start:stop])
        own = self._rows[name].detach()
        tensor[: len(own)].copy_(own)
        self._ranks.receive_from(contents)
        return tensor
