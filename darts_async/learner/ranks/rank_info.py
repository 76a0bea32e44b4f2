"""The rank of this process of the learner, and its device.

Rank and number come from the environment, under the names that torchrun uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from darts_async.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """One process among `num_ranks`. Rank 0 leads: it alone talks to shaper and generators."""

    rank: int
    num_ranks: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Place":
        """RANK and WORLD_SIZE; the only process if they are not set. Raises `ConfigError`."""
        rank, num_ranks = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank.isdigit() and num_ranks.isdigit() and int(rank) < int(num_ranks)):
            raise ConfigError(f"RANK is {rank!r} and WORLD_SIZE {num_ranks!r}; ranks count from 0 to WORLD_SIZE - 1")
        return cls(int(rank), int(num_ranks))


ALONE = Place(0, 1)


def training_device() -> torch.device:
    """The first GPU that this process may see (CUDA_VISIBLE_DEVICES), else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
