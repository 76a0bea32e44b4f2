"""Counted operations against PyTorch's own counter on the running model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3MoeConfig

from darts_async.learner.flops import ModelFlops, peak_of, utilisation
from darts_async.learner.packing.tree import Tree
from tests.learner.world import plain_model

TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
LENGTH = 20


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, **HEADS, **TOKENS),
        LlamaConfig(**SIZES, **HEADS, **TOKENS, head_dim=24, attention_bias=True),
        GPT2Config(vocab_size=48, n_embd=64, n_layer=2, n_head=4, **TOKENS),
        plain_model().config,
    ],
    ids=["llama", "wide_heads", "gpt2", "qwen3"],
)
def test_counts_equal_those_of_the_running_model(config: PreTrainedConfig) -> None:
    """The model there multiplies hidden pairs too, and RoPE, which is left out here, is a small product."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(LENGTH)[None] % 16, use_cache=False).logits.sum().backward()
    flops = ModelFlops.of(model)
    assert flops is not None
    hidden = LENGTH * (LENGTH - 1) // 2
    expected = flops.training([Tree(LENGTH)], LENGTH) + 3 * flops.per_pair * len(flops.windows) * hidden
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


def test_packed_sequences_and_targets_count_as_written_by_hand() -> None:
    flops = ModelFlops(per_token=10, per_target=7, per_pair=2, windows=(None, 2))
    # Pairs: 3 tokens see 1 + 2 + 3 keys, with a window of 2 only 1 + 2 + 2; 1 token sees 1 in both layers.
    trees = [Tree(3), Tree(1)]
    assert flops.forward(trees, 3) == 10 * 4 + 7 * 3 + 2 * (6 + 1 + 5 + 1)
    assert flops.training(trees, 3) == 3 * flops.forward(trees, 3)


def test_a_shared_prompt_counts_once() -> None:
    flops = ModelFlops(per_token=10, per_target=7, per_pair=2, windows=(None, 2))
    # Pairs: the trunk has 1 + 2, its branches 3 and 3 + 4; with the window 1 + 2, 2 and 2 + 2.
    assert flops.forward([Tree(2, (1, 2))], 5) == 10 * 5 + 7 * 5 + 2 * ((3 + 3 + 7) + (3 + 2 + 4))


def test_windows_are_those_of_the_layers() -> None:
    def windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
        flops = ModelFlops.of(AutoModelForCausalLM.from_config(config))
        assert flops is not None
        return flops.windows

    assert windows(MistralConfig(**SIZES, **HEADS, **TOKENS, sliding_window=8)) == (8, 8, 8)
    assert windows(LlamaConfig(**SIZES, **HEADS, **TOKENS)) == (None,) * 3
    assert windows(plain_model().config) == (None, None)


def test_a_mixture_of_experts_is_not_counted_rather_than_counted_wrong() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, **HEADS, **TOKENS, **experts))
    assert ModelFlops.of(model) is None


def test_attention_weighs_as_much_as_the_rest_at_the_length_it_says() -> None:
    flops = ModelFlops.of(plain_model())
    assert flops is not None
    length = round(2 * (flops.per_token + flops.per_target) / (flops.per_pair * len(flops.windows)))
    linear = (flops.per_token + flops.per_target) * length
    assert flops.forward([Tree(length)], length) == pytest.approx(2 * linear, rel=0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Voodoo 2", None)],
)
def test_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_cpu_has_a_rate_but_no_utilisation() -> None:
    assert utilisation(3 * 10**12, 2.0, torch.device("cpu")) == {"tflops_per_second": 1.5}
