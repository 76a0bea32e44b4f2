"""Attention inside each packed sequence and never across, for any model on transformers' attention registry.

No mask exists, so the work is the sum of the squared lengths. A block-diagonal mask costs the square of the sum: at 8k
packed tokens of mean length 48 the whole training pass of a small model was 20 times slower on one CPU core.

On a GPU with 16-bit weights one kernel (flash attention with cumulative lengths) attends to all sequences; there the
lengths are used as a tensor only, so that a compiled layer fits every batch. Elsewhere they are cut out of the packed
row and attended to one at a time. Padding sequences of similar length into batches instead was within 6 % of this loop
either way on a CPU, for much more code.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from darts_async.errors import ModelError

PACKED_ATTENTION = "darts_packed"
"""Name in the registry, for `set_attn_implementation`."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_KERNEL_HEAD_SIZE = 256


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...] | None = None,
    sequence_ends: Tensor | None = None,
    longest_sequence: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of `sequence_lengths`, which sum to `num_tokens`.

    Args: query [1, num_heads, num_tokens, head_size]; key and value [1, num_key_value_heads, ...]. The lengths come as
    `packing` gives them.
    Returns: [1, num_tokens, num_heads, head_size]. Raises `ModelError` for variants it does not compute.
    """
    if sequence_ends is None or attention_mask is not None:
        raise ModelError(f"{type(module).__name__} was not given sequence_lengths, or was given a mask; it cannot pack")
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} uses attention with {name}, which packing does not support")
    if dropout:
        raise ModelError(f"{type(module).__name__} uses attention with dropout {dropout}; it is not in evaluation mode")
    if _has_kernel(query):
        output = _attend_in_one_kernel(query, key, value, sequence_ends, longest_sequence, scaling, sliding_window)
        return output, None
    assert sequence_lengths is not None
    return _attend_one_by_one(query, key, value, sequence_lengths, scaling, sliding_window), None


def packing(sequence_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What a model with this attention has to be called with besides tokens and positions."""
    return {
        "sequence_lengths": sequence_lengths,
        "sequence_ends": torch.tensor([0, *accumulate(sequence_lengths)], dtype=torch.int32, device=device),
        "longest_sequence": max(sequence_lengths),
    }


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in _KERNEL_DTYPES and query.shape[-1] <= _KERNEL_HEAD_SIZE


def _attend_in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [num_tokens, heads, head_size]
    # The kernel counts the keys to the left of the query, `window` counts the query's own too.
    output = varlen_attn(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    outputs = []
    for q, k, v in zip(*(torch.split(heads, list(lengths), dim=2) for heads in (query, key, value)), strict=True):
        band = _band(q.shape[2], window, q.device)
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys a query sees if the window is shorter than the sequence: [length, length], else None."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
