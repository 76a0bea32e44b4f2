"""Computes the learner's answers to the prompts of a probe (see `darts_async.weights.probe`)."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.learner.packing.packed_attention import packing
from darts_async.learner.packing.tree import Tree
from darts_async.weights.probe import Reference, reference_of


def packed_reference(model: PreTrainedModel, policy_version: int) -> Reference:
    """The reference of a model with packed attention, whose weights are those of `policy_version`."""

    def last_logits(prompts: Tensor) -> Tensor:
        num_prompts, length = prompts.shape
        device = model.device
        logits: Tensor = model(
            input_ids=prompts.reshape(1, -1).to(device),
            position_ids=torch.arange(length, device=device).repeat(num_prompts)[None],
            use_cache=False,
            logits_to_keep=torch.arange(length - 1, num_prompts * length, length, device=device),
            **packing((Tree(length),) * num_prompts, device),
        ).logits
        return logits[0]

    return reference_of(last_logits, policy_version, vocab_size=model.config.vocab_size)
