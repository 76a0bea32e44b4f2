"""What a generator accepts from the shaper and from the learner, with any engine.

An invalid message is refused, its sender named, before the engine gets it. A sample that the engine cannot decode
(`why_not`) is rejected by itself. A group that cannot be joined, or weights that do not fit, fail as an update does.
"""

import math
from collections.abc import Container

import numpy as np

from darts_async.protocol import (
    Cancel,
    EpochFormed,
    Generate,
    Greet,
    LearnerToGenerator,
    ShaperToGenerator,
    UpdateOffered,
)
from darts_async.token_checks import not_tokens

_MAX_RANKS = 1 << 16
_ID_LIMIT = 1 << 62
"""Samples of probes have ids below 0."""


def refusal_of_shaper(message: ShaperToGenerator, asked: Container[int]) -> str | None:
    """Why a message of the shaper is invalid; None if it is not. `asked`: the samples that it has asked for since its
    last greeting, and that have not ended."""
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
    """Why a message of the learner is invalid; None if it is not."""
    match message:
        case EpochFormed(first_rank=first_rank, world_size=world_size, deadline_s=deadline_s):
            if not 1 <= first_rank < world_size <= _MAX_RANKS or not 0 < deadline_s < math.inf:
                return f"rank {first_rank} of {world_size} within {deadline_s} s"
        case UpdateOffered(policy_version=version, deadline_s=deadline_s):
            if version < 0 or not 0 < deadline_s < math.inf:
                return f"version {version} within {deadline_s} s"
    return None


def why_not(request: Generate, max_context_tokens: int, vocab_size: int | None = None) -> str | None:
    """Why an engine can never decode a request, with the values; None if it can."""
    num_prompt, num_prefix = len(request.prompt_tokens), len(request.prefix_tokens)
    sampling = request.sampling
    if num_prompt == 0:
        return "the prompt is empty"
    if num_prompt + sampling.max_new_tokens > max_context_tokens:
        return (
            f"{num_prompt} prompt tokens and max_new_tokens {sampling.max_new_tokens} do not fit into "
            f"max_context_tokens {max_context_tokens}"
        )
    if num_prefix >= sampling.max_new_tokens:
        return f"{num_prefix} tokens were decoded before, which is all of max_new_tokens {sampling.max_new_tokens}"
    if not (sampling.temperature > 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
        return (
            f"temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}: "
            "the first must be above 0, the second in (0, 1], the third not negative"
        )
    return (
        None
        if vocab_size is None
        else not_tokens(np.concatenate((request.prompt_tokens, request.prefix_tokens)), vocab_size)
    )
