"""A group's contribution to the gradient: advantages, packed forward and backward passes, metrics.

Gradients are sums over tokens, not means: `Trainer` divides once per step.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.config import Baseline, LearnerConfig
from darts_async.learner.advantage import group_advantages
from darts_async.learner.batch import PackedBatch, micro_batches
from darts_async.learner.loss import policy_loss
from darts_async.learner.model import response_logprobs
from darts_async.learner.tally import Tally
from darts_async.protocol import TrainGroup


class Objective:
    """What is maximised. It changes no parameter."""

    def __init__(
        self, model: PreTrainedModel, config: LearnerConfig, *, temperature: float, baseline: Baseline
    ) -> None:
        self._model = model
        self._config = config
        self._temperature = temperature
        self._baseline = baseline
        self._device = next(model.parameters()).device

    def backward(self, group: TrainGroup, collect: Callable[[], None]) -> Tally:
        """Add the group's gradient to the parameters'; `collect` is called after each micro-batch's backward pass."""
        advantages = group_advantages(
            group.rewards,
            group.weights,
            normalise=self._config.normalise_advantage,
            baseline=self._baseline,
            pass_rate=group.baseline,
        )
        tally = _group_metrics(group, torch.from_numpy(advantages))
        for batch in micro_batches(group, advantages, self._config.tokens_per_micro_batch):
            tally.merge(self._backward_batch(batch.to(self._device), collect))
        return tally

    def _backward_batch(self, batch: PackedBatch, collect: Callable[[], None]) -> Tally:
        # About half of all groups have equal rewards: their gradient is exactly zero and only metrics are wanted.
        has_gradient = bool(batch.advantages.any())
        with torch.set_grad_enabled(has_gradient):
            logprobs, entropy = response_logprobs(self._model, batch, self._temperature)
            loss, tally = policy_loss(
                logprobs,
                batch.behaviour_logprobs,
                batch.advantages,
                batch.on_policy,
                clip_low=self._config.clip_low,
                clip_high=self._config.clip_high,
                truncate_ratio=self._config.truncate_ratio,
            )
        if has_gradient:
            loss.backward()  # type: ignore[no-untyped-call]
            collect()
        tally.mean("entropy", entropy)
        tally.add("loss", loss.item(), len(batch.targets))
        return tally


def _group_metrics(group: TrainGroup, advantages: Tensor) -> Tally:
    """What is known before the forward pass. After a restart from an older checkpoint replayed tokens may carry a
    later version than the step has; they count as staleness 0 (and not as on-policy)."""
    tally = Tally()
    staleness = torch.from_numpy(group.step - group.versions).clamp(min=0).float()
    tally.mean("staleness_mean", staleness)
    tally.maximum("staleness_max", staleness)
    tally.mean("reward_mean", torch.tensor(group.rewards))
    tally.mean("advantage_abs_mean", advantages.abs())
    # Below zero: longer samples did worse, and the step makes responses shorter.
    tally.mean("advantage_token_mean", advantages.repeat_interleave(torch.tensor(group.num_tokens)))
    tally.mean("zero_advantage_share", ~advantages.any()[None])
    return tally
