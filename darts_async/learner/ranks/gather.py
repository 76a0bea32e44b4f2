"""Gathers parameters that are spread over ranks on rank 0, one at a time, through host memory.

After `GatherWeights` of rank 0 every other rank sends its rows of each parameter, in the order of the model, cast to
the type that generators and files have. A send ends when rank 0 takes the rows, so no rank runs ahead.

Invariant. Rank 0 receives all rows of an answer even if it does not need them, because it would read remaining rows as
the beginning of the next answer.
"""

import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from darts_async.errors import DeadlineError
from darts_async.learner.ranks.rank_group import RankGroup
from darts_async.learner.ranks.rank_info import rows_of
from darts_async.protocol import TensorSpec
from darts_async.weights.bucket_layout import bytes_of, dtype_name

Shapes = Mapping[str, tuple[int, ...]]


def send_rows(ranks: RankGroup, rows: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Send rank 0 this rank's rows of every parameter, in the order of the model; blocks until it has taken them.
    Raises `ProcessDiedError` if rank 0 is gone, or does not take them."""
    for local in rows.values():
        if local.numel():
            ranks.send_to_leader(bytes_of(local.detach().to("cpu", dtype)))


@dataclass(frozen=True, slots=True, eq=False)
class GatheredTensors:
    """A `WeightSource` on rank 0. One request at a time, from any caller."""

    ranks: RankGroup
    rows: Mapping[str, Tensor]
    """Rank 0's own rows, in the order of the model."""
    shapes: Shapes
    """Of the whole parameters, by the same names."""
    dtype: torch.dtype
    """What they are cast to."""
    lock: threading.Lock
    """Shared by all sources of this group."""
    request: Callable[[], None]
    """Has the other ranks send theirs; called in the thread that iterates."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, dtype_name(self.dtype), self.shapes[name]) for name in self.rows)

    def tensors(self) -> Generator[Tensor]:
        """Each complete parameter, on the host. Raises `ProcessDiedError` if a rank is gone or does not send,
        `DeadlineError` if the request before this one does not end."""
        if not self.lock.acquire(timeout=self.ranks.deadline_s):
            raise DeadlineError(f"waited {self.ranks.deadline_s:g} s for the learner's ranks to send other parameters")
        try:
            self.request()
            names = iter(self.rows)
            try:
                for name in names:
                    yield self._assemble(name)
            finally:
                for name in names:
                    self._assemble(name)
        finally:
            self.lock.release()

    def _assemble(self, name: str) -> Tensor:
        shape = self.shapes[name]
        tensor = torch.empty(shape, dtype=self.dtype)
        contents = {}
        for rank in range(1, self.ranks.rank_info.num_ranks):
            start, stop = rows_of(shape[0], rank, self.ranks.rank_info.num_ranks)
            if tensor[start:stop].numel():
                contents[rank] = bytes_of(tensor[start:stop])
        own = self.rows[name].detach()
        tensor[: len(own)].copy_(own)
        self.ranks.receive_from(contents)
        return tensor
