"""What a generator takes from the shaper and from the learner, whatever its engine: a message that cannot be meant is
refused, its sender named, before the engine hears of it.

What an engine cannot decode (see `request_check`) is another matter: it is rejected sample by sample. What the learner
says of a group that cannot be joined, or of weights that do not fit, fails as an update does.
"""

import math
from collections.abc import Container

from darts_async.protocol import (
    Cancel,
    EpochFormed,
    Generate,
    Greet,
    LearnerToGenerator,
    ShaperToGenerator,
    UpdateOffered,
)

_MAX_RANKS = 1 << 16
_ID_LIMIT = 1 << 62
"""Below zero are the samples of probes."""


def refusal_of_shaper(message: ShaperToGenerator, asked: Container[int]) -> str | None:
    """Why a message of the shaper cannot be meant; None if it is to be taken. `asked`: the samples that it has asked
    for since its last greeting, and that have not ended."""
    match message:
        case Greet(number=number):
            return None if number >= 1 else f"greeting {number}"
        case Generate(sample_id=sample_id) if not 0 <= sample_id < _ID_LIMIT or sample_id in asked:
            return f"sample {sample_id}" + (" twice" if sample_id in asked else "")
        case Generate(seed=seed, priority=priority) if not 0 <= seed < 1 << 63 or abs(priority) > 1:
            return f"seed {seed} and priority {priority}"
        case Generate(sampling=sampling) if not math.isfinite(sampling.temperature) or sampling.top_k >= 1 << 31:
            return f"{sampling}"
        case Generate() | Cancel():
            return None


def refusal_of_learner(message: LearnerToGenerator) -> str | None:
    """The same of the learner."""
    match message:
        case EpochFormed(first_rank=first_rank, world_size=world_size, deadline_s=deadline_s):
            if not 1 <= first_rank < world_size <= _MAX_RANKS or not 0 < deadline_s < math.inf:
                return f"rank {first_rank} of {world_size} within {deadline_s} s"
        case UpdateOffered(policy_version=version, deadline_s=deadline_s):
            if version < 0 or not 0 < deadline_s < math.inf:
                return f"version {version} within {deadline_s} s"
    return None
