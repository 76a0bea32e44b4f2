"""Truncated sampling: which tokens of a distribution may be drawn. Generators draw by it, the learner evaluates by it.

    K = the top_k likeliest tokens, all tokens without a top_k
    S = the tokens of K whose likelier ones weigh less than top_p within K
    q(a) = p(a) / sum over b in S of p(b)   for a in S, else 0

That is what vLLM and transformers do, in this order. S is described by one number, the log-probability of its least
likely token: whatever is as likely is in S too, so S depends on the distribution alone and not on how a sort breaks
ties. vLLM says the same of top_k. Of tokens that are equally likely at the edge of top_p it keeps some only: the weight
of S is between top_p and 1 in any case, which bounds what it can differ by.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 1e-5
"""In nats: what is recomputed from the same weights in another order is as likely as before."""
_FIRST_LOOK = 256
"""Tokens that are sorted at first where only a top_p is given; they nearly always weigh enough."""


class Truncation(NamedTuple):
    """The settings `sampling.top_k` and `sampling.top_p`."""

    top_k: int = 0
    """0: switched off."""
    top_p: float = 1.0
    """1: switched off."""

    @property
    def is_on(self) -> bool:
        """Whether some token might never be drawn."""
        return self.top_k > 0 or self.top_p < 1


WHOLE = Truncation()
"""No truncation."""


def lowest_kept(log_p: Tensor, truncation: Truncation) -> Tensor:
    """The log-probability that a token needs to be in S, for each row: [num_rows, 1], without gradient.

    Args: `log_p` [num_rows, vocab_size], normalised.

    Example: of the probabilities (.5, .3, .15, .05) a top_p of .8 keeps two; the third needs more than .8 before it.
    """
    best = _likeliest(log_p.detach(), truncation)
    if truncation.top_p == 1:
        return best[:, -1:] - _ROUNDING
    weights = best.softmax(-1) if truncation.top_k else best.exp()
    before = weights.cumsum(-1, dtype=torch.float64) - weights
    num_kept = (before < truncation.top_p).sum(-1, keepdim=True)
    return best.gather(-1, (num_kept - 1).clamp(min=0)) - _ROUNDING


def _likeliest(log_p: Tensor, truncation: Truncation) -> Tensor:
    """K in order, or so much of it that S is in it; a sort of all would cost more than the product with the head."""
    top_k, top_p = truncation
    vocab_size = log_p.shape[-1]
    num_best = top_k or _FIRST_LOOK
    while True:
        best = log_p.topk(min(num_best, vocab_size)).values
        if top_k or num_best >= vocab_size or bool((best.exp().sum(-1) >= top_p).all()):
            return best
        num_best *= 8
