"""Both ways to attend, against attention written out with a mask. The kernel itself needs a GPU; here its documented
meaning stands in for it, so that layout, lengths and windows are tested."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from darts_async.errors import ModelError
from darts_async.learner.packing import packed_attention as attention
from darts_async.learner.packing.packed_attention import packed_attention, packing
from darts_async.learner.packing.tree import Tree

TREES = (Tree(5), Tree(1), Tree(4, (3, 0, 2, 7, 1)), Tree(1, (2, 1)), Tree(3))
ALONE = (Tree(5), Tree(1), Tree(9), Tree(3))
MODULE = torch.nn.Identity()
CPU = torch.device("cpu")


def heads(trees: tuple[Tree, ...], num_key_value_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    num_tokens = sum(tree.num_tokens for tree in trees)
    shapes = ((1, count, num_tokens, 8) for count in (4, num_key_value_heads, num_key_value_heads))
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def with_a_mask(trees: tuple[Tree, ...], query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """[1, num_tokens, num_heads, head_size], by softmax over all pairs and a mask: each token's tree, its branch (0 is
    the trunk) and its position say what it sees."""
    places = [
        (number, branch, position)
        for number, tree in enumerate(trees)
        for branch, positions in enumerate(
            (range(tree.trunk), *(range(tree.trunk, tree.trunk + length) for length in tree.branches))
        )
        for position in positions
    ]
    seen = torch.tensor(
        [
            [
                tree == other and branch in (0, own) and 0 <= place - before < (window or 1000)
                for other, branch, before in places
            ]
            for tree, own, place in places
        ]
    )
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * 0.3
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2)


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_key: int,
    **options: Any,
) -> Tensor:
    """What flash attention documents: rows [num_tokens, heads, head_size]; where there are more keys than queries the
    last query stands at the last key; a window of so many keys to the left."""
    assert ends.dtype == key_ends.dtype == torch.int32
    assert (longest, longest_key) == (ends.diff().max(), key_ends.diff().max())
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    left, right = options["window_size"]
    assert right == 0
    outputs = []
    for (start, end), (first, last) in zip(
        itertools.pairwise(ends.tolist()), itertools.pairwise(key_ends.tolist()), strict=True
    ):
        repeats = query.shape[1] // key.shape[1]
        q = query[start:end].transpose(0, 1)
        k, v = (rows[first:last].transpose(0, 1).repeat_interleave(repeats, 0) for rows in (key, value))
        more = (last - first) - (end - start)
        seen = torch.ones(end - start, last - first, dtype=torch.bool).tril(more)
        if left >= 0:
            seen &= ~torch.ones_like(seen).tril(more - left - 1)
        scores = (q @ k.transpose(-1, -2) * options["scale"]).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("trees", [TREES, ALONE], ids=["shared", "alone"])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_attention_stays_inside_each_tree_and_branch(
    trees: tuple[Tree, ...],
    num_key_value_heads: int,
    window: int | None,
    in_one_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel", lambda query: in_one_kernel)
    monkeypatch.setattr(attention, "_TOGETHER", 5)
    inputs = heads(trees, num_key_value_heads)
    found, _ = packed_attention(MODULE, *inputs, None, **packing(trees, CPU), scaling=0.3, sliding_window=window)
    expected = with_a_mask(trees, *inputs, window)
    torch.testing.assert_close(found, expected)
    torch.manual_seed(1)
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_keys_are_repeated_only_where_samples_share_them() -> None:
    assert packing(ALONE, CPU)["key_places"] is None
    assert packing((Tree(2), Tree(2, (1, 2))), CPU)["key_places"].tolist() == [0, 1, 2, 3, 2, 3, 4, 2, 3, 5, 6]


def test_a_cpu_attends_one_by_one() -> None:
    assert not attention._has_kernel(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropout": 0.1}, "dropout 0.1"), ({"softcap": 50.0}, "softcap"), ({"s_aux": torch.ones(4)}, "s_aux")],
)
def test_attention_of_another_kind_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        packed_attention(MODULE, *heads(ALONE), None, **packing(ALONE, CPU), **options)
