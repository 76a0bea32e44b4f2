"""What the learner's tests share: tiny models, groups sampled from them, and the plain forward to hold against."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from darts_async.config import LearnerConfig
from darts_async.learner.model import response_scores, use_packed_attention
from darts_async.learner.objective import Objective, ScriptedObjective
from darts_async.learner.packing.batch import PackedBatch, Weighted
from darts_async.learner.step import Trainer
from darts_async.protocol import TrainGroup

VOCABULARY = 16


def plain_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with transformers' own attention and weights large enough for sharp distributions."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def packed_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights with packed attention."""
    model = plain_model(seed, dtype)
    use_packed_attention(model)
    return model


def plain_logprobs(
    model: PreTrainedModel, prompt: NDArray[np.int32], response: NDArray[np.int32], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of one response by an unpacked forward of a `plain_model`: [response_length]."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0]


def make_group(
    lengths: list[int],
    *,
    seed: int = 0,
    group_id: int = 0,
    step: int = 0,
    version: int | None = None,
    prompt_length: int = 4,
    rewards: list[float] | None = None,
) -> TrainGroup:
    """A group of random tokens with random behaviour log-probabilities near those of a flat distribution."""
    rng = np.random.default_rng((seed, group_id))
    total = sum(lengths)
    return TrainGroup(
        group_id=group_id,
        step=step,
        prompt_tokens=rng.integers(0, VOCABULARY, prompt_length, dtype=np.int32),
        num_tokens=np.array(lengths, np.int32),
        token_ids=rng.integers(0, VOCABULARY, total, dtype=np.int32),
        logprobs=rng.normal(-2.8, 0.3, total).astype(np.float32),
        versions=np.full(total, step if version is None else version, np.int32),
        rewards=np.array(rewards if rewards is not None else rng.integers(0, 2, len(lengths)), np.float32),
        weights=np.ones(len(lengths), np.float32),
    )


def weighted(group: TrainGroup, advantages: NDArray[np.float32]) -> Weighted:
    """All of its tokens count."""
    return Weighted(group, advantages, np.ones(len(group.token_ids), np.float32))


def make_trainer(
    model: PreTrainedModel | None = None,
    *,
    max_staleness: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    reference: PreTrainedModel | None = None,
    **settings: object,
) -> Trainer:
    """A trainer of `packed_model()`, or of `model`, with `LearnerConfig` settings."""
    config = LearnerConfig.model_validate({"learning_rate": 1e-3, **settings})
    model = model or packed_model()
    objective = (Objective if config.script is None else ScriptedObjective)(
        model,
        config,
        temperature=temperature,
        baseline="group",
        max_new_tokens=max_new_tokens,
        reference=reference,
    )
    return Trainer(model, config, objective, max_staleness=max_staleness)


def response_logprobs(
    model: PreTrainedModel, batch: PackedBatch, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at `temperature`, and the entropy in nats there, without truncation."""
    scores = response_scores(model, batch, temperature, entropy_gradient=entropy_gradient)
    return scores.logprobs, scores.entropy


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient sums of the open step."""
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None}


def load_groups(path: Path) -> list[TrainGroup]:
    """The inverse of `nonfinite.save_groups`."""
    fields: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(path).items():
        group_id, _, name = key.partition("/")
        fields.setdefault(group_id, {})[name] = array
    return sorted(map(_group_of, fields.values()), key=lambda group: group.group_id)


def _group_of(arrays: dict[str, np.ndarray]) -> TrainGroup:
    fields: dict[str, Any] = {name: array if array.ndim else array.item() for name, array in arrays.items()}
    if np.isnan(fields["baseline"]):
        fields["baseline"] = None
    return TrainGroup(**fields)
