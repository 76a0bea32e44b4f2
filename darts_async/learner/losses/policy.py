"""The complete loss of a packed batch: surrogate, divergence from a reference, entropy bonus. And what is measured of
every loss alike: how far the trained policy is from the one that decoded."""

from torch import Tensor

from darts_async.config import LossConfig
from darts_async.learner.logprobs import Scores
from darts_async.learner.losses.kinds import LARGEST_LOG_RATIO, Loss, LossInputs, cap_of, evaluate, truncated_ratio
from darts_async.learner.metric_sums import Tally
from darts_async.learner.packing.batch import PackedBatch


def policy_loss(
    loss: Loss,
    scores: Scores,
    batch: PackedBatch,
    config: LossConfig,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, Tally]:
    """The sum over tokens of share times loss, a scalar to differentiate, and what the loss did.

    `loss` is that of `config.kind`; tensors are [num_tokens]. The entropy needs a gradient only if it has a weight;
    `reference_logprobs` are given if the divergence has one. The parts of the loss are in the tally as sums with a
    count of 0: the caller knows the denominator and adds it. A sample's inclusion weight multiplies all of its terms;
    the advantages hold it already.
    """
    logprobs, entropy = scores.logprobs, scores.entropy
    inputs = LossInputs(
        logprobs=logprobs,
        behaviour_logprobs=batch.behaviour_logprobs,
        advantages=batch.advantages,
        staleness=batch.staleness,
        counted=batch.shares > 0,
        sequences=batch.sequences,
        config=config,
    )
    per_token, metrics = evaluate(loss, inputs)
    tally = _measured(scores, inputs.log_ratio.detach(), batch.on_policy)
    for name, values in metrics.items():
        tally.mean(name, values.detach())
    tally.mean("entropy", entropy.detach())
    parts = {"loss_policy": per_token}
    if config.kl_weight:
        assert reference_logprobs is not None, "a weighted divergence needs the reference's log-probabilities"
        divergence = reference_kl(scores.whole, reference_logprobs)
        tally.mean("reference_kl", divergence.detach())
        if config.kl_unbiased:
            divergence = truncated_ratio(inputs.log_ratio, cap_of(config)) * divergence
        parts["loss_kl"] = config.kl_weight * batch.weights * divergence
    if config.entropy_weight:
        parts["loss_entropy"] = -config.entropy_weight * batch.weights * entropy
    sums = {name: (batch.shares * part).sum() for name, part in parts.items()}
    total = sum(sums.values(), start=logprobs.new_zeros(()))
    for name, value in {**sums, "loss": total}.items():
        tally.add(name, value.item(), 0)
    return total, tally


def reference_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The divergence from the reference per token, [num_tokens]: k3 = exp(r - l) - (r - l) - 1, never negative.

    Its mean over tokens of the policy in training is the divergence, but its gradient is not the divergence's, and the
    tokens are of the behaviour policy; times the ratio to that, as a function of l, both are right up to truncation.

    Both log-probabilities are those of whole distributions, also where sampling is truncated: the reference would keep
    other tokens, and between policies that keep different ones the divergence is infinite. Then the sum is over the
    kept tokens alone: never negative, and zero exactly where the two agree on these.

    Sources: Schulman, "Approximating KL divergence" (2020); in the loss of GRPO (arXiv 2402.03300, equation 4); times
    the ratio DeepSeek-V3.2 (2512.02556).
    """
    log_ratio = (reference_logprobs.detach() - logprobs).clamp(max=20)
    return log_ratio.exp() - log_ratio - 1


def _measured(scores: Scores, log_ratio: Tensor, on_policy: Tensor) -> Tally:
    """Ratios before any bound, gaps, and what truncated sampling keeps; tensors [num_tokens], without gradient.

    `approx_kl` estimates KL(behaviour || policy) per token by `rho - 1 - log rho`, which is never negative
    (Schulman, "Approximating KL divergence", 2020). `gap` is |l - b|: at lag 0 (`on_policy`) it can only come from
    the engine and the learner computing differently, which is a fault of its own, and is therefore kept apart.

    `kept_weight` is the share of the whole distribution that the kept tokens have, on average over positions.
    `outside_truncation_lag0` is the share of fresh tokens that the learner's truncation would not have kept: engine and
    learner round differently at its edge. For older ones it tells how far the edge has moved since.
    """
    tally = Tally()
    bounded = log_ratio.clamp(max=LARGEST_LOG_RATIO)
    ratio = bounded.exp()
    tally.mean("ratio_mean", ratio)
    tally.maximum("ratio_max", ratio)
    tally.quantiles("ratio", bounded)
    tally.mean("approx_kl", ratio - 1 - bounded)
    if scores.outside is not None:
        tally.mean("kept_weight", (scores.whole - scores.logprobs).detach().exp())
    for lag, tokens in (("lag0", on_policy), ("older", ~on_policy)):
        gap = log_ratio[tokens].abs()
        tally.mean(f"gap_{lag}_mean", gap)
        tally.maximum(f"gap_{lag}_max", gap)
        if scores.outside is not None:
            tally.mean(f"outside_truncation_{lag}", scores.outside[tokens])
    return tally
