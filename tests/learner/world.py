"""What the learner's tests share: tiny models, groups sampled from them, and the plain forward to hold against."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from darts_async.config import LearnerConfig
from darts_async.learner.model import use_packed_attention
from darts_async.learner.packing.batch import Weighted
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
    return Trainer(
        model or packed_model(),
        config,
        temperature=temperature,
        max_staleness=max_staleness,
        max_new_tokens=max_new_tokens,
        reference=reference,
    )


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient sums of the open step."""
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None}
