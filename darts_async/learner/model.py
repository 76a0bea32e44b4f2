"""The model in training: a Hugging Face causal language model, and its packed forward pass.

Whether a model keeps packed sequences apart cannot be read off its class (state-space layers, say, run across
them), so `load_model` tries it out: packed logits must equal those of each sequence alone in the model's own
attention. A model that fails is refused, not trained on mixed samples.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from darts_async.errors import ModelError
from darts_async.learner.attention import PACKED_ATTENTION
from darts_async.learner.batch import PackedBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_PROBE_LENGTHS = (5, 3)
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of packed logits relative to the largest logit: room for rounding, none for another sample."""


def load_model(path: str, *, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """A causal LM with its trained head, ready for `response_logprobs`, in evaluation mode.

    Dropout stays off, because the ratio to the generator's probabilities would otherwise be noise at lag 0.
    Raises `ModelError` if there is no such model, it lacks weights, or it cannot be packed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    model, loading = _from_pretrained(path, DTYPES[dtype])
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {path} lack {missing[0]} (of {len(missing)} missing): a causal language model with "
            "its trained output head is needed"
        )
    model = model.to(device).eval()
    use_packed_attention(model)
    return model


def _from_pretrained(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local and not os.path.isdir(path):
        raise ModelError(f"model.path is {path}, but there is no such directory")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"model.path is {path}, but no causal language model can be loaded from it: {error}"
        ) from error
    return model, loading


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch the model to packed attention, after which only `response_logprobs` may call it.

    Raises `ModelError` if its sequences would not stay apart.
    """
    device = model.get_input_embeddings().weight.device
    sequences = [torch.arange(1, length + 1, device=device) for length in _PROBE_LENGTHS]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])
        _set_packed_attention(model)
        places = torch.arange(sum(_PROBE_LENGTHS), device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in _PROBE_LENGTHS])
        packed = _logits(model, torch.cat(sequences), positions, _PROBE_LENGTHS, places)
    difference = ((packed - alone).abs().max() / alone.abs().max()).item()
    if not difference <= _PROBE_TOLERANCE[alone.dtype]:
        raise ModelError(
            f"{type(model).__name__} cannot be trained on packed sequences: its logits differ from those of each "
            f"sequence alone by {difference:.1e} of the largest; its layers mix neighbours or ignore position_ids"
        )


def _set_packed_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation(PACKED_ATTENTION)
    if model.config._attn_implementation != PACKED_ATTENTION:  # a warning is all transformers gives
        raise ModelError(f"{type(model).__name__} cannot be trained on packed sequences: its attention is built in")


def response_logprobs(model: PreTrainedModel, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at `temperature`, and the entropy in nats there (without gradient).

    Returns: two float32 tensors [num_targets]. Logits are computed at the places of targets only.
    """
    logits = _logits(model, batch.input_ids, batch.position_ids, batch.lengths, batch.logit_places)
    scaled = logits.float() / temperature
    logprobs = -cross_entropy(scaled, batch.targets, reduction="none")
    with torch.no_grad():
        log_p = scaled.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logprobs, entropy


def _logits(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, lengths: tuple[int, ...], places: Tensor
) -> Tensor:
    """Logits [num_places, vocabulary] of the packed row `input_ids` [num_packed_tokens]."""
    output = model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        use_cache=False,
        logits_to_keep=places,
        sequence_lengths=lengths,
    )
    logits: Tensor = output.logits[0]
    return logits
