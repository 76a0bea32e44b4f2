"""The packed forward pass of a model: its arguments, and its outputs at the requested positions."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.errors import ModelError
from darts_async.learner.packing.packed_attention import PACKED_ATTENTION, packing
from darts_async.learner.packing.tree import Tree

PackedRow = tuple[Tensor, Tensor, tuple[Tree, ...], Tensor]
"""Token ids, positions, layout, and the places whose logits are wanted."""


def packed_row(parts: list[Tensor], trees: tuple[Tree, ...]) -> PackedRow:
    """The row of these tokens, laid out in trees, with all places."""
    input_ids = torch.cat(parts)
    positions = [position for tree in trees for position in tree.positions()]
    places = torch.arange(len(input_ids), device=input_ids.device)
    return input_ids, torch.tensor(positions, device=input_ids.device), trees, places


def set_packed_attention(model: PreTrainedModel) -> None:
    """Raises `ModelError` if the model computes its attention itself."""
    model.set_attn_implementation(PACKED_ATTENTION)
    if model.config._attn_implementation != PACKED_ATTENTION:  # a warning is all transformers gives
        raise ModelError(f"{type(model).__name__} cannot be trained on packed sequences: its attention is built in")


def packed_hidden(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, trees: tuple[Tree, ...], places: Tensor
) -> Tensor:
    """What the head sees, [num_places, hidden_size], of the packed row `input_ids` [num_packed_tokens]."""
    layout = packing(trees, input_ids.device)
    output = model.base_model(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, **layout)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden[places]


def packed_logits(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, trees: tuple[Tree, ...], places: Tensor
) -> Tensor:
    """Logits [num_places, vocabulary] of the packed row `input_ids` [num_packed_tokens]."""
    options = {"use_cache": False, "logits_to_keep": places, **packing(trees, input_ids.device)}
    logits: Tensor = model(input_ids=input_ids[None], position_ids=position_ids[None], **options).logits[0]
    return logits
