"""A model is tried out when it is wrapped: rounding passes in every precision, and a wrong decoding does not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from darts_async.errors import ModelError
from darts_async.generator.embedded.decoder import SlotDecoder
from darts_async.generator.embedded.slot_attention import SlotStep
from tests.generator.world import TINY_MODELS

ATTEND, LAYOUT = SlotStep.attend, SlotStep._layout
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def with_wrong_scale(step: SlotStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return ATTEND(step, layer, query, key, value, 1.4 * scaling)


def with_a_wrong_layer(step: SlotStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    step.cache.layer(layer, key, value)
    return ATTEND(step, 0, query, key, value, scaling)


def with_shifted_keys(step: SlotStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return ATTEND(step, layer, query, key.roll(1, dims=2), value, scaling)


def without_the_first_token(step: SlotStep, key: Tensor) -> tuple[Tensor, Tensor]:
    rows, mask = LAYOUT(step, key)
    return rows, mask.index_fill(2, torch.tensor([0]), -torch.inf)


def without_a_mask(step: SlotStep, key: Tensor) -> tuple[Tensor, Tensor]:
    rows, mask = LAYOUT(step, key)
    return rows, torch.zeros_like(mask)


def with_positions_off_by_one(model: Any) -> None:
    """In steps of the engine, not in the model's own forward."""
    forward = model.forward

    def shifted(*, position_ids: Tensor | None = None, **arguments: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids + (torch.arange(position_ids.shape[1]) >= position_ids.shape[1] - 1)
        return forward(position_ids=position_ids, **arguments)

    model.forward = shifted


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "scale": ("attend", with_wrong_scale),
    "layer": ("attend", with_a_wrong_layer),
    "keys": ("attend", with_shifted_keys),
    "first token": ("_layout", without_the_first_token),
    "mask": ("_layout", without_a_mask),
}


def wrap(model: Any) -> SlotDecoder:
    return SlotDecoder(model, num_slots=3, max_context_tokens=24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_rounding_is_taken_for_what_it_is(name: str, dtype: torch.dtype) -> None:
    assert wrap(TINY_MODELS[name]().to(dtype)).vocab_size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_decoding_is_refused_in_every_precision(
    wrong: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, replacement = WRONG[wrong]
    monkeypatch.setattr(SlotStep, method, replacement)
    with pytest.raises(ModelError, match=r"does not decode correctly: lo.* differ from the model's own by"):
        wrap(TINY_MODELS[name]().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_positions_that_are_off_by_one_are_refused_in_every_precision(name: str, dtype: torch.dtype) -> None:
    model = TINY_MODELS[name]().to(dtype)
    with_positions_off_by_one(model)
    with pytest.raises(ModelError, match="does not decode correctly"):
        wrap(model)


def test_a_wrong_decoding_is_refused_where_all_tokens_are_nearly_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model that is not trained yet: what is drawn hardly changes, but the logits do."""
    model = TINY_MODELS["llama"]().bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    logits = model(input_ids=torch.from_numpy(np.arange(20)[None])).logits.float()
    assert logits.softmax(-1).max() < 1.1 / logits.shape[-1]
    monkeypatch.setattr(SlotStep, "attend", with_wrong_scale)
    with pytest.raises(ModelError, match="logits differ from the model's own by"):
        wrap(model)
