"""The complete loss of a packed batch: surrogate, bounds on the ratio, divergence from a reference, entropy bonus."""

from torch import Tensor

from darts_async.config import LossConfig
from darts_async.learner.logprobs import Scores
from darts_async.learner.losses.importance import importance_mask, importance_weights
from darts_async.learner.losses.ratios import ratio_metrics
from darts_async.learner.losses.surrogates import (
    cispo,
    clipped,
    decoupled_ppo,
    gspo,
    proximal_logprobs,
    reinforce,
    truncated_ratio,
)
from darts_async.learner.metric_sums import Tally
from darts_async.learner.packing.batch import PackedBatch


def policy_loss(
    scores: Scores,
    batch: PackedBatch,
    config: LossConfig,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, Tally]:
    """The sum over tokens of share times loss, a scalar to differentiate, and what the loss did.

    Args: all [num_tokens]; the entropy needs a gradient only if it has a weight, `reference_logprobs` is given if the
    divergence has one. The parts of the loss are in the tally as sums, with a count of 0: the caller knows the
    denominator and adds it.

    A sample's inclusion weight multiplies all of its terms. The advantages hold it already.
    """
    logprobs, entropy = scores.logprobs, scores.entropy
    per_token, tally = _surrogate(logprobs, batch, config)
    tally.merge(ratio_metrics((logprobs - batch.behaviour_logprobs).detach(), batch.on_policy))
    tally.mean("entropy", entropy.detach())
    parts = {"loss_policy": per_token}
    if config.kl_weight:
        assert reference_logprobs is not None, "a weighted divergence needs the reference's log-probabilities"
        divergence = reference_kl(scores.whole, reference_logprobs)
        tally.mean("reference_kl", divergence.detach())
        if config.kl_unbiased:
            cap = config.importance_high if config.importance == "token_truncate" else None
            divergence = truncated_ratio(logprobs - batch.behaviour_logprobs, cap) * divergence
        parts["loss_kl"] = config.kl_weight * batch.weights * divergence
    if config.entropy_weight:
        parts["loss_entropy"] = -config.entropy_weight * batch.weights * entropy
    sums = {name: (batch.shares * part).sum() for name, part in parts.items()}
    loss = sum(sums.values(), start=logprobs.new_zeros(()))
    for name, value in {**sums, "loss": loss}.items():
        tally.add(name, value.item(), 0)
    return loss, tally


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


def _surrogate(logprobs: Tensor, batch: PackedBatch, config: LossConfig) -> tuple[Tensor, Tally]:
    behaviour, advantages = batch.behaviour_logprobs, batch.advantages
    log_ratio = logprobs - behaviour
    clips = {"clip_low": config.clip_low or 0.0, "clip_high": config.clip_high or 0.0}
    if config.kind == "reinforce":
        weights, tally = importance_weights(log_ratio, batch.sequences, config)
        return reinforce(logprobs, advantages, weights), tally
    if config.kind == "decoupled_ppo":
        assert config.proximal is not None
        proximal = proximal_logprobs(logprobs, behaviour, batch.staleness, config.proximal)
        weights, bounded = importance_weights(proximal - behaviour, batch.sequences, config)
        loss, tally = decoupled_ppo(logprobs, proximal, advantages, weights, **clips)
        tally.merge(bounded)
        return loss, tally
    if config.kind == "gspo":
        loss, tally = gspo(log_ratio, advantages, batch.sequences, trained=batch.shares > 0, **clips)
    elif config.kind == "cispo":
        loss, tally = cispo(log_ratio, logprobs, advantages, clip_high=clips["clip_high"])
    else:
        cap = config.importance_high if config.importance == "token_truncate" else None
        loss, tally = clipped(log_ratio, advantages, cap=cap, **clips)
    kept, masked = importance_mask(log_ratio, batch.sequences, config)
    tally.merge(masked)
    return (loss if kept is None else loss * kept), tally
