"""A tiny model that vLLM can load, and vLLM itself, started once for all tests of a file."""

import importlib.util
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from darts_async.config import VllmConfig
from darts_async.generator.vllm.engine import VllmEngine
from darts_async.generator.vllm.startup import StartedVllm, VllmRequest, start_vllm

VOCAB_SIZE = 48
EOS = 0
BLOCK_TOKENS = 32
MAX_CONTEXT_TOKENS = 512

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; the README says how it is for CPUs, and CI installs it",
)


def tiny_model(seed: int = 0, *, hidden_size: int = 32) -> Any:
    """Three queries share the one key head; tied embeddings. A head has 32 dimensions: vLLM on CPUs takes no fewer."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Qwen3ForCausalLM(config).eval()


@dataclass
class RunningVllm:
    """vLLM, and the thread it dies with."""

    started: StartedVllm
    thread: ThreadPoolExecutor
    model: Any

    @asynccontextmanager
    async def engine(self, *, is_endless: bool = False) -> AsyncIterator[VllmEngine]:
        """An engine over it, empty, which leaves it empty. Endless: no token ends a response."""
        started = replace(self.started, eos_token_ids=()) if is_endless else self.started
        engine = VllmEngine(started, self.thread, step_deadline_s=60.0)
        yield engine
        for sample_id in range(1000):
            engine.cancel(sample_id)
        while engine.num_unfinished:
            await engine.step()


@asynccontextmanager
async def running_vllm(
    model_dir: Path, *, num_slots: int = 64, settings: VllmConfig | None = None, hidden_size: int = 32
) -> AsyncIterator[RunningVllm]:
    """vLLM with the tiny model."""
    model = tiny_model(hidden_size=hidden_size)
    model.save_pretrained(model_dir)
    thread = ThreadPoolExecutor(max_workers=1)
    started = start_vllm(
        thread,
        VllmRequest(
            str(model_dir),
            settings or VllmConfig(block_size=BLOCK_TOKENS),
            dtype="float32",
            num_slots=num_slots,
            max_context_tokens=MAX_CONTEXT_TOKENS,
            seed=0,
        ),
    )
    yield RunningVllm(started, thread, model)
    await VllmEngine(started, thread, step_deadline_s=60.0).close()
