"""How far the policy in training is from the one that decoded, whatever the loss makes of it."""

from torch import Tensor

from darts_async.learner.losses.surrogates import LARGEST_LOG_RATIO
from darts_async.learner.tally import Tally


def ratio_metrics(log_ratio: Tensor, on_policy: Tensor) -> Tally:
    """Ratios before any bound, and gaps; both arguments [num_tokens], without gradient.

    `approx_kl` estimates KL(behaviour || policy) per token by `rho - 1 - log rho`, which is never negative
    (Schulman, "Approximating KL divergence", 2020). `gap` is |l - b|: at lag 0 (`on_policy`) it can only come from
    the engine and the learner computing differently, which is a fault of its own, and is therefore kept apart.
    """
    tally = Tally()
    bounded = log_ratio.clamp(max=LARGEST_LOG_RATIO)
    ratio = bounded.exp()
    tally.mean("ratio_mean", ratio)
    tally.maximum("ratio_max", ratio)
    tally.quantiles("ratio", bounded)
    tally.mean("approx_kl", ratio - 1 - bounded)
    for name, tokens in (("gap_lag0", on_policy), ("gap_older", ~on_policy)):
        gap = log_ratio[tokens].abs()
        tally.mean(f"{name}_mean", gap)
        tally.maximum(f"{name}_max", gap)
    return tally
