"""Advantages: how much better a sample is than what was to be expected of its prompt.

For every baseline the advantage is `w_i (r_i - b_i)`, divided by a deviation if `normalise`. The weights stand for
samples that were not kept, and multiply each sample's term of the loss, which is done here: the surrogate is linear
in the advantage.

    group          b = sum(w r) / sum(w)
    leave_one_out  b_i = sum over j != i of u_ij r_j, divided by that of u_ij, R - 1
    history        b = pass rate of the prompt before this group

Invariants. With unit weights `group` is GRPO's (DeepSeekMath, arXiv 2402.03300, section 4.1), and without the
division Dr. GRPO's (arXiv 2503.20783); `leave_one_out` is RLOO's (arXiv 2402.14740). Equal rewards give exactly zero
with both, whatever the weights; with `history` they do not. With `group` the weighted sum over a group is zero up to
rounding: it moves probability between its samples and never up or down as a whole.

Bias. With inverse inclusion probabilities as weights, `sum w_i (r_i - b_i) grad log pi(i)` has the expectation of the
sum over all R launched samples if b_i does not depend on sample i once the draw is averaged out: true for `history`
and `leave_one_out`, not for `group`. Division by the group's own deviation costs that exactness in any case: it is made
of the very rewards that it divides. The deviation of `history` is the history's own: it changes what
prompts weigh against each other, and each prompt's gradient keeps its direction.
"""

import math

import numpy as np
from numpy.typing import NDArray

from darts_async.config import Baseline

STD_EPSILON = 1e-6
LOWEST_PASS_RATE = 0.02
"""Pass rates nearer to 0 or 1 are taken as this far off when they give a deviation: a short history cannot tell, and
the rare sample that contradicts it would outweigh its step."""


def group_advantages(
    rewards: NDArray[np.float32],
    weights: NDArray[np.float32],
    *,
    normalise: bool,
    baseline: Baseline = "group",
    pass_rate: float | None = None,
) -> NDArray[np.float32]:
    """The advantage of each sample of a group, times its weight.

    `normalise` divides by the weighted population deviation of the rewards plus 1e-6, or, where the baseline is the
    history p, by `sqrt(p (1 - p))`, the deviation of a reward that is 1 with probability p and else 0.

    Args: rewards and positive weights, both [num_samples]; `pass_rate` is p. Returns: [num_samples].
    """
    expected: float | NDArray[np.float64]
    deviation: float
    if baseline == "history":
        assert pass_rate is not None, "the baseline is the history, but the group came without a pass rate"
        expected, deviation = pass_rate, _bernoulli_deviation(pass_rate)
    elif np.all(rewards == rewards[0]):
        return np.zeros(len(rewards), np.float32)
    else:
        expected, deviation = _weighted_mean_and_deviation(rewards, weights)
        if baseline == "leave_one_out":
            expected = leave_one_out_baselines(rewards, weights)
    scale = deviation if normalise else 1.0
    advantages: NDArray[np.float32] = (weights * (rewards.astype(np.float64) - expected) / scale).astype(np.float32)
    return advantages


def leave_one_out_baselines(rewards: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """The Horvitz-Thompson estimate, for each sample, of the mean reward of its R - 1 launched siblings.

    Given that i is kept, sibling j was kept with probability pi_ij / pi_i, so its reward counts u_ij = pi_i / pi_ij
    times: `b_i = sum_{j != i} u_ij r_j / (R - 1)` (Horvitz and Thompson, 1952). Of a tail of T unfinished samples L
    survive: pi = L / T and pi_ij = L (L - 1) / (T (T - 1)) for two of the tail, and 1 at the short end. So u_ij is
    (T - 1) / (L - 1) within the tail and w_j elsewhere; all u_ij of a sample add up to R - 1.

    A lone survivor has no sibling that could stand for the rest of the tail: it is compared with the short end alone,
    which is biased. No setting leads there, see `ShapingConfig`.

    Args: both [num_samples], at least 2; weights are in the ratio of 1 at the short end to T / L in the tail.
    Returns: [num_samples].
    """
    relative = weights.astype(np.float64) / weights.min()
    tail = relative > 1 + 1e-6
    num_survivors, num_tail = int(tail.sum()), round(float(relative[tail].sum()))
    counts = np.tile(relative, (len(weights), 1))
    if num_survivors:
        counts[:, tail] = num_tail / num_survivors  # as float32 it is not exact
        counts[np.ix_(tail, tail)] = (num_tail - 1) / (num_survivors - 1) if num_survivors > 1 else 0.0
    np.fill_diagonal(counts, 0)
    baselines: NDArray[np.float64] = counts @ rewards / counts.sum(1)
    return baselines


def _weighted_mean_and_deviation(rewards: NDArray[np.float32], weights: NDArray[np.float32]) -> tuple[float, float]:
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    mean = share @ rewards
    return mean, np.sqrt(share @ (rewards - mean) ** 2) + STD_EPSILON


def _bernoulli_deviation(pass_rate: float) -> float:
    rate = min(max(pass_rate, LOWEST_PASS_RATE), 1 - LOWEST_PASS_RATE)
    return math.sqrt(rate * (1 - rate))
