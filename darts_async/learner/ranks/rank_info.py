"""The rank of this process of the learner, its device, and the rows of a parameter that each rank holds.

FSDP2 cuts the first dimension into chunks of `ceil(num_rows / num_ranks)`, as `torch.chunk` does: the last ranks may
have fewer rows or none. Rows are contiguous in memory, so the rows of all ranks in sequence are the parameter. Nothing
but the shape is needed to find them, so any number of ranks can read a checkpoint.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from darts_async.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One process among `num_ranks`. Rank 0 leads: it alone talks to shaper and generators."""

    rank: int
    num_ranks: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "RankInfo":
        """RANK and WORLD_SIZE, as torchrun sets them; one process if they are not set. Raises `ConfigError`."""
        rank, num_ranks = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank.isdigit() and num_ranks.isdigit() and int(rank) < int(num_ranks)):
            raise ConfigError(f"RANK is {rank!r} and WORLD_SIZE {num_ranks!r}; ranks count from 0 to WORLD_SIZE - 1")
        return cls(int(rank), int(num_ranks))


ALONE = RankInfo(0, 1)


def training_device() -> torch.device:
    """The first GPU that this process may see (CUDA_VISIBLE_DEVICES), else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def rows_of(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First row of a rank, and the first row after it."""
    chunk = -(-num_rows // num_ranks)
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


def overlaps(start: int, stop: int, num_rows: int, num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """The ranks of `num_ranks` that hold some of the rows `start` to `stop`: (rank, first, after the last), counted
    from the rank's own first row."""
    for rank in range(num_ranks):
        begin, end = rows_of(num_rows, rank, num_ranks)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield rank, first - begin, last - begin
