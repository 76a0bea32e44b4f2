"""Attention within each tree of a packed row (see `tree`), for any model on transformers' attention registry.

There is no mask of the row, so the work is that of the samples one by one. A block-diagonal mask costs the square of
the row: at 8k packed tokens of mean length 48 a training pass of a small model was 20 times slower on one CPU core.

On a GPU with 16-bit weights one kernel (flash attention with cumulative lengths) attends to all trunks and branches;
the keys of a trunk are repeated before those of each of its branches. The layout is given as tensors only, so that a
compiled layer fits every batch. Elsewhere trees are cut out of the row and attended to one at a time, short branches
together. Padding sequences of similar length into batches instead was within 6 % of this loop on a CPU, for much more
code.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from darts_async.errors import ModelError
from darts_async.learner.packing.tree import Tree

PACKED_ATTENTION = "darts_packed"
"""Name in the registry, for `set_attn_implementation`."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_KERNEL_HEAD_SIZE = 256
_TOGETHER = 128
"""Tokens of branches that are attended to at once with a mask: calls cost more than pairs do, up to about there."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    runs: "Runs | None" = None,
    query_ends: Tensor | None = None,
    key_ends: Tensor | None = None,
    key_places: Tensor | None = None,
    longest_query: int = 0,
    longest_key: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each tree of the row, whose layout `packing` gives.

    Query [1, num_heads, num_tokens, head_size]; key and value [1, num_key_value_heads, ...]; returns
    [1, num_tokens, num_heads, head_size]. Raises `ModelError` for variants that it does not compute.
    """
    if query_ends is None or attention_mask is not None:
        raise ModelError(f"{type(module).__name__} was not given the trees, or was given a mask; it cannot pack")
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} uses attention with {name}, which packing does not support")
    if dropout:
        raise ModelError(f"{type(module).__name__} uses attention with dropout {dropout}; it is not in evaluation mode")
    if not _has_kernel(query):
        assert runs is not None
        return _attend_one_by_one(query, key, value, runs, scaling, sliding_window), None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [num_tokens, heads, head_size]
    if key_places is not None:
        k, v = k.index_select(0, key_places), v.index_select(0, key_places)
    # Where a segment has more keys than queries the kernel aligns the last query with the last key. It counts the
    # keys to the left of the query's own; `sliding_window` counts that one too.
    output = varlen_attn(
        q,
        k,
        v,
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None], None


def packing(trees: tuple[Tree, ...], device: torch.device) -> dict[str, Any]:
    """The arguments for a model with this attention besides tokens and positions."""
    segments = [segment for tree in trees for segment in tree.segments()]
    queries = [length for length, _ in segments]
    keys = [before + length for length, before in segments]
    places = torch.from_numpy(_key_places(trees)).to(device) if sum(keys) > sum(queries) else None
    return {
        "runs": Runs(trees),
        "query_ends": torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=device),
        "key_ends": torch.tensor([0, *accumulate(keys)], dtype=torch.int32, device=device),
        "key_places": places,
        "longest_query": max(queries),
        "longest_key": max(keys),
    }


def _key_places(trees: Sequence[Tree]) -> NDArray[np.int64]:
    """The keys of each segment one after another, by their position in the row: [num_keys]."""
    parts: list[NDArray[np.int64]] = []
    start = 0
    for tree in trees:
        place = start
        for length, before in tree.segments():
            parts += [np.arange(start, start + before), np.arange(place, place + length)]
            place += length
        start = place
    return np.concatenate(parts)


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in _KERNEL_DTYPES and query.shape[-1] <= _KERNEL_HEAD_SIZE


class Runs:
    """The parts that are attended to one at a time where there is no kernel: a trunk alone, and its branches, short
    ones together. Masks are made once for all layers."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.parts = [part for tree in trees for part in _parts(tree)]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def mask(self, place: int, window: int | None, device: torch.device) -> Tensor | None:
        """Of the part at `place`, [num_queries, num_keys]; None if each query sees all keys before it."""
        if (place, window) not in self._masks:
            trunk, branches = self.parts[place]
            mask = _of_branches(trunk, branches, window, device) if branches else _band(trunk, window, device)
            self._masks[place, window] = mask
        return self._masks[place, window]


def _parts(tree: Tree) -> Iterator[Tree]:
    yield Tree(tree.trunk)
    together: list[int] = []
    for branch in filter(None, tree.branches):
        if together and sum(together) + branch > _TOGETHER:
            yield Tree(tree.trunk, tuple(together))
            together = []
        together.append(branch)
    if together:
        yield Tree(tree.trunk, tuple(together))


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, scaling: float | None, window: int | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    lengths = [sum(branches) or trunk for trunk, branches in runs.parts]
    outputs = []
    trunk_key = trunk_value = key[:, :, :0]
    heads = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    for place, (q, k, v) in enumerate(heads):
        if runs.parts[place].branches:
            k, v = torch.cat([trunk_key, k], dim=2), torch.cat([trunk_value, v], dim=2)
        else:
            trunk_key, trunk_value = k, v
        mask = runs.mask(place, window, q.device)
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
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


def _of_branches(trunk: int, branches: Sequence[int], window: int | None, device: torch.device) -> Tensor:
    """Which keys of the trunk and of these branches each query of the branches sees: [num_queries, num_keys]."""
    owners = torch.repeat_interleave(torch.arange(len(branches)), torch.tensor(branches))
    positions = torch.cat([torch.arange(trunk, trunk + branch) for branch in branches])
    distance = positions[:, None] - torch.cat([torch.arange(trunk), positions])[None, :]
    seen = distance >= 0
    seen[:, trunk:] &= owners[:, None] == owners[None, :]
    if window is not None:
        seen &= distance < window
    return seen.to(device)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
