"""The kinds of loss: functions of `LossInputs`, each named by `learner.loss.kind`, and one of the user's is another.

A loss returns a number per token and metrics per token. What surrounds it is the same for all of them: shares and
denominator (`aggregation`), the divergence from a reference and the entropy bonus (`policy`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from darts_async.config import LossConfig
from darts_async.errors import ExtensionError
from darts_async.extensions import LOSS, load
from darts_async.learner.losses import surrogates
from darts_async.learner.losses.importance import importance_mask, importance_weights
from darts_async.learner.packing.sequences import Sequences

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
    """`dapo`, `grpo`, `dr_grpo`: see `surrogates.clipped`."""
    config = inputs.config
    cap = config.importance_high if config.importance == "token_truncate" else None
    return _masked(inputs, *surrogates.clipped(inputs.log_ratio, inputs.advantages, cap=cap, **inputs.clips))


def gspo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """See `surrogates.gspo`."""
    found = surrogates.gspo(
        inputs.log_ratio, inputs.advantages, inputs.sequences, trained=inputs.counted, **inputs.clips
    )
    return _masked(inputs, *found)


def cispo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """See `surrogates.cispo`."""
    clip_high = inputs.clips["clip_high"]
    return _masked(inputs, *surrogates.cispo(inputs.log_ratio, inputs.logprobs, inputs.advantages, clip_high=clip_high))


def decoupled_ppo(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """See `surrogates.decoupled_ppo`."""
    assert inputs.config.proximal is not None, "the configuration requires it"
    behaviour = inputs.behaviour_logprobs
    proximal = surrogates.proximal_logprobs(inputs.logprobs, behaviour, inputs.staleness, inputs.config.proximal)
    weights, bounded = importance_weights(proximal - behaviour, inputs.sequences, inputs.config)
    loss, metrics = surrogates.decoupled_ppo(inputs.logprobs, proximal, inputs.advantages, weights, **inputs.clips)
    return loss, metrics | bounded


def reinforce(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """See `surrogates.reinforce`."""
    weights, metrics = importance_weights(inputs.log_ratio, inputs.sequences, inputs.config)
    return surrogates.reinforce(inputs.logprobs, inputs.advantages, weights), metrics


def _masked(inputs: LossInputs, loss: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
    kept, masked = importance_mask(inputs.log_ratio, inputs.sequences, inputs.config)
    return (loss if kept is None else loss * kept), metrics | masked


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
