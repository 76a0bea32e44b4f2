"""How much a larger batch slows decoding, measured from the tokens that generators report.

While a slot is free, one more sample joins the batch, and a step takes longer by the elasticity of the time per token,
d ln PTL / d ln b, which is near 0 on idle and near 1 on saturated hardware. While all slots are taken it waits for one,
and the time grows in proportion: 1. So, with f the share of the decode time in which all slots were taken,

    elasticity = f + (1 - f) d ln PTL / d ln b.

PTL is taken to be affine in b: a step reads the weights, and costs something for each sample. The slope is its
regression on b, at the mean b. Each generator has one *tracer*, a sample that it is decoding: between two reports of it
lie as many steps as it got tokens. The first report of a sample measures nothing, because it may have waited for a
slot. Every generator is measured by itself, so that slow and fast machines can be mixed; old measurements fade; and
where batches hardly varied, a prior of a few steps holds the slope at 1, the most cautious value.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from msgspec import Struct

_MEMORY_STEPS = 20_000.0
"""Measurements of so many decode steps ago count 1 / e."""
_PRIOR_SCATTER = 5.0
"""The prior is worth so many steps at twice the mean batch."""
_PRIOR_SLOPE = 1.0


@dataclass(slots=True)
class _Tracer:
    """A sample that is being decoded."""

    sample_id: int
    since_s: float
    """When its tokens were last reported, or a pause has ended."""
    num_running: int
    """Size of the batch then."""


@dataclass(slots=True)
class _Regression:
    """Fading weighted moments of x = b and y = PTL, and the weight of the measurements with all slots taken."""

    weight: float = 0.0
    weight_full: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    scatter_xx: float = 0.0
    scatter_xy: float = 0.0

    def add(self, x: float, y: float, num_steps: int, *, full: bool) -> None:
        fade = math.exp(-num_steps / _MEMORY_STEPS)
        self.weight = fade * self.weight + num_steps
        self.weight_full = fade * self.weight_full + num_steps * full
        share, gap_x, gap_y = num_steps / self.weight, x - self.mean_x, y - self.mean_y
        self.mean_x += share * gap_x
        self.mean_y += share * gap_y
        self.scatter_xx = fade * self.scatter_xx + num_steps * (1 - share) * gap_x * gap_x
        self.scatter_xy = fade * self.scatter_xy + num_steps * (1 - share) * gap_x * gap_y

    @property
    def elasticity(self) -> float:
        relative_xy = self.scatter_xy / (self.mean_x * self.mean_y)
        slope = (relative_xy + _PRIOR_SCATTER * _PRIOR_SLOPE) / (self.scatter_xx / self.mean_x**2 + _PRIOR_SCATTER)
        full = self.weight_full / self.weight
        return full + (1 - full) * min(max(slope, 0.0), 1.0)


class DecodePace(Struct, eq=False):
    """Measures all generators; encoded as it is. A report costs a microsecond."""

    tracers: dict[str, _Tracer] = {}
    regressions: dict[str, _Regression] = {}

    @property
    def elasticity(self) -> float:
        """By how many per cent decoding slows if one per cent more samples are decoded, in [0, 1]; 1 if unknown."""
        regressions = self.regressions.values()
        weight = sum(r.weight for r in regressions)
        return sum(r.weight * r.elasticity for r in regressions) / weight if weight else _PRIOR_SLOPE

    def reported(
        self,
        name: str,
        sample_ids: Sequence[int],
        num_tokens: Sequence[int],
        *,
        held: Collection[int],
        num_slots: int,
        now_s: float,
    ) -> None:
        """A generator has reported so many tokens of each sample. `held`: the samples that it has, those that wait for
        one of its slots included."""
        if not sample_ids:
            return
        num_running = min(len(held), num_slots)
        tracer = self.tracers.get(name)
        if tracer is None or tracer.sample_id not in held:
            self.tracers[name] = _Tracer(sample_ids[-1], now_s, num_running)
        elif tracer.sample_id in sample_ids:
            num_steps = num_tokens[sample_ids.index(tracer.sample_id)]
            elapsed_s = now_s - tracer.since_s
            if elapsed_s > 0:
                batch = (num_running + tracer.num_running) / 2
                regression = self.regressions.setdefault(name, _Regression())
                regression.add(batch, elapsed_s / num_steps, num_steps, full=num_running == num_slots)
            tracer.since_s, tracer.num_running = now_s, num_running

    def paused(self, name: str, now_s: float) -> None:
        """Decoding has paused until now, which does not depend on the batch."""
        if name in self.tracers:
            self.tracers[name].since_s = now_s

    def forget(self, name: str) -> None:
        """A generator is gone."""
        self.tracers.pop(name, None)
        self.regressions.pop(name, None)
