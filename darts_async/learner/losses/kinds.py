"""The kinds of loss: functions of `LossInputs`, each named by `learner.loss.kind`, and one of the user's is another.

A loss returns a number per token and metrics. What surrounds it is the same for all of them: shares and denominator
(`aggregation`), the divergence from a reference and the entropy bonus (`policy`).

Bounds on the ratio to the behaviour policy. Truncation, `min(w, C)`: IMPALA (arXiv 1802.01561), for the gap between
engine and trainer "TIS" (Yao et al., 2025). Mask, `w if low <= w <= high else 0`: IcePop (Ring-1T, arXiv 2510.18855),
where low and high are 0.5 and 5. The ratio of a sequence is the product over its tokens, the unbiased weight of a whole
sample. Ratios beyond e^20 count as e^20.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from darts_async.config import LossConfig
from darts_async.errors import ExtensionError
from darts_async.extensions import LOSS, load
from darts_async.learner.packing.sequences import Sequences

LARGEST_LOG_RATIO = 20.0
"""Of any ratio, so that inf * 0 never happens."""

Metrics = dict[str, Tensor]
"""Any number of values by name; the step reports the mean over all that its passes gave."""
Loss = Callable[..., tuple[Tensor, Metrics]]
"""Called as `loss(inputs=LossInputs)`. Returns the loss of each token, [num_tokens], and metrics."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss sees of a packed batch. All tensors are [num_tokens], and float32 where nothing else is said.

    Example:
        >>> def weighted_regression(inputs: LossInputs) -> tuple[Tensor, Metrics]:
        ...     weights = inputs.advantages.exp().clamp(max=20.0)
        ...     return -weights * inputs.logprobs, {"regression_weight": weights}
    """

    logprobs: Tensor
    """l: log-probabilities under the policy in training. The only input with a gradient."""
    behaviour_logprobs: Tensor
    """b: log-probabilities under the policy that decoded the token, as the generator reported them."""
    advantages: Tensor
    """A: the advantage of the token's sample, times the inclusion weight of that."""
    staleness: Tensor
    """Versions between the one that decoded the token and the one in training, >= 0."""
    counted: Tensor
    """bool: whether the token is in the loss. What is returned for another one has no effect."""
    sequences: Sequences
    """Sums and means over the tokens of each sample."""
    config: LossConfig
    """The settings of `learner.loss`."""

    @property
    def log_ratio(self) -> Tensor:
        """l - b, with a gradient."""
        return self.logprobs - self.behaviour_logprobs

    @property
    def clips(self) -> dict[str, float]:
        """`clip_low` and `clip_high`; 0 where they are not set."""
        return {"clip_low": self.config.clip_low or 0.0, "clip_high": self.config.clip_high or 0.0}


def clipped(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of GRPO, DAPO and Dr.GRPO, which differ in clips, advantages and what it is divided by.

        t = truncated_ratio(rho, cap)
        L = -min(t A, clip(t, 1 - clip_low, 1 + clip_high) A)

    The gradient is nonzero for A > 0 while t < 1 + clip_high, for A < 0 while t > 1 - clip_low. In the second case
    nothing else bounds the ratio, which is what `cap` is for.

    Sources: surrogate PPO (arXiv 1707.06347), group form GRPO (2402.03300), clip_high > clip_low DAPO (2503.14476),
    without deviation and lengths Dr.GRPO (2503.20783), truncation against the sampler IMPALA (1802.01561).
    """
    cap = cap_of(inputs.config)
    loss, metrics = _clip(truncated_ratio(inputs.log_ratio, cap), inputs)
    if cap is not None:
        metrics["truncated_share"] = inputs.log_ratio.detach() > math.log(cap)
    return _masked(inputs, loss, metrics)


def gspo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """GSPO (arXiv 2507.18071, equations 5 and 7): one ratio per sample, the geometric mean of its tokens' ratios.

        s_i = exp(mean over the tokens of sample i of (l - b)),   L = -min(s_i A, clip(s_i, 1 - eps, 1 + eps') A)

    Each token of the sample has the same value, so that their mean is the sample's loss. Tokens that are not counted
    are not in the mean: their gradient would come with that of the others.
    """
    mean = inputs.sequences.mean(inputs.log_ratio, inputs.counted)
    return _masked(inputs, *_clip(truncated_ratio(mean, None), inputs))


def cispo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): the weight is clipped, the gradient never.

        L = -sg(min(rho, 1 + clip_high)) A l

    As in the paper the weight has no lower bound.
    """
    log_ratio, limit = inputs.log_ratio.detach(), math.log1p(inputs.clips["clip_high"])
    loss = -log_ratio.clamp(max=limit).exp() * inputs.advantages * inputs.logprobs
    return _masked(inputs, loss, {"truncated_share": log_ratio > limit})


def decoupled_ppo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """Decoupled PPO (Hilton et al., arXiv 2110.00641; for language models AReaL, 2505.24298, equation 5).

    L = -sg(w) min(u A, clip(u, 1 - clip_low, 1 + clip_high) A),   u = exp(l - p),   w = exp(p - b), bounded
    """
    proximal = _proximal_logprobs(inputs)
    weights, bounded = _importance_weights(proximal - inputs.behaviour_logprobs, inputs)
    loss, metrics = _clip(truncated_ratio(inputs.logprobs - proximal, None), inputs)
    return weights * loss, metrics | bounded


def reinforce(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """The policy gradient (Williams, 1992) with an importance weight: L = -sg(w) A l.

    With leave-one-out baselines it is RLOO (arXiv 2402.14740), with w = min(rho, C) also V-trace's actor loss
    (IMPALA, 1802.01561).
    """
    weights, metrics = _importance_weights(inputs.log_ratio, inputs)
    return -weights * inputs.advantages * inputs.logprobs, metrics


def truncated_ratio(log_ratio: Tensor, cap: float | None) -> Tensor:
    """`rho * sg(min(1, cap / rho))`, [num_tokens]: its value is min(rho, cap), and its gradient that times grad l."""
    limit = LARGEST_LOG_RATIO if cap is None else math.log(cap)
    # In log space, because rho * (cap / rho) is inf * 0 where exp overflows.
    return torch.exp(log_ratio - (log_ratio.detach() - limit).clamp(min=0))


def cap_of(config: LossConfig) -> float | None:
    """The cap on the ratio of a token; None if there is none."""
    return config.importance_high if config.importance == "token_truncate" else None


def _clip(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
    advantages, low, high = inputs.advantages, 1 - inputs.clips["clip_low"], 1 + inputs.clips["clip_high"]
    metrics = {"clip_share_high": (advantages > 0) & (ratio > high), "clip_share_low": (advantages < 0) & (ratio < low)}
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages), metrics


def _proximal_logprobs(inputs: LossInputs) -> Tensor:
    """Log-probabilities under decoupled PPO's proximal policy, [num_tokens], without gradient.

    AReaL (arXiv 2505.24298) takes the parameters before the update as proximal policy. A step here is one update in
    one pass over its groups, so the policy in training is that of the step's start throughout.

    `step_start`: that policy, l itself. Then u is 1 and never clipped: what remains is `reinforce` with the weight w.
    `interpolated`: the policy one step earlier, which is gone. It is taken on the line between the two that are known,
    whose versions are equally far apart (A-3PO, arXiv 2512.06547): of d versions of staleness, d - 1 lie after it,
    `b + (l - b) (d - 1) / d`. A token of staleness 0 or 1 has its behaviour policy as proximal one. Then
    u = rho^(1/d): the clip bounds the change per version, the weight carries the rest.
    """
    assert inputs.config.proximal is not None, "the configuration requires it"
    current, behaviour = inputs.logprobs.detach(), inputs.behaviour_logprobs
    if inputs.config.proximal == "step_start":
        return current
    share = (inputs.staleness - 1).clamp(min=0) / inputs.staleness.clamp(min=1)
    return behaviour + (current - behaviour) * share


def _importance_weights(log_ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """The bounded weight of each token, [num_tokens], without gradient, and the share that was bounded."""
    config, log_weight = inputs.config, _at_level(log_ratio, inputs)
    if config.importance.endswith("mask"):
        kept = _inside(log_weight, config)
        return log_weight.clamp(max=LARGEST_LOG_RATIO).exp() * kept, {"masked_share": ~kept}
    limit = LARGEST_LOG_RATIO if config.importance_high is None else math.log(config.importance_high)
    return log_weight.clamp(max=limit).exp(), {"truncated_share": log_weight > limit}


def _masked(inputs: LossInputs, loss: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
    if not inputs.config.importance.endswith("mask"):
        return loss, metrics
    kept = _inside(_at_level(inputs.log_ratio, inputs), inputs.config)
    return loss * kept, metrics | {"masked_share": ~kept}


def _at_level(log_ratio: Tensor, inputs: LossInputs) -> Tensor:
    log_ratio = log_ratio.detach()
    return inputs.sequences.sum(log_ratio) if inputs.config.importance.startswith("sequence") else log_ratio


def _inside(log_weight: Tensor, config: LossConfig) -> Tensor:
    assert config.importance_low is not None
    assert config.importance_high is not None
    return (log_weight >= math.log(config.importance_low)) & (log_weight <= math.log(config.importance_high))


def evaluate(loss: Loss, inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """What the loss returns. Raises `ExtensionError` if that is of another form than it must be."""
    found, where = loss(inputs=inputs), f"learner.loss.kind {inputs.config.kind!r}"
    shape = inputs.logprobs.shape
    if not (isinstance(found, tuple) and len(found) == 2 and getattr(found[0], "shape", None) == shape):
        parts = found if isinstance(found, tuple) else (found,)
        told = ", ".join(str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
        raise ExtensionError(f"{where} must return (loss of each token {list(shape)}, metrics), and returned ({told})")
    for name, values in found[1].items():
        if not isinstance(values, Tensor) or name.startswith("loss"):
            raise ExtensionError(
                f"{where} has a metric {name!r} of type {type(values).__name__}; a metric is a tensor of any length, "
                "and names that begin with 'loss' are taken"
            )
    return found


def try_loss(config: LossConfig) -> None:
    """Evaluate the loss on two made-up samples.

    Raises:
        ExtensionError: it cannot be loaded, raises, returns something else than a loss, or has no gradient.
    """
    loss, where = load(LOSS, config.kind), f"learner.loss.kind {config.kind!r}"
    logprobs = torch.tensor([-0.5, -1.0, -2.0, -0.1, -0.7], requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        behaviour_logprobs=torch.tensor([-0.6, -1.0, -1.5, -0.2, -0.7]),
        advantages=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]),
        staleness=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]),
        counted=torch.ones(5, dtype=torch.bool),
        sequences=Sequences(torch.tensor([0, 0, 0, 1, 1]), 2),
        config=config,
    )
    try:
        per_token, _ = evaluate(loss, inputs)
    except ExtensionError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ExtensionError(f"{where} raised {type(error).__name__} on two made-up samples: {error}") from error
    if not per_token.requires_grad:
        raise ExtensionError(f"{where} has no gradient: make it depend on inputs.logprobs, and detach only the weights")
