"""Means and maxima that add up: over micro-batches, over groups, over a step, in any order."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Tally:
    """Named means (sum and count) and maxima of everything that was added."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor) -> None:
        """Let every element of `values` (bool counts as 0 or 1) enter the mean `name`."""
        self.add(name, values.sum().item(), values.numel())

    def maximum(self, name: str, values: Tensor) -> None:
        """Let every element of `values` enter the maximum `name`."""
        if values.numel():
            self._raise_to(name, values.max().item())

    def merge(self, other: "Tally") -> None:
        """Add everything that was added to `other`."""
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])
        for name, value in other.maxima.items():
            self._raise_to(name, value)

    def as_floats(self) -> dict[str, float]:
        """Every mean and maximum by name; names that got no element are absent."""
        means = {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}
        return means | self.maxima

    def add(self, name: str, total: float, count: int) -> None:
        """Let `count` elements with sum `total` enter the mean `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    def _raise_to(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, value), value)
