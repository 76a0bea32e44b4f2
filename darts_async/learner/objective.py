"""Adds groups to the gradient: advantages, packed forward and backward passes, metrics.

Gradients are sums over tokens, not means: `Trainer` divides once per step, by the sum of `denominator`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.advantage import Decoded, trained_advantages
from darts_async.config import Baseline, LearnerConfig
from darts_async.errors import ModelError
from darts_async.extensions import LOSS, load
from darts_async.learner.flops import ModelFlops, utilisation
from darts_async.learner.lora import adapters_off, has_adapters
from darts_async.learner.losses.aggregation import denominator, token_shares
from darts_async.learner.losses.policy import policy_loss
from darts_async.learner.metric_sums import Tally
from darts_async.learner.model import checkpoint_activations, response_scores
from darts_async.learner.packing.batch import PackedBatch, Weighted, micro_batches
from darts_async.learner.ranks.rank_info import ALONE, RankInfo
from darts_async.protocol import TrainGroup
from darts_async.truncation import WHOLE, Truncation


@dataclass(eq=False)
class Objective:
    """What is maximised. It changes no parameter.

    All ranks are given the same groups, and each makes the passes of its own samples. Raises `ModelError` if the
    reference has another vocabulary, or if activations cannot be checkpointed, and `ExtensionError` if the loss cannot
    be loaded.
    """

    model: PreTrainedModel
    config: LearnerConfig
    _: KW_ONLY
    temperature: float
    """Of sampling, as `truncation` and `max_new_tokens`."""
    truncation: Truncation = WHOLE
    max_new_tokens: int
    baseline: Baseline
    decoded: Decoded | None = None
    """For `trained_advantages`."""
    reference: PreTrainedModel | None = None
    """For a loss with a `kl_weight`. A model with adapters needs none: without them it is the reference itself."""
    rank_info: RankInfo = ALONE

    def __post_init__(self) -> None:
        model, reference, config = self.model, self.reference, self.config
        assert not config.loss.kl_weight or reference is not None or has_adapters(model), "divergence from what?"
        if reference is not None:
            _check_reference(reference, model)
        self._loss = load(LOSS, config.loss.kind)
        self._device = next(model.parameters()).device
        self._shares_prompts = config.share_prompts and all(each.shares_prompts for each in (model, reference) if each)
        self._flops = ModelFlops.of(model)
        self._num_flops = 0
        if config.activation_checkpointing:
            checkpoint_activations(model)

    def denominator(self, group: TrainGroup) -> float:
        """What the group adds, with all ranks, to the number that the step's gradient is divided by; it may be 0."""
        return denominator(group, self.config.loss, self.max_new_tokens)

    def before_update(self) -> None:
        """All groups of a step have been seen, and the optimiser is about to change the parameters."""

    def take_utilisation(self, busy_s: float) -> dict[str, float]:
        """What this rank computed since the last call, in `busy_s`: see `flops.utilisation`. Empty for models whose
        operations are not counted."""
        num_flops, self._num_flops = self._num_flops, 0
        return {} if self._flops is None else utilisation(num_flops, busy_s, self._device)

    def backward(self, groups: Sequence[TrainGroup], collect: Callable[[], None]) -> Tally:
        """Add the gradient of this rank's samples to the parameters'; `collect` is called after each micro-batch's
        backward pass. The tallies of all ranks add up to that of the groups."""
        weighted = [self._weighted(group) for group in groups]
        tally = Tally()
        # About half of all groups have equal rewards: their gradient is exactly zero and only metrics are wanted.
        for has_gradient in (True, False):
            for batch in micro_batches(
                [each for each in weighted if self._has_gradient(each) == has_gradient],
                self.config.tokens_per_micro_batch,
                share_prompts=self._shares_prompts,
                rank_info=self.rank_info,
            ):
                found = self._pass(batch.to(self._device), has_gradient, collect)
                if not batch.idle:
                    tally.merge(found)
                    self._count(batch, has_gradient)
        if self.rank_info.rank == 0:
            for each in weighted:
                tally.merge(_group_metrics(each))
            count = sum(self.denominator(group) for group in groups)
            for name in [name for name in tally.sums if name.startswith("loss")]:
                tally.add(name, 0.0, count)
        return tally

    def _weighted(self, group: TrainGroup) -> Weighted:
        loss = self.config.loss
        advantages = trained_advantages(group, loss, self.max_new_tokens, baseline=self.baseline, decoded=self.decoded)
        return Weighted(group, advantages, token_shares(group, loss, self.max_new_tokens))

    def _has_gradient(self, weighted: Weighted) -> bool:
        loss = self.config.loss
        regularised = loss.kl_weight > 0 or loss.entropy_weight > 0
        has_advantage = np.repeat(weighted.advantages != 0, weighted.group.num_tokens)
        return bool((weighted.shares * (has_advantage | regularised)).any())

    def _pass(self, batch: PackedBatch, has_gradient: bool, collect: Callable[[], None]) -> Tally:
        config = self.config.loss
        reference_logprobs = self._reference_logprobs(batch) if config.kl_weight else None
        with torch.set_grad_enabled(has_gradient):
            scores = response_scores(
                self.model, batch, self.temperature, self.truncation, entropy_gradient=config.entropy_weight > 0
            )
            loss, tally = policy_loss(self._loss, scores, batch, config, reference_logprobs)
        if has_gradient:
            loss.backward()  # type: ignore[no-untyped-call]
            collect()
        return tally

    def _count(self, batch: PackedBatch, has_gradient: bool) -> None:
        if self._flops is not None:
            count = self._flops.training if has_gradient else self._flops.forward
            self._num_flops += count(batch.trees, len(batch.targets))

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor:
        if self.reference is not None:
            return response_scores(self.reference, batch, self.temperature).logprobs
        with adapters_off(self.model):
            return response_scores(self.model, batch, self.temperature).logprobs


class ScriptedObjective(Objective):
    """Sleeps where `Objective` computes, as long as accelerators would: for benchmarks of everything else on a machine
    without any. `LearnerScriptConfig` has the times. Groups, steps, versions, broadcasts and checkpoints are real; the
    gradient is zero, so the model does not change."""

    def before_update(self) -> None:
        """The optimiser step of a large model."""
        assert self.config.script is not None
        time.sleep(self.config.script.step_s)

    def take_utilisation(self, busy_s: float) -> dict[str, float]:
        return {}

    def _pass(self, batch: PackedBatch, has_gradient: bool, collect: Callable[[], None]) -> Tally:
        """Takes as long for groups with equal rewards, which would need no gradient: rewards mean nothing here. A rank
        has its share of the tokens, and the ranks sleep at the same time."""
        assert self.config.script is not None
        if not batch.idle:
            time.sleep(self.config.script.token_s * len(batch.targets) * self.rank_info.num_ranks)
        return Tally()


def _check_reference(reference: PreTrainedModel, model: PreTrainedModel) -> None:
    theirs, ours = (len(each.get_output_embeddings().weight) for each in (reference, model))
    if theirs != ours:
        raise ModelError(
            f"the reference model (learner.loss.reference_path) has a vocabulary of {theirs} rows, but the model in "
            f"training has {ours}; the divergence needs two models with one tokenizer"
        )


def _group_metrics(weighted: Weighted) -> Tally:
    """What is known before the forward pass. After a restart from an older checkpoint replayed tokens may have a later
    version than the step; their staleness counts as 0."""
    group, advantages, shares = weighted.group, weighted.advantages, weighted.shares
    tally = Tally()
    staleness = torch.from_numpy(group.step - group.versions).clamp(min=0).float()
    tally.mean("staleness_mean", staleness)
    tally.maximum("staleness_max", staleness)
    tally.mean("reward_mean", torch.tensor(group.rewards))
    tally.mean("advantage_abs_mean", torch.from_numpy(np.abs(advantages)))
    # Below zero: longer samples did worse, and the step makes responses shorter.
    tally.mean("advantage_token_mean", torch.from_numpy(np.repeat(advantages, group.num_tokens)))
    tally.mean("zero_advantage_share", torch.tensor([not advantages.any()]))
    tally.mean("left_out_share", torch.from_numpy(shares == 0))
    return tally
