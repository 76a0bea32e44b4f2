"""The policy loss: GRPO with clip-higher and truncated importance sampling, summed over tokens.

For a token with log-probability `l` under the policy in training, `b` under the policy that decoded it, and
advantage `A`:

    rho = exp(l - b)                                                    ratio to the behaviour policy
    t   = rho * sg(min(1, C / rho))                                     value min(rho, C), gradient t * grad l
    L   = -min(t * A, clip(t, 1 - eps_low, 1 + eps_high) * A)

`sg` stops the gradient. `b` is what the generator itself reported for that very token under the version it
had then. It is never recomputed here: a ratio between two forward passes of the learner is 1 by construction,
and clipping it would do nothing about stale samples.

Where the gradient is nonzero: for A > 0 while t < 1 + eps_high, for A < 0 while t > 1 - eps_low. In the second
case nothing else bounds the ratio, which is what C is for.

The sum over tokens is returned; the optimiser step divides once by all of its tokens. So every token weighs
the same however long its sample is, and however the step was split into micro-batches.

Sources: surrogate PPO (arXiv 1707.06347), group form GRPO (2402.03300), eps_high > eps_low and the token-level
sum DAPO (2503.14476), truncated weights against the sampler IMPALA (1802.01561) and "TIS" (Yao et al., 2025).
"""

import math

import torch
from torch import Tensor

from darts_async.learner.tally import Tally


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    on_policy: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    truncate_ratio: float,
) -> tuple[Tensor, Tally]:
    """The loss summed over tokens, and what it did.

    Args: all [num_tokens]; `on_policy` is True where the version in training also decoded the token (lag 0).
    `clip_low`, `clip_high` and `truncate_ratio` are eps_low, eps_high and C of the formula.
    Returns: a scalar to differentiate, and metrics without gradient.
    """
    log_ratio = logprobs - behaviour_logprobs.detach()
    # In log space, because rho * (C / rho) is inf * 0 where exp overflows.
    excess = (log_ratio.detach() - math.log(truncate_ratio)).clamp(min=0)
    ratio = torch.exp(log_ratio - excess)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    tally = _ratio_metrics(log_ratio.detach(), on_policy)
    with torch.no_grad():
        tally.mean("truncated_share", excess > 0)
        tally.mean("clip_share_high", (advantages > 0) & (ratio > 1 + clip_high))
        tally.mean("clip_share_low", (advantages < 0) & (ratio < 1 - clip_low))
    return loss, tally


def _ratio_metrics(log_ratio: Tensor, on_policy: Tensor) -> Tally:
    """Distance between the two policies; `ratio` is before truncation, capped at e^20 to stay finite.

    `approx_kl` estimates KL(behaviour || policy) per token by `rho - 1 - log rho`, which is never negative
    (Schulman, "Approximating KL divergence", 2020). `gap` is |l - b|: at lag 0 it can only come from the engine
    and the learner computing differently, which is a fault of its own, and is therefore kept apart.
    """
    tally = Tally()
    bounded = log_ratio.clamp(max=20)
    ratio = bounded.exp()
    tally.mean("ratio_mean", ratio)
    tally.maximum("ratio_max", ratio)
    tally.mean("approx_kl", ratio - 1 - bounded)
    for name, tokens in (("gap_lag0", on_policy), ("gap_older", ~on_policy)):
        gap = log_ratio[tokens].abs()
        tally.mean(f"{name}_mean", gap)
        tally.maximum(f"{name}_max", gap)
    return tally
