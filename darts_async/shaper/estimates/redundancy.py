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

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from darts_async.config.shaping import Split

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


_KAPPA = 2 / 3
"""How fast the benefit saturates."""
_PRICE = 2 / 15
"""Benefit that one per cent of time must bring, in per cent: redundancy pays from a relative spread of 1/5 on."""
_MOST = 14 / 8
"""Largest mean redundancy, as a multiple of M."""


def mean_redundancy(relative_spread: float, keep: int, *, elasticity: float = 1.0) -> float:
    """Samples to launch per prompt on average; exactly `keep` where the spread is too small to pay.

    With x = (m - M) / M the benefit and the time of a mean redundancy m are

        E(m) = s (1 - exp(-kappa x))          the time per response saved, up to the length spread s
        T(m) = lbar (1 + phi x)               first order in x; lbar the mean length, phi the elasticity

    The second is exact where PTL is affine: N prompts of m samples take sum_j (l_[j] - l_[j-1]) PTL(N m - j + 1) =
    l_max + N m lbar / b0. E - price * T is concave in m and its derivative vanishes at kappa s exp(-kappa x) =
    price * phi * lbar:

        m = M (1 + ln(kappa / (price * phi) * s / lbar) / kappa), clipped to [M, 14/8 M],

    which is M (1 + 1.5 ln(5 s / lbar)) at phi = 1. Where ln <= 0, the first redundant sample costs more than it brings.

    Args:
        relative_spread: s / lbar, running mean within prompts.
        keep: M.
        elasticity: phi, d ln(time) / d ln(samples) where the generators work; 1 if they are always full, see
            `decode_elasticity`.
    """
    cost, benefit = _PRICE * elasticity, _KAPPA * relative_spread
    if benefit <= cost:
        return float(keep)
    extra = math.log(benefit / cost) / _KAPPA if cost else math.inf
    return keep * min(1 + extra, _MOST)


def split_uniform(num_prompts: int, budget: int, low: int, high: int) -> IntArray:
    """The same for all, up to one sample; the ones left over are spread evenly. [num_prompts]"""
    assert num_prompts * low <= budget <= num_prompts * high, (budget, num_prompts, low, high)
    shares = np.arange(num_prompts + 1, dtype=np.int64) * budget // max(num_prompts, 1)
    return np.diff(shares)


def split_paper(spreads: Sequence[float] | FloatArray, budget: int, low: int, high: int) -> IntArray:
    """Minimises sum spread / R exactly; equal gains go to the prompt with fewest, then to the first.
    O(budget log N).

    Args:
        spreads: [num_prompts], relative length spreads; only ratios matter.
        budget: sum of the result, in [low N, high N].
        low: M.
        high: 2M.

    Returns:
        [num_prompts], each in [low, high].
    """
    values = [float(value) for value in spreads]
    assert all(0 <= value < math.inf for value in values), values
    assert low * len(values) <= budget <= high * len(values), (budget, len(values), low, high)
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
    nothing only makes room for others. The expectation is over the unknown p, so a prompt that failed all of its few
    samples still counts, and one never seen counts as the average prompt. R >= M holds for every prompt, so no prompt
    is starved: only the redundant samples move.
    """
    return relative_spread * reward_variance


class Allocator(Struct):
    """R for the prompts of one batch after the other; encoded as it is.

    Each batch spends exactly its budget, B = mean * N rounded, and the rest is carried to the next batch, so that the
    running mean is the target. Deterministic: R depends on the arguments so far and the seed alone.
    """

    keep: int
    """Lower bound M."""
    most: int
    """Upper bound, 2M."""
    split: Split
    """`uniform` looks at no value; `paper` and `reward_aware` (which differ in the values they are given) are the exact
    greedy; `shuffled`, the placebo, hands its numbers out at random."""
    seed: int = 0
    num_batches: int = 0
    carry: float = 0.0

    def allocate(self, values: Sequence[float], mean: float) -> list[int]:
        """Samples to launch for each prompt of the next batch, in [M, 2M], by relative length spreads or values in
        place of them. `mean`: target of the running mean, clipped to the bounds; at the lower one nothing is owed
        afterwards."""
        num = len(values)
        self.num_batches += 1
        if mean <= self.keep:
            self.carry = 0.0
            return [self.keep] * num
        wanted = min(mean, float(self.most)) * num + self.carry
        budget = min(max(math.floor(wanted + 0.5), self.keep * num), self.most * num)
        self.carry = min(max(wanted - budget, -0.5), 0.5)
        launched: list[int] = self._shares(values, budget).tolist()
        return launched

    def validate(self) -> None:
        """Invariant: less than a sample is carried."""
        assert abs(self.carry) <= 0.5, self.carry

    def _shares(self, values: Sequence[float], budget: int) -> IntArray:
        if self.split == "uniform":
            return split_uniform(len(values), budget, self.keep, self.most)
        greedy = split_paper(values, budget, self.keep, self.most)
        if self.split == "shuffled":
            return np.random.default_rng((self.seed, self.num_batches)).permutation(greedy)
        return greedy
