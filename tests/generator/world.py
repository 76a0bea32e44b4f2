"""Tiny random models, requests, and a loop that runs an engine to the end and keeps what it reported."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from darts_async.generator.embedded.engine import EmbeddedEngine
from darts_async.generator.engine import Engine, SampleEnd, StepEvents
from darts_async.protocol import Generate, SamplingParams

VOCAB_SIZE = 48
EOS = 0
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def tiny_qwen3(seed: int = 0) -> Any:
    """Three queries share the one key head; tied embeddings, as the quickstart's model."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(**_SHAPE, num_attention_heads=3, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
    ).eval()


def tiny_llama(seed: int = 0) -> Any:
    """Two key heads of two queries each; untied embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(**_SHAPE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    ).eval()


def tiny_gpt2(seed: int = 0) -> Any:
    """Learned positions, no shared key heads."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
        bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


TINY_MODELS: dict[str, Callable[..., Any]] = {"qwen3": tiny_qwen3, "llama": tiny_llama, "gpt2": tiny_gpt2}


def embedded(model: Any = None, *, num_slots: int = 4, max_context_tokens: int = 96, eos: int = EOS) -> EmbeddedEngine:
    """An engine over a tiny model."""
    return EmbeddedEngine(
        tiny_qwen3() if model is None else model,
        num_slots=num_slots,
        max_context_tokens=max_context_tokens,
        eos_token_ids=[eos],
    )


def generate(
    sample_id: int = 0,
    *,
    prompt: Any = (5, 6, 7),
    prefix: Any = (),
    seed: int | None = None,
    max_new_tokens: int = 12,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    priority: int = 0,
) -> Generate:
    """A request; its seed is its id unless given."""
    return Generate(
        sample_id=sample_id,
        prompt_tokens=np.array(prompt, np.int32),
        prefix_tokens=np.array(prefix, np.int32),
        seed=sample_id if seed is None else seed,
        sampling=SamplingParams(temperature, top_p, top_k, max_new_tokens),
        priority=priority,
    )


@dataclass
class Record:
    """Everything an engine reported, by sample."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    ended: dict[int, SampleEnd] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)

    def add(self, events: StepEvents) -> None:
        """Append a step; a sample ends once and is silent afterwards."""
        for sample_id, token, logprob in zip(
            events.sample_ids.tolist(), events.token_ids.tolist(), events.logprobs.tolist(), strict=True
        ):
            assert sample_id not in self.ended, "a token after the end"
            self.tokens.setdefault(sample_id, []).append(token)
            self.logprobs.setdefault(sample_id, []).append(logprob)
        for end in events.ended:
            assert end.sample_id not in self.ended, "two ends"
            self.ended[end.sample_id] = end
        self.rejected.update(events.rejected)


async def run(engine: Engine, record: Record | None = None, *, max_steps: int = 1000) -> Record:
    """Step until nothing is unfinished, at most `max_steps` times."""
    record = Record() if record is None else record
    for _ in range(max_steps):
        if engine.num_unfinished == 0:
            break
        record.add(await engine.step())
    return record


async def decode(engine: Engine, *requests: Generate) -> Record:
    """Start all, run to the end, close."""
    for request in requests:
        engine.start(request)
    record = await run(engine)
    await engine.close()
    return record
