"""Models that cannot be what they say: found before anything starts, with the file, the tensor and the fix."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM, Qwen3ForCausalLM

from darts_async.config import RunConfig
from darts_async.models.weight_files import INDEX_FILE, WEIGHT_FILE, check_weight_files, read_header
from darts_async.quickstart import MODEL_PATH
from launcher.preflight.model_check import ModelTrial, check_files, local_models
from launcher.problems import Problem
from tests.launcher.test_input import invoke
from tests.learner.world import plain_model
from tests.support.byte_tokenizer import write_tokenizer

TENSORS = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0)}


def save_shards(directory: Path) -> None:
    save_file({"a": TENSORS["a"]}, directory / "model-1.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, directory / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 58}, "weight_map": weight_map}))


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def cut(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])


SHARD = "model-2.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no weights": (
        lambda path: [file.unlink() for file in path.iterdir()],
        ["has no weights: neither model.safetensors nor"],
    ),
    "a missing shard": (lambda path: (path / SHARD).unlink(), [SHARD, "is missing", "holds b and 1 more"]),
    "data cut off": (
        lambda path: cut(path / SHARD, (path / SHARD).stat().st_size - 1),
        [SHARD, "but its header describes", "it was cut off", "copy or download it again"],
    ),
    "header cut off": (lambda path: cut(path / SHARD, 30), [SHARD, "has 30 bytes, but its header alone takes"]),
    "an empty file": (lambda path: cut(path / SHARD, 0), [SHARD, "of 0 bytes does not begin"]),
    "bytes appended": (
        lambda path: (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"x"),
        [SHARD, "something was appended to it"],
    ),
    "a pointer of Git LFS": (
        lambda path: (path / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        [SHARD, "is a pointer of Git LFS", "git lfs pull"],
    ),
    "a web page": (lambda path: (path / SHARD).write_text("<!DOCTYPE html><html>"), [SHARD, "does not begin"]),
    "a header that is not JSON": (
        lambda path: (path / SHARD).write_bytes(struct.pack("<Q", 4) + b"{{{{"),
        [SHARD, "has a header that cannot be read"],
    ),
    "an unknown type": (
        lambda path: rewrite_header(path / SHARD, lambda header: header["b"].update(dtype="F13")),
        [SHARD, "b of a type 'F13' that is unknown"],
    ),
    "a shape that does not fit its bytes": (
        lambda path: rewrite_header(path / SHARD, lambda header: header["b"].update(shape=[6])),
        [SHARD, "has b of shape [6] and type BF16 in 10 bytes; it takes 12"],
    ),
    "sizes below zero": (
        lambda path: rewrite_header(path / SHARD, lambda header: header["b"].update(shape=[-1, -5])),
        [SHARD, "has b of shape [-1, -5]"],
    ),
    "two tensors in one place": (
        lambda path: rewrite_header(path / SHARD, lambda header: header.update(z=header["b"])),
        [SHARD, "has z at byte 0 of the data, but the tensor before it ends at 10"],
    ),
    "a header without an end": (
        lambda path: (path / SHARD).write_bytes(struct.pack("<Q", 40000) + b'{"a":' + b"[" * 39995),
        [SHARD, "has a header that cannot be read"],
    ),
    "a whole file beside an index of others": (
        lambda path: (path / WEIGHT_FILE).write_bytes(b"{}"),
        [WEIGHT_FILE, "does not begin as a safetensors file does"],
    ),
    "a tensor that only the index has": (
        lambda path: rewrite_header(path / SHARD, lambda header: header.update(z=header.pop("b"))),
        [SHARD, f"has no b (1 missing), though {INDEX_FILE} says so"],
    ),
    "an index that is not JSON": (lambda path: cut(path / INDEX_FILE, 9), [INDEX_FILE, "cannot be read"]),
    "an index of nothing": (
        lambda path: (path / INDEX_FILE).write_text('{"weight_map": {}}'),
        [INDEX_FILE, "names no weights"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_each_kind_of_damage_names_the_file_and_the_fix(case: str, tmp_path: Path) -> None:
    save_shards(tmp_path)
    assert [*check_weight_files(tmp_path)] == []
    damage, expected = DAMAGE[case]
    damage(tmp_path)
    [problem] = check_files({"model.path": tmp_path})
    text = f"{problem.message} {problem.fix}"
    for part in expected:
        assert part in text, f"{part!r} is not in: {text}"
    assert problem.fix


def test_whole_weights_are_whole(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHT_FILE, metadata={"format": "pt"})
    assert [*check_weight_files(tmp_path)] == []
    assert {name: entry.shape for name, entry in read_header(tmp_path / WEIGHT_FILE).items()} == {
        "a": [3, 4],
        "b": [5],
        "c": [0],
    }
    assert [*check_weight_files(MODEL_PATH)] == []


@given(st.binary(max_size=200))
def test_any_bytes_are_weights_or_one_fault(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("any")
    (directory / WEIGHT_FILE).write_bytes(data)
    assert len([*check_weight_files(directory)]) <= 1


def test_only_models_that_are_here_are_looked_at(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"path": "some/model"}})
    assert local_models(config) == {}
    settings = {"loss": {"kl_weight": 0.1, "reference_path": str(tmp_path)}}
    config = RunConfig.model_validate({"learner": settings})
    assert local_models(config) == {"model.path": MODEL_PATH, "learner.loss.reference_path": tmp_path}


def problems_of(directory: Path, **sections: dict[str, Any]) -> list[Problem]:
    config = RunConfig.model_validate({"model": {"path": str(directory)}, **sections})
    with ModelTrial(config, local_models(config)) as trial:
        return [*trial.problems()]


def change_config(directory: Path, **values: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


SHORT_RUN = {
    "prompts": {"max_prompt_tokens": 40},
    "sampling": {"max_new_tokens": 24},
    "generator": {"max_context_tokens": 64},
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A whole model with tied embeddings."""
    directory = tmp_path / "model"
    plain_model().save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_a_whole_model_passes(model_dir: Path) -> None:
    assert "lm_head.weight" not in read_header(model_dir / WEIGHT_FILE), "it is tied"
    assert problems_of(model_dir, **SHORT_RUN) == []


@pytest.mark.slow
def test_a_configuration_larger_than_an_argument_of_a_process_may_be_is_no_problem(model_dir: Path) -> None:
    argument_bytes = 128 << 10
    prompts = SHORT_RUN["prompts"] | {"chat_template_arguments": {"note": "x" * (argument_bytes + 1)}}
    assert problems_of(model_dir, **{**SHORT_RUN, "prompts": prompts}) == []


@pytest.mark.slow
def test_a_configuration_of_another_size_names_the_tensor_and_both_shapes(model_dir: Path) -> None:
    change_config(model_dir, intermediate_size=40)
    [problem] = problems_of(model_dir, **SHORT_RUN)
    assert f"{model_dir / WEIGHT_FILE} has model.layers.0.mlp.down_proj.weight of shape [24, 48]" in problem.message
    assert "config.json describes [24, 40] (6 tensors differ)" in problem.message
    assert problem.fix == "take config.json and the weights from one model"


@pytest.mark.slow
def test_a_configuration_of_another_architecture_names_what_is_missing(model_dir: Path) -> None:
    change_config(model_dir, model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=2, n_head=2, n_embd=24)
    missing, extra = problems_of(model_dir, **SHORT_RUN)
    assert "lack lm_head.weight (29 missing), which config.json describes" in missing.message
    assert extra.is_hint


@pytest.mark.slow
def test_more_weights_than_the_configuration_describes_are_a_hint(model_dir: Path, tmp_path: Path) -> None:
    change_config(model_dir, num_hidden_layers=1, layer_types=["full_attention"])
    write_tokenizer(model_dir)
    change_config(model_dir, vocab_size=16)
    [problem] = problems_of(model_dir, **SHORT_RUN)
    assert problem.is_hint
    assert "model.layers.1.input_layernorm.weight (11 in all), which config.json does not describe" in problem.message


@pytest.mark.slow
def test_lengths_at_which_a_model_would_be_trained_wrong_are_found_before_a_start(tmp_path: Path) -> None:
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    window = MistralConfig(**small, **heads, max_position_embeddings=64, sliding_window=16)
    MistralForCausalLM(window).save_pretrained(tmp_path / "model")
    [problem] = problems_of(tmp_path / "model", **SHORT_RUN)
    assert problem.place == "model.path"
    assert "beyond 16 tokens, its sliding_window" in problem.message
    assert "lower generator.max_context_tokens (64) to 16" in problem.message
    engine = {"engine": "vllm", "max_context_tokens": 64}
    assert problems_of(tmp_path / "model", **SHORT_RUN | {"generator": engine}) == []


@pytest.mark.slow
def test_validate_shows_a_model_whose_weights_were_cut_off(tmp_path: Path) -> None:
    config = plain_model().config
    config.vocab_size = 320
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    weights = tmp_path / "model" / WEIGHT_FILE
    file = tmp_path / "run.yaml"
    run = {"model": {"path": str(tmp_path / "model")}, **SHORT_RUN}
    file.write_text(json.dumps(run))
    code, output = invoke("validate", str(file))
    assert (code, "can be run" in output) == (0, True), output
    cut(weights, 5000)
    code, output = invoke("validate", str(file))
    assert code == 2
    assert "it was cut off" in output
