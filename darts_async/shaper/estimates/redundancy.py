"""How many samples are launched per prompt: the total, and who gets it.

M samples are trained per prompt and R_i in [M, 2M] launched. Stopping at the shortest of R_i saves time where lengths
differ, with diminishing returns, so a budget B = sum R_i is split to minimise sum v_i / R_i, v_i the relative length
spread of prompt i. One more sample for i lowers this by v_i / (R_i (R_i + 1)), which falls with R_i: giving the samples
out one by one to the largest gain is exactly optimal. The total follows from `mean_redundancy`; without spread there is
nothing to gain and R = M.

An asynchronous system opens groups one at a time, so prompts are drawn ahead and planned by the batch: `Allocator`.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darts_async.config.shaping import Split

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Utility:
    """What redundancy brings and costs; the defaults make it pay from a relative spread of 1/5 on."""

    kappa: float = 2 / 3
    """How fast the benefit saturates."""
    price: float = 2 / 15
    """Benefit that one per cent of time must bring, in per cent."""
    elasticity: float = 1.0
    """d ln(time) / d ln(samples) where the generators work: 1 if they are always full, see `decode_elasticity`."""


def mean_redundancy(relative_spread: float, keep: int, *, utility: Utility = Utility(), most: float = 14 / 8) -> float:
    """Samples to launch per prompt on average; exactly `keep` where the spread is too small to pay.

    With x = (m - M) / M the benefit and the time of a mean redundancy m are

        E(m) = s (1 - exp(-kappa x))          the time per response saved, up to the length spread s
        T(m) = lbar (1 + phi x)               first order in x; lbar the mean length, phi the elasticity

    The second is exact where PTL is affine: N prompts of m samples take sum_j (l_[j] - l_[j-1]) PTL(N m - j + 1) =
    l_max + N m lbar / b0. E - price * T is concave in m and its derivative vanishes at kappa s exp(-kappa x) =
    price * phi * lbar:

        m = M (1 + ln(kappa / (price * phi) * s / lbar) / kappa), clipped to [M, most * M],

    which is M (1 + 1.5 ln(5 s / lbar)) with the default utility. ln <= 0 says that already the first redundant sample
    costs more than it brings.

    Args:
        relative_spread: s / lbar, running mean within prompts.
        keep: M.
        utility: benefit, price and elasticity.
        most: upper bound, as a multiple of M.
    """
    cost = utility.price * utility.elasticity
    benefit = utility.kappa * _checked(relative_spread)
    if benefit <= cost:
        return float(keep)
    extra = math.log(benefit / cost) / utility.kappa if cost else math.inf
    return keep * min(1 + extra, most)


def split_uniform(num_prompts: int, budget: int, low: int, high: int) -> IntArray:
    """The same for all, up to one sample; the ones left over are spread evenly. [num_prompts]"""
    _check_budget(num_prompts, budget, low, high)
    shares = np.arange(num_prompts + 1, dtype=np.int64) * budget // max(num_prompts, 1)
    return np.diff(shares)


def split_paper(spreads: Sequence[float] | FloatArray, budget: int, low: int, high: int) -> IntArray:
    """Minimises sum spread / R exactly; equal gains go to whoever has fewest, then to the first.

    O(budget log N).

    Args:
        spreads: [num_prompts], relative length spreads; only ratios matter.
        budget: sum of the result, in [low N, high N].
        low: M.
        high: 2M.

    Returns:
        [num_prompts], each in [low, high].
    """
    values = [_checked(value) for value in spreads]
    _check_budget(len(values), budget, low, high)
    split = [low] * len(values)
    heap = [(-value / (low * (low + 1)), low, i) for i, value in enumerate(values)]
    heapq.heapify(heap)
    for _ in range(budget - low * len(values)):
        _, given, i = heap[0]
        split[i] = given = given + 1
        if given < high:
            heapq.heapreplace(heap, (-values[i] / (given * (given + 1)), given, i))
        else:
            heapq.heappop(heap)
    return np.array(split, np.int64)


def reward_aware_value(relative_spread: float, reward_variance: float) -> float:
    """Spread times expected reward variance E[p (1 - p)], to be used in place of the spread.

    A group's expected squared advantage is p (1 - p): that is what it teaches, and time saved on a group that teaches
    nothing buys nothing but the room it leaves for others. The expectation is over what is not known about p, so a
    prompt that failed all of its few samples still counts, and one never seen counts as the average prompt. R >= M
    holds for every prompt, so no prompt is starved: only the redundant samples move.
    """
    return relative_spread * reward_variance


class Allocator:
    """R for the prompts of one batch after the other.

    Each batch spends exactly its budget, B = mean * N rounded; what was rounded off is carried to the next batch, so
    that the running mean is the target. Deterministic: R depends on the arguments so far and the seed alone.
    """

    def __init__(self, keep: int, most: int, split: Split, *, seed: int = 0) -> None:
        """Start without history.

        Args:
            keep: lower bound M.
            most: upper bound, 2M.
            split: `uniform` looks at no value; `paper` and `reward_aware` (which differ in the values they are given)
                are the exact greedy; `shuffled`, the placebo, hands its numbers out by lot.
            seed: of the lots.
        """
        if not 0 < keep <= most:
            raise ValueError(f"bounds [{keep}, {most}] cannot be met")
        self._keep, self._most = keep, most
        self._split = split
        self._seed = seed
        self._num_batches = 0
        self._carry = 0.0

    def allocate(self, values: Sequence[float], mean: float) -> list[int]:
        """Samples to launch for each prompt of the next batch, in [M, 2M].

        Args:
            values: their relative length spreads, or what is to be used in place of them.
            mean: target of the running mean, clipped to the bounds. At the lower bound nothing is owed afterwards.
        """
        num = len(values)
        self._num_batches += 1
        if mean <= self._keep:
            self._carry = 0.0
            return [self._keep] * num
        wanted = min(mean, float(self._most)) * num + self._carry
        budget = min(max(math.floor(wanted + 0.5), self._keep * num), self._most * num)
        self._carry = min(max(wanted - budget, -0.5), 0.5)
        launched: list[int] = self._shares(values, budget).tolist()
        return launched

    def to_state(self) -> dict[str, Any]:
        """What later batches depend on, as plain data."""
        return {"num_batches": self._num_batches, "carry": self._carry}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `to_state` was taken."""
        self._num_batches, self._carry = state["num_batches"], state["carry"]

    def validate(self) -> None:
        """Invariant: less than a sample is carried."""
        assert abs(self._carry) <= 0.5, self._carry

    def _shares(self, values: Sequence[float], budget: int) -> IntArray:
        if self._split == "uniform":
            return split_uniform(len(values), budget, self._keep, self._most)
        greedy = split_paper(values, budget, self._keep, self._most)
        if self._split == "shuffled":
            return np.random.default_rng((self._seed, self._num_batches)).permutation(greedy)
        return greedy


def _checked(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"a length spread is {value}; it must be finite and not negative")
    return float(value)


def _check_budget(num_prompts: int, budget: int, low: int, high: int) -> None:
    if not num_prompts * low <= budget <= num_prompts * high:
        raise ValueError(
            f"a budget of {budget} samples for {num_prompts} prompts is outside [{num_prompts * low}, "
            f"{num_prompts * high}], {low} to {high} for each"
        )
