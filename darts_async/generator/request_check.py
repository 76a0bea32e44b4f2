"""Checks which requests an engine can decode."""

import numpy as np

from darts_async.protocol import Generate


def why_not(request: Generate, max_context_tokens: int, vocab_size: int | None = None) -> str | None:
    """The reason why an engine can never decode a request, naming the values that are at odds; None if it can."""
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
    return None if vocab_size is None else _why_not_in_vocabulary(request, vocab_size)


def _why_not_in_vocabulary(request: Generate, vocab_size: int) -> str | None:
    tokens = np.concatenate((request.prompt_tokens, request.prefix_tokens))
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return None
    return f"token ids {tokens.min()} to {tokens.max()} are outside the vocabulary of {vocab_size}"
