"""Truncated sampling: which tokens may be drawn. Generators draw by it, and the learner evaluates by it.

    K = the top_k likeliest tokens, all tokens without a top_k
    S = the tokens of K whose likelier ones weigh less than top_p within K
    q(a) = p(a) / sum over b in S of p(b)   for a in S, else 0

vLLM and transformers do this too, in this order. Equal logits are common in bf16: often several tokens are as likely as
the least likely of S, and only so many of them are kept as top_k or top_p needs. The weight of S, and so q of a token
that was drawn, depends on the distribution alone. Which of the tied tokens are kept depends on the sort: generators
here keep the first in the vocabulary, and a learner counts each for its share, and the drawn one completely. vLLM's
kernels for GPUs count in this way. Its PyTorch code for CPUs does so for top_p, and keeps all tokens that are tied with
the last of top_k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 1e-5
"""In nats: tokens that differ by less count as equally likely. Another order of computation changes less."""
_FIRST_LOOK = 256
"""Tokens that are sorted first if only a top_p is given; they nearly always weigh enough."""


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


class Kept(NamedTuple):
    """S of each row; [num_rows, 1] each, without gradient."""

    edge: Tensor
    """The log-probability of its least likely token."""
    num_tied: Tensor
    """Tokens that are as likely as that one."""
    num_kept: Tensor
    """Of these, those that are in S."""

    def mask(self, log_p: Tensor) -> Tensor:
        """bool [num_rows, vocab_size]: S, with the first of the tied tokens in it."""
        tied = is_at(self.edge, log_p)
        return (log_p > self.edge + _ROUNDING) | (tied & (tied.cumsum(-1) <= self.num_kept))

    def share(self, of_targets: Tensor) -> Tensor:
        """The probability that a tied token is in S, given that the target [num_rows, 1] is; see `part_kept`.

        Example: of four tied tokens two are kept. Each is with probability 1/2, and where one of them is the target,
        each of the other three with probability 1/3.
        """
        others = is_at(self.edge, of_targets).long()
        share: Tensor = (self.num_kept - others) / (self.num_tied - others).clamp(min=1)
        return share


def is_at(edge: Tensor, log_p: Tensor) -> Tensor:
    """bool: as likely as the tokens at the edge."""
    return (log_p - edge).abs() <= _ROUNDING


def is_outside(edge: Tensor, log_p: Tensor) -> Tensor:
    """bool: less likely than all that is kept."""
    return log_p < edge - _ROUNDING


def part_kept(log_p: Tensor, edge: Tensor, share: Tensor) -> Tensor:
    """How much of each token is in S, but for the target: 1 above the edge, `share` of what is tied there, else 0."""
    return torch.where(log_p > edge + _ROUNDING, 1.0, torch.where(is_outside(edge, log_p), 0.0, share))


def kept_tokens(log_p: Tensor, truncation: Truncation) -> Kept:
    """S of each row.

    Args: `log_p` [num_rows, vocab_size], normalised.

    Example: of the probabilities (.5, .3, .15, .05) a top_p of .8 keeps two; the third needs more than .8 before it. Of
    (.4, .2, .2, .2) it keeps three: the edge is .2, where three are tied and two are kept.
    """
    log_p = log_p.detach()
    best = _likeliest(log_p, truncation)
    num_kept = best.new_full((len(best), 1), best.shape[-1], dtype=torch.int64)
    if truncation.top_p < 1:
        weights = best.softmax(-1) if truncation.top_k else best.exp()
        before = weights.cumsum(-1, dtype=torch.float64) - weights
        num_kept = (before < truncation.top_p).sum(-1, keepdim=True).clamp(min=1)
    edge = best.gather(-1, num_kept - 1)
    num_above = (best > edge + _ROUNDING).sum(-1, keepdim=True)
    return Kept(edge, is_at(edge, log_p).sum(-1, keepdim=True), num_kept - num_above)


def _likeliest(log_p: Tensor, truncation: Truncation) -> Tensor:
    """K in order, or a part that includes S: a sort of all would cost more than the product with the head."""
    top_k, top_p = truncation
    vocab_size = log_p.shape[-1]
    num_best = top_k or _FIRST_LOOK
    while True:
        best = log_p.topk(min(num_best, vocab_size)).values
        if top_k or num_best >= vocab_size or bool((best.exp().sum(-1) >= top_p).all()):
            return best
        num_best *= 8
