"""Kinds of models, each saved, loaded as a run loads it, and held against its own forward of one sample alone.

In every learner and in every engine a kind is right or refused by a `ModelError` that says why. `NAMED` is a number
of tokens that the configuration of a kind names: runs exceed it unless a test says otherwise.
"""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from darts_async.errors import ModelError
from darts_async.generator.embedded.engine import load_embedded_engine
from darts_async.learner.model import load_model
from darts_async.learner.packing.batch import micro_batches
from darts_async.models.length_limits import Lengths, bounds, described_by, thresholds, why_too_long
from darts_async.models.miniature import crossed
from darts_async.protocol import sample_id_of
from tests.generator.world import decode, generate
from tests.learner.world import make_group, plain_logprobs, response_logprobs, weighted

NAMED = 12
CROSSING = Lengths(sample=40, row=256)
SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 16, "initializer_range": 0.2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
ALTERNATING = {"sliding_window": NAMED, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": NAMED,
}


class Kind(NamedTuple):
    """A model type, what is set in its configuration, and why it is refused; None if it is right."""

    model_type: str
    settings: dict[str, Any] = {}  # noqa: RUF012 - never changed
    learner: str | None = None
    engine: str | None = None


A_WINDOW = rf"beyond {NAMED} tokens, its sliding_window.*lower generator.max_context_tokens \(40\) to {NAMED}"
BUILT_IN = "its attention is built in"
NO_INTERFACE = "does not use transformers' attention interface"
NOT_DECODED = "does not decode correctly"
NOT_HANDED = "does not hand keyword arguments through"

KINDS = {
    "llama": Kind("llama"),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": Kind("smollm3", {"no_rope_layers": [1, 0]}),
    "granite": Kind("granite"),
    "olmo2": Kind("olmo2"),
    "glm4": Kind("glm4", {"head_dim": 8}),
    "gpt2": Kind("gpt2", GPT),
    "gpt_neox": Kind("gpt_neox"),
    "opt": Kind("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
    "mistral with a window": Kind("mistral", {"sliding_window": NAMED}, engine=A_WINDOW),
    "qwen2 with a window from its second layer on": Kind(
        "qwen2", {"use_sliding_window": True, "sliding_window": NAMED, "max_window_layers": 1}, engine=A_WINDOW
    ),
    "gemma3": Kind("gemma3_text", {**ALTERNATING, "head_dim": 16}, engine=A_WINDOW),
    "olmo3": Kind("olmo3", ALTERNATING, engine=A_WINDOW),
    "cohere2": Kind("cohere2", {**ALTERNATING, "logit_scale": 0.5}, engine=A_WINDOW),
    "exaone4": Kind("exaone4", ALTERNATING, engine=A_WINDOW),
    "starcoder2": Kind("starcoder2", {"sliding_window": NAMED}, engine=A_WINDOW),
    "a window that only a mask expresses": Kind(
        "phimoe",
        {"sliding_window": NAMED, "num_local_experts": 4},
        rf"more than {NAMED} tokens, its sliding_window.*lower generator.max_context_tokens \(40\) to {NAMED}",
        A_WINDOW,
    ),
    "mixtral": Kind("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": Kind("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    "glm4_moe": Kind("glm4_moe", {**EXPERTS, "n_routed_experts": 4, "head_dim": 8, "first_k_dense_replace": 1}),
    "deepseek_v3": Kind("deepseek_v3", {**EXPERTS, **LATENT}),
    "phi3 with longrope": Kind(
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": NAMED},
        rf"max_context_tokens is 40, but its longrope rotary frequencies .* lower it to {NAMED} or less",
        rf"max_context_tokens is 40, but its longrope rotary frequencies .* lower it to {NAMED} or less",
    ),
    "llama with dynamic frequencies": Kind(
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": NAMED,
        },
        rf"max_context_tokens is 40, but its dynamic rotary frequencies .* lower it to {NAMED} or less",
        rf"max_context_tokens is 40, but its dynamic rotary frequencies .* lower it to {NAMED} or less",
    ),
    "llama with yarn": Kind(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama4": Kind(
        "llama4_text",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
            "attention_chunk_size": NAMED,
            "floor_scale": 8192,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        rf"its attention_chunk_size.*lower generator.max_context_tokens \(40\) to {NAMED}",
        rf"its attention_chunk_size.*lower generator.max_context_tokens \(40\) to {NAMED}",
    ),
    "llama4 with scaled positions": Kind(
        "llama4_text",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
            "attention_chunk_size": 8192,
            "floor_scale": NAMED,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        r"its floor_scale: its layers count positions from the beginning of the row; lower learner.tokens_per_micro_ba",
        r"its floor_scale, of all samples of a step; use generator.engine: vllm",
    ),
    "doge": Kind("doge", {"keep_window_size": 2048}, "was given a mask", "makes a mask of its own"),
    "hy_v4": Kind("hy_v4", {}, "its code raised TypeError", "its code raised TypeError"),
    "gpt_oss": Kind("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, "s_aux", "s_aux"),
    "gemma2": Kind("gemma2", {"head_dim": 8}, "softcap", "softcap"),
    "stablelm": Kind("stablelm", {}, "was not given the trees", NOT_HANDED),
    "nemotron": Kind("nemotron", {"head_dim": 8}, "was not given the trees", NOT_HANDED),
    "bloom": Kind("bloom", {"n_layer": 2, "n_head": 4}, BUILT_IN, NO_INTERFACE),
    "falcon": Kind("falcon", {}, BUILT_IN, NO_INTERFACE),
    "mamba": Kind("mamba", {}, "its logits differ", NO_INTERFACE),
    "qwen3_next": Kind(
        "qwen3_next",
        {
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "its logits differ",
        NOT_DECODED,
    ),
    "diffllama": Kind("diffllama", {}, None, NOT_DECODED),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More of them only get in each other's way on tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(kind: Kind) -> PreTrainedConfig:
    known = CONFIG_MAPPING[kind.model_type]
    default = known().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in default} if kind.settings is not GPT else {}
    return known(**{**sizes, **copy.deepcopy(kind.settings)})


@cache
def tiny(name: str) -> PreTrainedModel:
    """Weights of a size at which attention is sharp."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(KINDS[name])).eval()


def saved(name: str, directory: Path) -> str:
    tiny(name).save_pretrained(directory)
    return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_learner_is_right_about_a_kind_of_model_or_refuses_it(name: str, tmp_path: Path) -> None:
    path, reason = saved(name, tmp_path), KINDS[name].learner
    if reason is not None:
        with pytest.raises(ModelError, match=reason):
            load_model(path, dtype="float32", lengths=CROSSING)
        return
    assert_trained_right(name, path, CROSSING, [1, 30, 9, 2, 36])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
async def test_an_engine_is_right_about_a_kind_of_model_or_refuses_it(name: str, tmp_path: Path) -> None:
    path, reason = saved(name, tmp_path), KINDS[name].engine
    if reason is not None:
        with pytest.raises(ModelError, match=reason):
            load_embedded_engine(path, dtype="float32", num_slots=3, max_context_tokens=CROSSING.sample)
        return
    await assert_decoded_right(name, path, CROSSING.sample)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3 with longrope", "llama with dynamic frequencies", "llama4", "gemma3"])
async def test_a_kind_of_model_is_right_below_the_number_that_it_names(name: str, tmp_path: Path) -> None:
    path = saved(name, tmp_path)
    assert_trained_right(name, path, Lengths(NAMED, 256), [1, 7, 5, 2, 8])
    if name == "llama4":  # a step holds more tokens than a sample, and floor_scale counts them
        return
    await assert_decoded_right(name, path, NAMED)


def assert_trained_right(name: str, path: str, lengths: Lengths, response_lengths: list[int]) -> None:
    model = load_model(path, dtype="float32", lengths=lengths)
    groups = [make_group(response_lengths), make_group([7, 3], group_id=1, prompt_length=2)]
    weights = [weighted(group, np.ones(len(group.num_tokens), np.float32)) for group in groups]
    (batch,) = micro_batches(weights, 1000, share_prompts=model.shares_prompts)
    found, _ = response_logprobs(model, batch, 1.0)
    expected = [
        plain_logprobs(tiny(name), group.prompt_tokens, response)
        for group in groups
        for response in np.split(group.token_ids, np.cumsum(group.num_tokens)[:-1])
    ]
    torch.testing.assert_close(sorted_by_sample(found, batch.owners), torch.cat(expected), atol=1e-4, rtol=0)


def sorted_by_sample(values: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    return values[owners.argsort(stable=True)].detach()


async def assert_decoded_right(name: str, path: str, max_context_tokens: int) -> None:
    engine = load_embedded_engine(path, dtype="float32", num_slots=3, max_context_tokens=max_context_tokens)
    engine._ends_response[:] = False  # type: ignore[attr-defined]
    new = max_context_tokens - 5
    prompts = {sample_id_of(group, 0): list(range(1, 2 + group)) for group in range(4)}
    record = await decode(engine, *(generate(i, prompt=p, max_new_tokens=new - i % 3) for i, p in prompts.items()))
    for i, prompt in prompts.items():
        with torch.no_grad():
            expected = plain_logprobs(tiny(name), np.array(prompt, np.int32), np.array(record.tokens[i], np.int32))
        np.testing.assert_allclose(record.logprobs[i], expected, atol=1e-4)


def test_bounds_are_read_from_any_shape_of_a_configuration() -> None:
    longrope = {"type": "su", "original_max_position_embeddings": 4096}
    dynamic = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 32768, "factor": 4.0}  # as transformers and vLLM
    shapes = {
        131072: {"max_position_embeddings": 131072, "sliding_window": 8},
        4096: {"max_position_embeddings": 131072, "rope_scaling": longrope},
        2048: {"text_config": {"max_position_embeddings": 2048, "rope_parameters": dynamic}},
        1024: {"n_positions": 1024},
        40960: {"max_position_embeddings": 40960, "rope_scaling": yarn},
    }
    for value, described in shapes.items():
        assert bounds(described)[0].value == value
        assert why_too_long(described, value) is None
        assert f"lower it to {value} or less" in str(why_too_long(described, value + 1))
    assert bounds({"model_type": "mamba"}) == []
    assert bounds({"max_position_embeddings": -1}) == []


def test_the_first_set_of_thresholds_that_fails_has_the_number_to_lower_to() -> None:
    described = PreTrainedConfig()
    described.sliding_window, described.attention_chunk_size, described.block_size = 32, 16, 8
    sets = [[threshold.value for threshold in each] for each in crossed(described, 33)]
    assert sets == [[8], [16], [8, 16], [32], [8, 16, 32]]
    assert [described_by(each)[1] for each in crossed(described, 33)] == [8, 16, 16, 32, 32]
    for place, values in enumerate(sets):
        below = [[threshold.value for threshold in each] for each in crossed(described, max(values))]
        assert all(each in sets[:place] for each in below), "what is exceeded then has been tried before"


def test_thresholds_are_the_numbers_of_tokens_and_no_others() -> None:
    described = {
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "max_window_layers": 28,
        "num_local_experts": 16,
        "n_local_heads": 64,
        "rope_local_base_freq": 10000,
        "local_rope_theta": 10000,
        "use_sliding_window": True,
        "attention_chunk_size": 8192,
        "rope_parameters": {"full_attention": {"original_max_position_embeddings": 16384, "factor": 4}},
        "audio_config": {"chunk_size": 3},
    }
    assert [(threshold.setting, threshold.value) for threshold in thresholds(described)] == [
        ("sliding_window", 4096),
        ("attention_chunk_size", 8192),
        ("rope_parameters.full_attention.original_max_position_embeddings", 16384),
    ]
