"""How fast does the embedded engine decode, and how does that compare with transformers' continuous batching?

    python -m bench.engines [--model DIR] [--repeats N] [--new-tokens N]

Both decode the same prompts to the same length with log-probabilities, in one process with one thread, in turn; the
table shows medians over the repeats. The library's speed depends on how its cache is sized: it is measured with each
of `MANAGER_SIZES`, and the best counts. Its managers are started and warmed up before the clock runs. Without --model
the weights are random, of the size of the quickstart's model.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, Qwen3Config

from darts_async.generator.embedded import EmbeddedEngine
from darts_async.protocol import Generate, SamplingParams, sample_id_of

CONCURRENCY: Final = (1, 16, 64, 128)
SAMPLES_PER_GROUP: Final = 16
RESULT_DEADLINE_S: Final = 120.0
MAX_PROMPT_TOKENS: Final = 30
MANAGER_SIZES: Final = ((32, 2048), (128, 512))
"""Tokens in a page of the cache, and tokens in a batch at most."""

Run = Callable[[], int]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a model; random weights without it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.new_tokens} new tokens each")
    print("| concurrent | embedded, tokens/s | transformers (best sizing), tokens/s | ratio |\n|---|---|---|---|")
    for num_samples in CONCURRENCY:
        ours, theirs = measure(arguments.model, num_samples, arguments.new_tokens, arguments.repeats)
        print(f"| {num_samples} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} |", flush=True)


def measure(model_path: str | None, num_samples: int, new_tokens: int, repeats: int) -> tuple[float, float]:
    """Median tokens per second of the embedded engine and of transformers' best-sized manager, measured in turn."""
    prompts = make_prompts(num_samples)
    managers = [start_manager(load_model(model_path), num_samples, new_tokens, *size) for size in MANAGER_SIZES]
    engine = EmbeddedEngine(
        load_model(model_path), num_slots=num_samples, max_context_tokens=new_tokens + 32, eos_token_ids=()
    )
    with asyncio.Runner() as runner:
        runs: list[Run] = [lambda: runner.run(run_engine(engine, prompts, new_tokens))]
        runs += [partial(run_manager, manager, prompts) for manager in managers]
        for run in runs:
            run()
        speeds = [[tokens_per_s(run) for run in runs] for _ in range(repeats)]
        runner.run(engine.close())
    for manager in managers:
        manager.stop(block=True, timeout=RESULT_DEADLINE_S)
    ours, *theirs = (median(column) for column in zip(*speeds, strict=True))
    return ours, max(theirs)


def tokens_per_s(run: Run) -> float:
    """Speed of one run."""
    start_s = time.perf_counter()
    num_tokens = run()
    return num_tokens / (time.perf_counter() - start_s)


def make_prompts(num_samples: int) -> list[NDArray[np.int32]]:
    """One prompt of 8 to 30 tokens for each sample; the samples of a group share theirs."""
    prompts = []
    for index in range(num_samples):
        rng = np.random.default_rng(index // SAMPLES_PER_GROUP)
        prompts.append(rng.integers(1, 64, rng.integers(8, MAX_PROMPT_TOKENS + 1)).astype(np.int32))
    return prompts


def load_model(model_path: str | None) -> Any:
    """The model to measure, or one of the quickstart's size with random weights."""
    if model_path is not None:
        return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=256,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    return AutoModelForCausalLM.from_config(config).eval()


async def run_engine(engine: EmbeddedEngine, prompts: list[NDArray[np.int32]], new_tokens: int) -> int:
    """Decode all prompts to the full length; the number of tokens."""
    before = engine.num_tokens_decoded
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new_tokens)
    for index, prompt in enumerate(prompts):
        sample_id = sample_id_of(*divmod(index, SAMPLES_PER_GROUP))
        engine.start(Generate(sample_id, prompt, np.empty(0, np.int32), seed=index, sampling=sampling))
    while engine.num_unfinished:
        await engine.step()
    return engine.num_tokens_decoded - before


def start_manager(model: Any, num_samples: int, new_tokens: int, page_tokens: int, max_batch_tokens: int) -> Any:
    """transformers' manager of continuous batching, sized for these samples, running."""
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=True, top_k=0, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        page_size=page_tokens,
        num_blocks=num_samples * ((MAX_PROMPT_TOKENS + new_tokens) // page_tokens + 2),
        max_batch_tokens=max_batch_tokens,
        return_logprobs=True,
    )
    model.set_attn_implementation("sdpa")
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    manager.start()
    return manager


def run_manager(manager: Any, prompts: list[NDArray[np.int32]]) -> int:
    """Decode all prompts to the full length; the number of tokens."""
    manager.add_requests([prompt.tolist() for prompt in prompts])
    num_tokens = 0
    for _ in prompts:
        result = manager.get_result(timeout=RESULT_DEADLINE_S)
        if result is None or result.error is not None:
            raise RuntimeError(f"transformers' manager returned {result} within {RESULT_DEADLINE_S} s")
        assert len(result.logprobs) == len(result.generated_tokens)
        num_tokens += len(result.generated_tokens)
    return num_tokens


if __name__ == "__main__":
    main()
