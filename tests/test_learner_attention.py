"""Both ways to attend, against attention written out with a mask. The kernel itself needs a GPU; here its documented
meaning stands in for it, so that layout, lengths and windows are tested."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from darts_async.errors import ModelError
from darts_async.learner import attention
from darts_async.learner.attention import packed_attention, packing

LENGTHS = (5, 1, 9, 3)
MODULE = torch.nn.Identity()
CPU = torch.device("cpu")


def heads(num_key_value_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((1, count, sum(LENGTHS), 8) for count in (4, num_key_value_heads, num_key_value_heads))
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def with_a_mask(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """[1, num_tokens, num_heads, head_size], by softmax over all pairs and a mask."""
    owners = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    places = torch.arange(len(owners))
    distance = places[:, None] - places[None, :]
    seen = (owners[:, None] == owners[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
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
    """What `varlen_attn` documents: rows [num_tokens, heads, head_size], a window of so many keys to the left."""
    assert ends.dtype == torch.int32
    assert ends.equal(key_ends)
    assert longest == longest_key == max(LENGTHS)
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    left, right = options["window_size"]
    assert right == 0
    outputs = []
    for start, end in itertools.pairwise(ends.tolist()):
        repeats = query.shape[1] // key.shape[1]
        q = query[start:end].transpose(0, 1)
        k, v = (rows[start:end].transpose(0, 1).repeat_interleave(repeats, 0) for rows in (key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if left >= 0:
            seen &= ~torch.ones_like(seen).tril(-left - 1)
        scores = (q @ k.transpose(-1, -2) * options["scale"]).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_attention_stays_inside_each_sequence(
    num_key_value_heads: int, window: int | None, in_one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel", lambda query: in_one_kernel)
    inputs = heads(num_key_value_heads)
    found, _ = packed_attention(MODULE, *inputs, None, **packing(LENGTHS, CPU), scaling=0.3, sliding_window=window)
    expected = with_a_mask(*inputs, window)
    torch.testing.assert_close(found, expected)
    torch.manual_seed(1)
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_cpu_attends_one_by_one() -> None:
    assert not attention._has_kernel(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropout": 0.1}, "dropout 0.1"), ({"softcap": 50.0}, "softcap"), ({"s_aux": torch.ones(4)}, "s_aux")],
)
def test_attention_of_another_kind_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        packed_attention(MODULE, *heads(), None, **packing(LENGTHS, CPU), **options)
