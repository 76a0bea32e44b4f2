"""Means, maxima and quantiles that add up: over micro-batches, over groups, over a step, in any order."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from darts_async.protocol import NUM_BINS, StepTallied

QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}
LARGEST_LOG = 5.0


@dataclass(slots=True)
class Tally:
    """Named means (sum and count), maxima and histograms."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)  # [NUM_BINS] float64 on the CPU

    @classmethod
    def of(cls, message: StepTallied) -> "Tally":
        """What another rank has counted."""
        histograms = {
            name: torch.frombuffer(bytearray(counts), dtype=torch.float64)
            for name, counts in message.histograms.items()
        }
        return cls(message.sums, message.counts, message.maxima, histograms)

    def message(self, step: int) -> StepTallied:
        """For rank 0; the inverse of `of`."""
        histograms = {name: counts.numpy().astype("<f8").tobytes() for name, counts in self.histograms.items()}
        return StepTallied(step, self.sums, self.counts, self.maxima, histograms)

    def mean(self, name: str, values: Tensor) -> None:
        """Let every element of `values` (bool counts as 0 or 1) enter the mean `name`."""
        self.add(name, values.sum(dtype=torch.float64).item(), values.numel())  # rewards of 1e38 would overflow float32

    def maximum(self, name: str, values: Tensor) -> None:
        """Let every element of `values` enter the maximum `name`."""
        if values.numel():
            self._raise_to(name, values.max().item())

    def quantiles(self, name: str, logs: Tensor) -> None:
        """Let `exp` of every element enter the quantiles `name_p01`, `name_p50`, `name_p99`.

        They are exact to 0.25 % between e^-5 and e^5; what lies beyond counts as that.
        """
        counts = torch.histc(logs.float().clamp(-LARGEST_LOG, LARGEST_LOG), NUM_BINS, -LARGEST_LOG, LARGEST_LOG)
        self._add_histogram(name, counts.double().cpu())

    def merge(self, other: "Tally") -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])
        for name, value in other.maxima.items():
            self._raise_to(name, value)
        for name, counts in other.histograms.items():
            self._add_histogram(name, counts)

    def as_floats(self) -> dict[str, float]:
        """Every mean, maximum and quantile by name; names that got no element are absent."""
        means = {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}
        return means | self.maxima | self._quantiles()

    def add(self, name: str, total: float, count: float) -> None:
        """Let `count` elements with sum `total` enter the mean `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def _raise_to(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, value), value)

    def _add_histogram(self, name: str, counts: Tensor) -> None:
        self.histograms[name] = self.histograms[name] + counts if name in self.histograms else counts

    def _quantiles(self) -> dict[str, float]:
        values = {}
        for name, counts in self.histograms.items():
            below = counts.cumsum(0)
            if not below[-1]:
                continue
            for label, share in QUANTILES.items():
                place = int(torch.searchsorted(below, share * below[-1]))
                middle = (place + 0.5) / NUM_BINS * 2 * LARGEST_LOG - LARGEST_LOG
                values[f"{name}_{label}"] = math.exp(middle)
        return values
