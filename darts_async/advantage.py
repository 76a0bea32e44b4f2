"""Computes advantages: how much better a sample is than expected for its prompt.

For every baseline the advantage is `w_i (r_i - b_i)`, divided by a deviation if `normalise`. The weights represent
samples that were not kept, and multiply each sample's term of the loss, which is done here: the surrogate is linear
in the advantage.

    group          b = sum(w r) / sum(w)
    leave_one_out  r_i - b_i = sum over j != i of u_ij (r_i - r_j) / (R - 1), see `leave_one_out`
    history        b = pass rate of the prompt before this group

Invariants. With unit weights `group` is GRPO's (DeepSeekMath, arXiv 2402.03300, section 4.1), and without the
division Dr. GRPO's (arXiv 2503.20783); `leave_one_out` is RLOO's (arXiv 2402.14740). Equal rewards give exactly zero
with both, whatever the weights; with `history` they do not. With `group` the weighted sum over a group is zero up to
rounding: it moves probability between its samples and never up or down as a whole.

Bias. With inverse inclusion probabilities as weights, `sum w_i (r_i - b_i) grad log pi(i)` has the expectation of the
sum over all R launched samples if b_i does not depend on sample i once the draw is averaged out: true for `history`
and `leave_one_out`, not for `group`. Division by the group's own deviation is biased in any case, because that depends
on the rewards that it divides. The deviation of `history` is the history's own: it changes the weights of prompts
relative to each other, and each prompt's gradient keeps its direction.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darts_async.config import Baseline, LossConfig, ShapingConfig
from darts_async.protocol import TrainGroup

STD_EPSILON = 1e-6
_ONE = 1 + 1e-6
"""The weight of a sample that represents only itself, with room for rounding. Samples of a tail weigh more."""
LOWEST_PASS_RATE = 0.02
"""The deviation of a pass rate is computed at least this far from 0 and 1: a short history cannot tell, and the rare
sample that contradicts it would outweigh its step."""


class Decoded(NamedTuple):
    """Samples of a group that `rule: survivor` decodes to the end, whether their rewards fail or not."""

    shortest: int
    """`shaping.shortest` (K)"""
    longest: int
    """`shaping.longest` (L)"""

    @classmethod
    def of(cls, shaping: ShapingConfig) -> "Decoded | None":
        """None: the rule gives all samples the same weight."""
        return cls(shaping.shortest, shaping.longest) if shaping.rule == "survivor" else None

    def num_launched(self, weight: float) -> int:
        """R, from the weight of one sample: M / R at the short end, which is at most 1, and M (R - K) / (R L) in the
        tail. See `Survivor`."""
        total = sum(self)
        if weight > _ONE:
            return max(total, round(total * self.shortest / max(total - weight * self.longest, STD_EPSILON)))
        return max(total, round(total / weight))


def trained_advantages(
    group: TrainGroup,
    loss: LossConfig,
    max_new_tokens: int,
    *,
    baseline: Baseline = "group",
    decoded: Decoded | None = None,
) -> NDArray[np.float32]:
    """The advantages that the gradient of a group has, weights and the penalty of overlong samples included.

    The learner takes them, and the shaper keeps them with the rollouts. Returns: [num_samples].
    """
    return group_advantages(
        group.rewards - overlong_penalties(group.num_tokens, loss, max_new_tokens),
        group.weights,
        normalise=loss.normalise_advantage,
        baseline=baseline,
        pass_rate=group.baseline,
        decoded=decoded,
    )


def overlong_penalties(num_tokens: NDArray[np.int32], config: LossConfig, max_new_tokens: int) -> NDArray[np.float32]:
    """What is subtracted from each sample's reward, [num_samples]: the soft punishment of DAPO (equation 13). It is 0
    up to `max_new_tokens - buffer` tokens, then rises linearly to `overlong_penalty` at `max_new_tokens`."""
    if not config.overlong_buffer_tokens:
        return np.zeros(len(num_tokens), np.float32)
    inside = num_tokens - (max_new_tokens - config.overlong_buffer_tokens)
    share = np.clip(inside / config.overlong_buffer_tokens, 0, 1)
    return (share * config.overlong_penalty).astype(np.float32)


def group_advantages(
    rewards: NDArray[np.float32],
    weights: NDArray[np.float32],
    *,
    normalise: bool,
    baseline: Baseline = "group",
    pass_rate: float | None = None,
    decoded: Decoded | None = None,
) -> NDArray[np.float32]:
    """The advantage of each sample of a group, times its weight: [num_samples].

    Rewards and positive weights are [num_samples]. `normalise` divides by the weighted population deviation of the
    rewards plus 1e-6, or, where the baseline is the history p (`pass_rate`), by `sqrt(p (1 - p))`, the deviation of a
    reward that is 1 with probability p and else 0. `decoded` is for `leave_one_out` of weighted samples.
    """
    better: NDArray[np.float64]
    if baseline == "history":
        assert pass_rate is not None, "the baseline is the history, but the group came without a pass rate"
        better, deviation = rewards.astype(np.float64) - pass_rate, _bernoulli_deviation(pass_rate)
    elif np.all(rewards == rewards[0]):
        return np.zeros(len(rewards), np.float32)
    else:
        mean, deviation = _weighted_mean_and_deviation(rewards, weights)
        is_group = baseline == "group"
        better = rewards.astype(np.float64) - mean if is_group else leave_one_out(rewards, weights, decoded)
    advantages: NDArray[np.float32] = (weights * better / (deviation if normalise else 1.0)).astype(np.float32)
    return advantages


def leave_one_out(
    rewards: NDArray[np.float32], weights: NDArray[np.float32], decoded: Decoded | None = None
) -> NDArray[np.float64]:
    """How much better each sample is than the mean of its R - 1 launched siblings, estimated from the pairs left.

        r_i - b_i = sum over j != i of u_ij (r_i - r_j) / (R - 1),   u_ij = pi_i / pi_ij

    The mean over siblings of r_i - r_j is estimated by those j that have a reward too. Given that i is there, j is with
    probability pi_ij / pi_i, so the pair counts u_ij times (Horvitz and Thompson, 1952). Of a tail of T = R - K
    unfinished samples L survive: L / T of them, and L (L - 1) / (T (T - 1)) of its pairs. So u_ij is
    (T - 1) / (L - 1) within the tail, T / L for j of the tail and i of the short end, and 1 for j of the short end.

    Where m of the M = K + L samples have a reward, and failures do not depend on content, every pair that was decoded
    is left with probability m (m - 1) / (M (M - 1)) and every sample with m / M. So u_ij gets the factor
    (M - 1) / (m - 1), and the weighted sum over the group has m / M of its expectation, as with the other baselines
    (see `selection`). Differences of rewards are what makes equal rewards give zero whichever samples are left.

    A lone survivor has no sibling that could represent the rest of the tail: it is compared with the short end alone,
    which is biased. No setting leads there, see `ShapingConfig`.

    Args: rewards and weights [num_samples], at least 2. `decoded` None: all weights are alike. Returns: [num_samples].
    """
    num_scored = len(rewards)
    decoded = decoded or Decoded(num_scored, 0)
    in_tail = weights > _ONE
    num_launched = decoded.num_launched(float(weights.min()))
    counts = np.ones((num_scored, num_scored))
    if in_tail.any() and decoded.longest:
        num_tail, survivors = num_launched - decoded.shortest, decoded.longest
        counts[:, in_tail] = num_tail / survivors
        counts[np.ix_(in_tail, in_tail)] = (num_tail - 1) / (survivors - 1) if survivors > 1 else 0.0
    differences = rewards[:, None].astype(np.float64) - rewards
    share_of_pairs = (num_scored - 1) / (sum(decoded) - 1)
    better: NDArray[np.float64] = (counts * differences).sum(1) / (share_of_pairs * (num_launched - 1))
    return better


def _weighted_mean_and_deviation(rewards: NDArray[np.float32], weights: NDArray[np.float32]) -> tuple[float, float]:
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    mean = share @ rewards
    return mean, np.sqrt(share @ (rewards - mean) ** 2) + STD_EPSILON


def _bernoulli_deviation(pass_rate: float) -> float:
    rate = min(max(pass_rate, LOWEST_PASS_RATE), 1 - LOWEST_PASS_RATE)
    return math.sqrt(rate * (1 - rate))
