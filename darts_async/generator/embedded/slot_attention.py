"""The KV cache in slots, and the attention function that reads and writes it.

The function enters a Hugging Face model through transformers' attention interface: the model computes queries, keys and
values of all tokens of a step, packed in one row, and this module does the rest. No mask function is registered under
its name, so the library builds no mask.

A step has first the prompts to prefill, one span after the other, then one token of each running sample, slot by slot.
A prefill attends to itself (causally); a decoded token attends to its slot in the cache, where its own key has just
been written. Keys are `[num_slots * num_kv_heads, max_context_tokens, head_dim]`: a batched matrix product takes the
first slots and positions as a view, without a copy, and its rows are the queries that share a key head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from darts_async.errors import ModelError

ATTENTION_NAME: Final = "darts_async_slots"
_UNSUPPORTED_ARGUMENTS: Final = ("softcap", "s_aux", "position_bias")


class SlotCache:
    """Keys and values of all layers. A layer is allocated when it first attends, with the shapes it has there."""

    def __init__(self, num_slots: int, max_context_tokens: int) -> None:
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Layers that have attended so far."""
        return len(self._layers)

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, for tensors like these, `[1, num_kv_heads, num_tokens, head_dim]`."""
        if index not in self._layers:
            self._layers[index] = (self._allocate(key), self._allocate(value))
        return self._layers[index]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of one slot to another."""
        for tensors in self._layers.values():
            for tensor in tensors:
                slots = tensor.view(self.num_slots, -1, *tensor.shape[1:])
                slots[target, :, :num_tokens] = slots[source, :, :num_tokens]

    def _allocate(self, like: Tensor) -> Tensor:
        num_kv_heads, head_dim = like.shape[1], like.shape[3]
        return like.new_zeros(self.num_slots * num_kv_heads, self.max_context_tokens, head_dim)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tokens to prefill, and the slots (one or more) that get their keys and values."""

    token_ids: NDArray[np.int64]  # [num_tokens], at positions 0..num_tokens-1
    slots: list[int]


@dataclass(slots=True)
class SlotStep:
    """One step's view of the cache: which rows it writes and how far it reads. Made once, used by every layer."""

    cache: SlotCache
    spans: list[tuple[int, int]]  # first and last + 1 token of each prefill
    cached: NDArray[np.int64]  # [num_decoding], tokens in the cache before this step
    slots: NDArray[np.int64]  # [num_writes], slot of each key that is written...
    positions: NDArray[np.int64]  # [num_writes], ...and its position...
    source: Tensor | None  # [num_writes], ...and which token's it is; None: tokens and writes are one to one
    _layouts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Write the new keys and values, then attend. `query` is `[1, num_heads, num_tokens, head_dim]`, `key` and
        `value` have `num_kv_heads`. The result is `[1, num_tokens, num_heads, head_dim]`."""
        keys, values = self.cache.layer(layer, key, value)
        rows, mask = self._layout(key)
        self._write(keys, key, rows)
        self._write(values, value, rows)
        parts = [
            scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
            ).transpose(1, 2)
            for a, b in self.spans
        ]
        parts.append(self._decode(query, keys, values, mask, scaling))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
        num_decoding = len(self.cached)
        num_rows, _, window = mask.shape
        num_heads, head_dim = query.shape[1], query.shape[3]
        last = query[0, :, -num_decoding:].transpose(0, 1).reshape(num_rows, -1, head_dim)
        scores = _scores(mask, last, keys[:num_rows, :window], scaling)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights, values[:num_rows, :window]).view(1, num_decoding, num_heads, -1)

    def _write(self, cached: Tensor, new: Tensor, rows: Tensor) -> None:
        tokens = new[0].transpose(0, 1)  # [num_tokens, num_kv_heads, head_dim]
        if self.source is not None:
            tokens = tokens.index_select(0, self.source)
        head_dim = cached.shape[2]
        cached.view(-1, head_dim).index_copy_(0, rows, tokens.reshape(-1, head_dim))

    def _layout(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Cache rows to write, `[num_writes * num_kv_heads]`; mask, `[num_decoding * num_kv_heads, 1, window]`."""
        num_kv_heads = key.shape[1]
        if num_kv_heads not in self._layouts:
            heads = self.slots[:, None] * num_kv_heads + np.arange(num_kv_heads)
            rows = heads * self.cache.max_context_tokens + self.positions[:, None]
            window = int(self.cached.max()) + 1
            hidden = np.arange(window) > self.cached.repeat(num_kv_heads)[:, None]
            mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0))).to(key.dtype)
            self._layouts[num_kv_heads] = (torch.from_numpy(rows.reshape(-1)), mask.unsqueeze(1))
        return self._layouts[num_kv_heads]


def _scores(mask: Tensor, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """`mask + scaling * queries @ keys^T`, `[num_rows, queries per key head, window]`.

    A product below float32 first copies operands that are not contiguous. Keys as the left operand are copied as they
    lie, and as the right one they are transposed meanwhile: 1.6 times the time of the attention at 64 slots of 120
    tokens. In float32 nothing is copied, and queries on the left are faster.
    """
    if keys.dtype == torch.float32:
        return torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling)
    return torch.baddbmm(mask.transpose(1, 2), keys, queries.transpose(1, 2), alpha=scaling).transpose(1, 2)


def make_step(cache: SlotCache, prefills: Sequence[Prefill], cached: NDArray[np.int64]) -> SlotStep:
    """Lay out a step: prefills first, then the next token of slots 0..num_decoding-1, which have `cached` tokens."""
    lengths = [len(prefill.token_ids) for prefill in prefills]
    ends = np.cumsum([0, *lengths])
    num_decoding = len(cached)
    spans = [(int(a), int(b)) for a, b in pairwise(ends)]
    slots, positions, source = [np.arange(num_decoding)], [cached], [np.arange(num_decoding) + ends[-1]]
    for prefill, start, length in zip(prefills, ends[:-1], lengths, strict=True):
        for slot in prefill.slots:
            slots.append(np.full(length, slot))
            positions.append(np.arange(length))
            source.append(np.arange(start, start + length))
    return SlotStep(
        cache=cache,
        spans=spans,
        cached=cached,
        slots=np.concatenate(slots),
        positions=np.concatenate(positions),
        source=torch.from_numpy(np.concatenate(source)) if prefills else None,
    )


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_step: SlotStep | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that the attention interface calls. Raises `ModelError` for unsupported kinds of attention."""
    if slot_step is None:
        raise ModelError("the model does not hand keyword arguments through to its attention layers")
    if attention_mask is not None:
        raise ModelError(f"{type(module).__name__} makes a mask of its own, which the embedded engine does not apply")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ModelError(f"{type(module).__name__} does not know its layer_idx")
    if layer >= slot_step.cache.num_layers:
        _check_options(module, options, slot_step.cache.max_context_tokens)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slot_step.attend(layer, query, key, value, scaling), None


def _check_options(module: torch.nn.Module, options: dict[str, Any], max_context_tokens: int) -> None:
    name = type(module).__name__
    for option in _UNSUPPORTED_ARGUMENTS:
        if options.get(option) is not None:
            raise ModelError(f"{name} uses {option} in its attention, which the embedded engine does not have")
    window = options.get("sliding_window")
    if window is not None and window < max_context_tokens:
        raise ModelError(
            f"{name} has a sliding window of {window} tokens, which the embedded engine does not have; "
            f"lower max_context_tokens ({max_context_tokens}) to {window}"
        )
