"""Checks token ids and log-probabilities that come from another process, by one or two passes over an array."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

NUM_INT32: Final = 1 << 31
"""Number of token ids if the vocabulary is unknown."""
LARGEST_LOGPROB: Final = 0.01
"""A log-probability is not positive, except by rounding."""


def not_tokens(token_ids: NDArray[np.int32], num_token_ids: int) -> str | None:
    """Why these are not tokens of a vocabulary of this size; None if they are."""
    if not len(token_ids) or token_ids.view(np.uint32).max() < num_token_ids:  # a negative one is a large one there
        return None
    return f"token ids {token_ids.min()} to {token_ids.max()} are outside the vocabulary of {num_token_ids}"


def not_logprobs(logprobs: NDArray[np.float32]) -> str | None:
    """Why these are not log-probabilities of tokens that were drawn; None if they are."""
    if not len(logprobs) or (logprobs.min() > -math.inf and logprobs.max() <= LARGEST_LOGPROB):
        return None  # a NaN fails both comparisons
    return f"log-probabilities from {logprobs.min()} to {logprobs.max()}"
