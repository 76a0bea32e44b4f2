"""Are short responses right more often than long ones? Where they are not, shaping has nothing to give.

Advantages in a group sum to zero, so to first order a step makes responses shorter if and only if reward and length
covary negatively within the trained groups. The samples that are launched and not trained are paid for by shorter
responses alone: at a policy whose lengths stand still they cost more than their cancellation saves. So it is the sign
of that covariance that says whether they are to be launched.

Each group in which rewards differ gives one number, mean((r - mean r) (l / mean l - 1)). Their mean over recent groups,
in standard errors, is the evidence; two thresholds keep it from flickering.
"""

import math
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

_MEMORY: Final = 1 - 1 / 64
"""What is left of a group's weight with each one that follows."""
_FEWEST_GROUPS: Final = 8.0
"""Effective number below which nothing is said."""
_BEGINS_BELOW: Final = -2.0
_ENDS_ABOVE: Final = -1.0
"""Standard errors."""
_LEAST_VARIANCE: Final = 1e-12
"""Of the mean, so that its evidence is finite."""


class Pattern(Struct):
    """What recent groups say; holds until they say otherwise. At first: no."""

    short_is_right: bool = False
    weight: float = 0.0
    """Sum of the groups' weights, and of their squares:"""
    weight_squared: float = 0.0
    mean: float = 0.0
    scatter: float = 0.0
    """Weighted sum of squared deviations from the mean."""

    def observe(self, lengths: Sequence[int], rewards: Sequence[float]) -> None:
        """The scored samples of one group, lengths in tokens."""
        if len(rewards) < 2 or min(rewards) == max(rewards):
            return
        reward, length = sum(rewards) / len(rewards), sum(lengths) / len(lengths)
        products = ((r - reward) * (tokens / length - 1) for r, tokens in zip(rewards, lengths, strict=True))
        self._add(sum(products) / len(rewards))
        if self.num_groups >= _FEWEST_GROUPS:
            self.short_is_right = self.evidence < (_ENDS_ABOVE if self.short_is_right else _BEGINS_BELOW)

    @property
    def num_groups(self) -> float:
        """The effective number of groups that the mean is taken over."""
        return self.weight**2 / self.weight_squared if self.weight_squared else 0.0

    @property
    def evidence(self) -> float:
        """The mean covariance, in standard errors; negative if short ones are right more often."""
        if self.num_groups < 2:
            return 0.0
        variance = self.scatter / self.weight / (self.num_groups - 1)
        return self.mean / math.sqrt(max(variance, _LEAST_VARIANCE))

    def validate(self) -> None:
        """Invariants."""
        assert 0 <= self.num_groups < (1 + _MEMORY) / (1 - _MEMORY), self
        assert self.scatter >= 0, self
        assert all(map(math.isfinite, (self.weight, self.mean, self.scatter))), self
        assert self.num_groups >= _FEWEST_GROUPS or not self.short_is_right, self

    def _add(self, value: float) -> None:
        self.weight = _MEMORY * self.weight + 1
        self.weight_squared = _MEMORY**2 * self.weight_squared + 1
        gap = value - self.mean
        self.mean += gap / self.weight
        self.scatter = _MEMORY * self.scatter + gap * (value - self.mean)
