"""Log-probabilities in rows against whole logits: numbers, gradients, and what is held in memory."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig, PreTrainedConfig

from darts_async.learner import logprobs as module
from darts_async.learner.logprobs import Head, head_scores
from darts_async.learner.model import use_packed_attention
from darts_async.learner.packing.batch import micro_batches
from tests.learner.world import (
    VOCABULARY,
    make_group,
    packed_model,
    plain_logprobs,
    plain_model,
    response_logprobs,
    weighted,
)

NUM_TOKENS = 20


def head_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    scores = head_scores(hidden, head, targets, temperature, compiled=compiled)
    return scores.logprobs, scores.entropy


def plain(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head.linear(hidden).float() * head.scale
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def problem(bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(12, 33, bias=bias).to(dtype)
    hidden = (3 * torch.randn(NUM_TOKENS, 12)).to(dtype).requires_grad_()
    return hidden, linear, torch.randint(0, 33, (NUM_TOKENS,))


@pytest.fixture
def seven_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": 7})
    monkeypatch.setattr(module, "_ROWS_BYTES", 1)


@pytest.mark.parametrize("num_rows", [7, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (0.3, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_give_the_numbers_and_gradients_of_whole_logits(
    num_rows: int, bias: bool, scale: float, softcap: float | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": num_rows})
    monkeypatch.setattr(module, "_ROWS_BYTES", 1)
    hidden, linear, targets = problem(bias)
    results, gradients = [], []
    for function in (head_logprobs, plain):
        logprobs, entropy = function(hidden, Head(linear, scale, softcap), targets, temperature)
        torch.manual_seed(1)
        loss = (logprobs * torch.randn(NUM_TOKENS)).sum() + (entropy * torch.randn(NUM_TOKENS)).sum()
        results.append((logprobs, entropy))
        gradients.append(torch.autograd.grad(loss, [hidden, *linear.parameters()]))
    for found, expected in (*zip(*results, strict=True), *zip(*gradients, strict=True)):
        torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize(("scale", "softcap"), [(0.5, None), (0.3, 2.0)])
@pytest.mark.parametrize("num_rows", [7, 1000])
def test_compiled_rows_give_the_same(
    scale: float, softcap: float | None, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is traced is the same; generating C++ for it would take minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    module._compiled.cache_clear()
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": num_rows})
    monkeypatch.setattr(module, "_ROWS_BYTES", 1)
    hidden, linear, targets = problem(bias=True)
    gradients = []
    for function in (partial(head_logprobs, compiled=True), plain):
        logprobs, entropy = function(hidden, Head(linear, scale, softcap), targets, 0.7)
        gradients.append(torch.autograd.grad((logprobs - entropy).sum(), [hidden, *linear.parameters()]))
    module._compiled.cache_clear()
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("wanted", [0, 1])
def test_either_output_can_be_differentiated_alone(wanted: int) -> None:
    hidden, linear, targets = problem()
    gradients = [
        torch.autograd.grad(function(hidden, Head(linear), targets, 1.0)[wanted].sum(), [hidden, linear.weight])
        for function in (head_logprobs, plain)
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.usefixtures("seven_rows")
def test_bfloat16_stays_close_to_whole_logits() -> None:
    hidden, linear, targets = problem(dtype=torch.bfloat16)
    gradients = [
        torch.autograd.grad(function(hidden, Head(linear), targets, 1.0)[0].sum(), linear.weight)[0]
        for function in (head_logprobs, plain)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-2, rtol=2e-2)


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize(("function", "holds_logits"), [(head_logprobs, False), (plain, True)])
def test_whole_logits_are_never_held(function: Any, holds_logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of either pass is larger than a few rows of logits; the plain way shows that the test can fail."""
    num_rows, num_tokens, vocabulary = 16, 256, 4096
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": num_rows})
    monkeypatch.setattr(module, "_ROWS_BYTES", 1)
    linear, targets = nn.Linear(8, vocabulary, bias=False), torch.zeros(num_tokens, dtype=torch.int64)
    hidden = torch.randn(num_tokens, 8, requires_grad=True)
    with LargestTensor() as largest:
        logprobs, entropy = function(hidden, Head(linear), targets, 1.0)
        (logprobs.sum() + entropy.sum()).backward()
    assert (largest.num_elements >= num_tokens * vocabulary) == holds_logits
    assert holds_logits or largest.num_elements <= num_rows * vocabulary


def test_a_training_pass_never_holds_the_logits_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a whole model, whose other tensors are small beside [num_targets, vocabulary]."""
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": 4})
    monkeypatch.setattr(module, "_ROWS_BYTES", 1)
    model = packed_model()
    model.resize_token_embeddings(2000)
    (batch,) = micro_batches([weighted(make_group([100, 60]), np.ones(2, np.float32))], 10_000)
    with LargestTensor() as largest:
        logprobs, _ = response_logprobs(model, batch, 1.0)
        logprobs.sum().backward()
    weight = model.get_output_embeddings().weight.numel()
    assert largest.num_elements <= weight < 160 * 2000 / 4


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 6}
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GEMMA = {"attn_logit_softcapping": None, "query_pre_attn_scalar": 6}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, **HEADS, **TOKENS, **GEMMA, final_logit_softcapping=0.5),
        CohereConfig(**SIZES, **HEADS, **TOKENS, logit_scale=0.25),
        GraniteConfig(**SIZES, **HEADS, **TOKENS, logits_scaling=4.0),
        PhiConfig(**SIZES, **TOKENS, num_attention_heads=3, intermediate_size=48),  # a head with a bias
    ],
    ids=lambda config: config.model_type,
)
def test_heads_that_scale_cap_or_shift_are_computed_in_rows(config: PreTrainedConfig) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    group = make_group([5, 2])
    with torch.no_grad():
        responses = np.split(group.token_ids, [5])
        expected = torch.cat([plain_logprobs(model, group.prompt_tokens, response) for response in responses])
    with structlog.testing.capture_logs() as logs:
        use_packed_attention(model)
    assert not logs
    (batch,) = micro_batches([weighted(group, np.ones(2, np.float32))], 100)
    torch.testing.assert_close(response_logprobs(model, batch, 1.0)[0], expected, atol=1e-5, rtol=0)


class OddHead(nn.Linear):
    """A linear layer that is more than one."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).square()


def test_an_unknown_head_holds_whole_logits_and_says_so() -> None:
    model = plain_model()
    odd = OddHead(24, VOCABULARY, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    group = make_group([5, 2])
    with torch.no_grad():
        expected = plain_logprobs(model, group.prompt_tokens, group.token_ids[:5])
    with structlog.testing.capture_logs() as logs:
        use_packed_attention(model)
    assert [(entry["event"], entry["reason"]) for entry in logs] == [
        ("logits_held_at_once", "its output head is OddHead, not a linear layer")
    ]
    (batch,) = micro_batches([weighted(group, np.ones(2, np.float32))], 100)
    torch.testing.assert_close(response_logprobs(model, batch, 1.0)[0][batch.owners == 0], expected)


def test_a_head_that_the_configuration_does_not_tell_is_found_out() -> None:
    model = plain_model()
    model.config.logit_scale = 3.0  # Qwen3 has none
    with structlog.testing.capture_logs() as logs:
        use_packed_attention(model)
    assert [entry["event"] for entry in logs] == ["logits_held_at_once"]
    assert "differ by" in logs[0]["reason"]
