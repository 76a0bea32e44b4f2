"""Measures how far the trained policy is from the one that decoded, independently of the loss."""

from torch import Tensor

from darts_async.learner.logprobs import Scores
from darts_async.learner.losses.surrogates import LARGEST_LOG_RATIO
from darts_async.learner.metric_sums import Tally


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


def truncation_metrics(scores: Scores, on_policy: Tensor) -> Tally:
    """What truncated sampling keeps, where it is on; nothing elsewhere. `on_policy` [num_tokens].

    `kept_weight` is the share of the whole distribution that the kept tokens have, on average over positions.
    `outside_truncation_lag0` is the share of fresh tokens that the learner's truncation would not have kept: engine and
    learner round differently at its edge. For older ones it tells how far the edge has moved since.
    """
    tally = Tally()
    if scores.outside is not None:
        tally.mean("kept_weight", (scores.whole - scores.logprobs).detach().exp())
        tally.mean("outside_truncation_lag0", scores.outside[on_policy])
        tally.mean("outside_truncation_older", scores.outside[~on_policy])
    return tally
