"""How many samples are launched per prompt: the total, and who gets it.

M samples are trained per prompt and R_i in [M, 2M] launched. Stopping at the shortest of R_i saves time where lengths
differ, with diminishing returns, so a budget B = sum R_i is split to minimise sum v_i / R_i, v_i the relative length
spread of prompt i. One more sample for i lowers this by v_i / (R_i (R_i + 1)), which falls with R_i: giving the samples
out one by one to the largest gain is exactly optimal. Its continuous counterpart is

    R_i = clip(sqrt(v_i / nu), M, 2M)        with nu such that the sum is B,                               (S)

and the total follows from `mean_redundancy`. Without spread there is nothing to gain and R = M.

An asynchronous system opens groups one at a time and never sees a batch: `Allocator` solves (S) over a window of the
latest prompts.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """d ln(time) / d ln(samples) where the generators work: 1 if they are always full, see `latency_elasticity`."""


def latency_elasticity(latency: Callable[[float], float], batch: float) -> float:
    """d ln PTL / d ln b, clipped to [0, 1]: by how many per cent a decode step slows when the batch grows by one.

    Args:
        latency: PTL(b), the profiled time of a decode step of b samples, for real b >= 1, in any unit.
        batch: samples decoded at once with R = M. For PTL = 1 + b / b0 the result is b / (b0 + b): on idle hardware
            redundancy is free.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; a decode step has at least one sample")
    below, above = max(1.0, 0.9 * batch), 1.1 * batch
    slope = math.log(latency(above) / latency(below)) / math.log(above / below)
    return min(max(slope, 0.0), 1.0)


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


def split_shuffled(
    spreads: Sequence[float] | FloatArray, budget: int, low: int, high: int, *, seed: int | tuple[int, ...]
) -> IntArray:
    """The placebo: the multiset of `split_paper`, handed out at random."""
    return np.random.default_rng(seed).permutation(split_paper(spreads, budget, low, high))


def reward_aware_value(relative_spread: float, reward_variance: float) -> float:
    """Spread times expected reward variance E[p (1 - p)], to be used in place of the spread.

    A group's expected squared advantage is p (1 - p): that is what it teaches, and time saved on a group that teaches
    nothing buys nothing but the room it leaves for others. The expectation is over what is not known about p, so a
    prompt that failed all of its few samples still counts, and one never seen counts as the average prompt. R >= M
    holds for every prompt, so no prompt is starved: only the redundant samples move.
    """
    return relative_spread * reward_variance


def split_reward_aware(
    spreads: Sequence[float] | FloatArray,
    reward_variances: Sequence[float] | FloatArray,
    budget: int,
    low: int,
    high: int,
) -> IntArray:
    """`split_paper` by `reward_aware_value`."""
    pairs = zip(spreads, reward_variances, strict=True)
    return split_paper([reward_aware_value(spread, variance) for spread, variance in pairs], budget, low, high)


def continuous_split(values: FloatArray, mean: float, low: int, high: int) -> FloatArray:
    """(S): the real-valued split with this mean over the window; all `high` or `low` if it cannot be reached.

    With y = sqrt(v) and q = 1 / sqrt(nu) the sum of clip(q y_i, low, high) is piecewise linear in q, with a kink where
    a prompt leaves `low` or reaches `high`; so q is found exactly. O(N log N).
    """
    roots = np.sqrt(values)
    rising = roots[roots > 1e-9 * roots.max()] if roots.any() else roots[:0]
    if not rising.size:
        return np.full(len(roots), float(low))
    kinks = np.concatenate([low / rising, high / rising])
    order = np.argsort(kinks, kind="stable")
    kinks, slopes = kinks[order], np.cumsum(np.concatenate([rising, -rising])[order])
    sums = low * len(roots) + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(kinks))])
    q = float(np.interp(mean * len(roots), np.maximum.accumulate(sums), kinks))
    split: FloatArray = np.clip(q * roots, low, high)
    return split


class Allocator:
    """R for one prompt at a time, such that over a window it is the batch split and its mean the target.

    Three sources of error are fed back. Rounding: what was rounded off is carried to the next prompt that is not at a
    bound. Drift of (S): the window that gave R to a prompt is not the one the prompt ends up in, so the accumulated
    gap between target and R is paid back over a window's length. Bounds: a gap that cannot be paid back, because no
    prompt has any spread, is not remembered beyond one sample per prompt of the window.

    Deterministic: R depends on the arguments so far and the seed alone.
    """

    def __init__(self, keep: int, most: int, *, window: int = 128, shuffle_seed: int | None = None) -> None:
        """Start without history.

        Args:
            keep: lower bound M.
            most: upper bound, 2M.
            window: prompts that (S) is solved over.
            shuffle_seed: makes it the placebo: each prompt gets the R of a random one of the window.
        """
        if not 0 < keep <= most or window < 1:
            raise ValueError(f"bounds [{keep}, {most}] over a window of {window} prompts cannot be met")
        self._keep, self._most = keep, most
        self._shuffle_seed = shuffle_seed
        self._values: deque[float] = deque(maxlen=window)
        self._window = window
        self._num_allocated = 0
        self._drift = 0.0
        self._carry = 0.0

    def allocate(self, value: float, mean: float) -> int:
        """Samples to launch for the next prompt.

        Args:
            value: its relative length spread, or another value to be used in place of it; 1 for all is uniform.
            mean: target of the running mean, clipped to the bounds. At the lower bound the answer is that bound, and
                nothing is owed.
        """
        self._values.append(_checked(value))
        self._num_allocated += 1
        if mean <= self._keep:
            self._drift = self._carry = 0.0
            return self._keep
        mean = min(mean, float(self._most))
        ideal = self._ideal(mean + self._drift / self._window)
        self._drift = min(max(self._drift + mean - ideal, -self._window), self._window)
        return self._rounded(ideal)

    def validate(self) -> None:
        """Invariants: what is carried is less than a sample, what is owed at most one per prompt of the window."""
        assert abs(self._carry) <= 0.5, self._carry
        assert abs(self._drift) <= self._window, self._drift

    def _ideal(self, mean: float) -> float:
        values = np.array(self._values)
        own = len(values) - 1
        if self._shuffle_seed is not None:
            own = int(np.random.default_rng((self._shuffle_seed, self._num_allocated)).integers(len(values)))
        return float(continuous_split(values, mean, self._keep, self._most)[own])

    def _rounded(self, ideal: float) -> int:
        if ideal in (self._keep, self._most):
            return int(ideal)
        wanted = ideal + self._carry
        given = min(max(math.floor(wanted + 0.5), self._keep), self._most)
        self._carry = min(max(wanted - given, -0.5), 0.5)
        return given


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
