"""The surrogates: a loss per token, [num_tokens], to differentiate.

Arguments that all have: `log_ratio` = l - b and `advantages`, both [num_tokens]. Ratios beyond e^20 count as e^20.
"""

import math

import torch
from torch import Tensor

from darts_async.config.loss import Proximal
from darts_async.learner.packing.sequences import Sequences

LARGEST_LOG_RATIO = 20.0
"""Of any ratio, so that inf * 0 never happens."""


def truncated_ratio(log_ratio: Tensor, cap: float | None) -> Tensor:
    """`rho * sg(min(1, cap / rho))`, [num_tokens]: its value is min(rho, cap), and its gradient that times grad l."""
    limit = LARGEST_LOG_RATIO if cap is None else math.log(cap)
    # In log space, because rho * (cap / rho) is inf * 0 where exp overflows.
    return torch.exp(log_ratio - (log_ratio.detach() - limit).clamp(min=0))


def clipped(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, cap: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of GRPO, DAPO and Dr.GRPO, which differ in clips, advantages and what it is divided by.

        t = truncated_ratio(rho, cap)
        L = -min(t A, clip(t, 1 - clip_low, 1 + clip_high) A)

    Where the gradient is nonzero: for A > 0 while t < 1 + clip_high, for A < 0 while t > 1 - clip_low. In the second
    case nothing else bounds the ratio, which is what `cap` is for.

    Sources: surrogate PPO (arXiv 1707.06347), group form GRPO (2402.03300), clip_high > clip_low DAPO (2503.14476),
    without deviation and lengths Dr.GRPO (2503.20783), truncation against the sampler IMPALA (1802.01561).
    """
    ratio = truncated_ratio(log_ratio, cap)
    metrics = _clip_shares(ratio.detach(), advantages, clip_low, clip_high)
    if cap is not None:
        metrics["truncated_share"] = log_ratio.detach() > math.log(cap)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages), metrics


def gspo(
    log_ratio: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    trained: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (arXiv 2507.18071, equations 5 and 7): one ratio per sample, the geometric mean of its tokens' ratios.

        s_i = exp(mean over the tokens of sample i of (l - b)),   L = -min(s_i A, clip(s_i, 1 - eps, 1 + eps') A)

    The same value is at each of the sample's tokens, so that the mean over them is the sample's loss. Tokens that are
    left out (`trained` [num_tokens] is false) are not in the mean: their gradient would come with that of the others.
    """
    return clipped(sequences.mean(log_ratio, trained), advantages, clip_low=clip_low, clip_high=clip_high)


def cispo(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): the weight is clipped, the gradient never.

        L = -sg(min(rho, 1 + clip_high)) A l

    As in the paper the weight has no lower bound.
    """
    weights = log_ratio.detach().clamp(max=math.log1p(clip_high)).exp()
    return -weights * advantages * logprobs, {"truncated_share": log_ratio.detach() > math.log1p(clip_high)}


def reinforce(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """The policy gradient (Williams, 1992) with importance `weights` [num_tokens]: L = -sg(w) A l.

    With leave-one-out baselines it is RLOO (arXiv 2402.14740), with w = min(rho, C) also V-trace's actor loss
    (IMPALA, 1802.01561).
    """
    return -weights.detach() * advantages * logprobs


def proximal_logprobs(logprobs: Tensor, behaviour_logprobs: Tensor, staleness: Tensor, proximal: Proximal) -> Tensor:
    """Log-probabilities under decoupled PPO's proximal policy, [num_tokens], without gradient.

    AReaL (arXiv 2505.24298) takes the parameters before the update as proximal policy. A step here is one update in
    one pass over its groups, so the policy in training is that of the step's start throughout.

    `step_start`: that policy, l itself. Then u is 1 and never clipped: what remains is `reinforce` with the weight w.
    `interpolated`: the policy one step earlier, which is gone, taken on the line between the two that are known (its
    versions are equally far apart: A-3PO, arXiv 2512.06547): of d versions of staleness, d - 1 lie after it,
    `b + (l - b) (d - 1) / d`. A token of staleness 0 or 1 has its behaviour policy as proximal one. Then
    u = rho^(1/d): the clip bounds the change per version, the weight carries the rest.

    `staleness` is [num_tokens], >= 0, in versions.
    """
    current = logprobs.detach()
    if proximal == "step_start":
        return current
    behind = (staleness - 1).clamp(min=0) / staleness.clamp(min=1)
    return behaviour_logprobs + (current - behaviour_logprobs) * behind


def decoupled_ppo(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, weights: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Decoupled PPO (Hilton et al., arXiv 2110.00641; for language models AReaL, 2505.24298, equation 5).

        L = -sg(w) min(u A, clip(u, 1 - clip_low, 1 + clip_high) A),   u = exp(l - p),   w = exp(p - b), bounded

    `proximal` is p of `proximal_logprobs`, `weights` is w, both [num_tokens].
    """
    loss, metrics = clipped(logprobs - proximal, advantages, clip_low=clip_low, clip_high=clip_high)
    return weights.detach() * loss, metrics


def _clip_shares(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> dict[str, Tensor]:
    return {
        "clip_share_high": (advantages > 0) & (ratio > 1 + clip_high),
        "clip_share_low": (advantages < 0) & (ratio < 1 - clip_low),
    }
