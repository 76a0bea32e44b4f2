"""Writes a model in Hugging Face format, which transformers and vLLM load.

Weights are an argument, and of the live model only its configuration and buffers are read, so this may run while the
model is being trained.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.learner.lora import base_name
from darts_async.weights.bucket_layout import dtype_name

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)


def write_model(
    out_dir: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], dtype: torch.dtype, tokenizer_dir: Path
) -> None:
    """Write config, weights and tokenizer into an existing directory. `weights` are complete, by the names of the
    model's parameters without adapters, and are cast to `dtype`. `tokenizer_dir` is the directory that the model came
    from."""
    cast = {name: tensor.to("cpu", dtype) for name, tensor in weights.items()}
    model.save_pretrained(out_dir, state_dict=cast | _persistent_buffers(model))
    config_path = out_dir / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"dtype": dtype_name(dtype)}, indent=2) + "\n")
    for pattern in TOKENIZER_FILES:
        for file in tokenizer_dir.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out_dir / file.name)


def _persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `state_dict` has besides parameters. `state_dict` itself would free what a running pass of a sharded model
    has gathered."""
    return {
        base_name(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
