"""Measures how much a selection rule unintentionally rewards length.

The policy gradient on selected samples follows the rewards and also the effect of the selection on lengths: keeping the
short half of a prompt's samples hides that long ones fail, which acts as a reward for length. With x the
length of a response as a multiple of its prompt's mean, and cov_w the covariance under weights w, unbiased for equal
ones (sum of w d_r d_x over (1 - sum of w^2), w scaled to a sum of 1),

    selected = cov_w(r, x) over the kept samples, w the weights that they are trained with
    natural  = cov_h(r, x) over the scored samples, h the launched samples that each represents
    spread   = cov_h(x, x) over the scored samples
    pay      = sum of (selected - natural) / sum of spread      over groups

is the slope of that reward on length: a response that is longer by its prompt's mean gets so much more. The sum of
natural over the sum of spread is what length is worth by itself. A rule whose selection is independent of rewards and
lengths (`none`, `random`, `survivor` at gamma = 1) pays 0 up to noise; the policy is trained by the sum of both.

Where long samples are cut without a draw (`early_stop`, saturation), no scored sample represents them, and there are no
terms: the effect is that of `shortest`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike


class LengthTerms(Struct, frozen=True):
    """The three sums of the module."""

    selected: float = 0.0
    natural: float = 0.0
    spread: float = 0.0

    def plus(self, others: "Iterable[LengthTerms]") -> "LengthTerms":
        """The sums over all of them."""
        terms = [self, *others]
        return LengthTerms(*(sum(getattr(each, name) for each in terms) for name in self.__struct_fields__))

    @property
    def pay(self) -> float | None:
        """Of the selection; None where lengths do not differ."""
        return (self.selected - self.natural) / self.spread if self.spread > 0 else None

    @property
    def slope(self) -> float | None:
        """What length is worth by itself."""
        return self.natural / self.spread if self.spread > 0 else None


class Lot(Struct, frozen=True):
    """Samples and their weights."""

    rewards: Sequence[float]
    num_tokens: Sequence[int]
    weights: Sequence[float]


def length_terms(scored: Lot, kept: Lot) -> LengthTerms:
    """Of one group."""
    if not scored.rewards or not kept.rewards or not any(scored.num_tokens):
        return LengthTerms()
    mean_tokens = float(np.average(scored.num_tokens, weights=scored.weights))
    relative = np.array(scored.num_tokens) / mean_tokens
    return LengthTerms(
        selected=_covariance(kept.rewards, np.array(kept.num_tokens) / mean_tokens, kept.weights),
        natural=_covariance(scored.rewards, relative, scored.weights),
        spread=_covariance(relative, relative, scored.weights),
    )


def _covariance(first: ArrayLike, second: ArrayLike, weights: ArrayLike) -> float:
    """0 of a single sample."""
    share = np.array(weights, np.float64) / np.sum(weights)
    others = 1 - float(share @ share)
    if others < 1e-12:
        return 0.0
    one, other = np.array(first, np.float64), np.array(second, np.float64)
    return float(share @ ((one - share @ one) * (other - share @ other))) / others
