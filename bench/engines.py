"""How fast do the engines decode, how does transformers' continuous batching compare, and how soon is a cancel done?

    python -m bench.engines [--model DIR] [--dtype bfloat16] [--repeats N] [--new-tokens N] [--out DIR]

All decode the same prompts to the same length with log-probabilities, in turn; the table shows medians over the
repeats. The embedded engine and the library run in this process with one thread; vLLM, which is left out where it is
not installed, has a process of its own beside it. The library's speed depends on how its cache is sized: it is measured
with each of `MANAGER_SIZES`, and the best counts. Everything is started and warmed up before the clock runs. Without
--model the weights are random, of the size of the quickstart's model.
"""

import argparse
import asyncio
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, Qwen3Config

from bench.charts import Panel, draw_curves, for_plots
from bench.results import conditions, keep, table
from darts_async.config import VllmConfig
from darts_async.generator.embedded.engine import EmbeddedEngine
from darts_async.generator.engine import Engine
from darts_async.generator.vllm.installed import find_vllm
from darts_async.protocol import Generate, SamplingParams, sample_id_of

CONCURRENCY: Final = (1, 16, 64, 128)
SAMPLES_PER_GROUP: Final = 16
RESULT_DEADLINE_S: Final = 120.0
MAX_PROMPT_TOKENS: Final = 30
MANAGER_SIZES: Final = ((32, 2048), (128, 512))
"""Tokens in a page of the cache, and tokens in a batch at most."""
CANCEL_CONCURRENCY: Final = 64
NUM_CANCELS: Final = 200
CANCEL_NEW_TOKENS: Final = 900

Run = Callable[[], int]
Speeds = dict[int, dict[str, float]]
"""Tokens per second by number of samples and engine."""
PLOT: Final = "engines.png"


@dataclass(frozen=True, slots=True)
class Cancels:
    """How soon an engine was rid of a sample."""

    name: str
    latencies_s: list[float]
    steps_s: list[float]
    """Steps without a cancel; none where there are no steps."""


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a model; random weights without it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all three")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=for_plots, help="directory for engines.md, .json and .png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    vllm = find_vllm()
    model = load_model(arguments.model, arguments.dtype)
    with asyncio.Runner() as runner:
        engine = None if vllm is None else runner.run(load_vllm(model, arguments.dtype))
        speeds: Speeds = {}
        for num_samples in CONCURRENCY:
            speeds[num_samples] = measure(runner, model, engine, num_samples, arguments.new_tokens, arguments.repeats)
            print(num_samples, "concurrent", file=sys.stderr)
        cancels = runner.run(measure_cancels(model, engine))
        if engine is not None:
            runner.run(engine.close())
    named = "vLLM is not installed and left out" if vllm is None else f"{vllm.name} {vllm.version}"
    text = report(arguments, named, speeds, cancels)
    print(text)
    if arguments.out:
        write(arguments.out, text, speeds, cancels)


def report(arguments: argparse.Namespace, vllm: str, speeds: Speeds, cancels: list[Cancels]) -> str:
    """Both tables."""
    names = list(speeds[CONCURRENCY[0]])
    cancelled = []
    for each in cancels:
        p50, p99 = (quantiles(each.latencies_s, n=100)[place] * 1000 for place in (49, 98))
        step = f"{median(each.steps_s) * 1000:.1f}" if each.steps_s else "-"
        cancelled.append([each.name, f"{p50:.1f}", f"{p99:.1f}", step])
    return "\n".join(
        [
            "# Engines: decoding speed and cancel latency",
            "",
            f"{conditions('engines')} torch {torch.__version__}, transformers {transformers.__version__}, {vllm}; "
            f"{arguments.dtype}; {arguments.new_tokens} new tokens each, with log-probabilities; medians of "
            f"{arguments.repeats}, in turn. "
            "transformers: its continuous batching, the better of two sizings of its cache.",
            "",
            *table(
                ["concurrent", *(f"{name}, tokens/s" for name in names)],
                [[str(number), *(f"{rate:,.0f}" for rate in rates.values())] for number, rates in speeds.items()],
            ),
            "",
            f"![tokens per second]({PLOT})",
            "",
            f"From a cancel to the events that acknowledge it, {NUM_CANCELS} of them:",
            "",
            *table(
                [f"cancel, {CANCEL_CONCURRENCY} in flight", "p50, ms", "p99, ms", "a step, p50, ms"],
                cancelled,
            ),
        ]
    )


def write(directory: Path, text: str, speeds: Speeds, cancels: list[Cancels]) -> None:
    """The tables, the numbers and the plot."""
    keep(directory, "engines", text, {"tokens_per_s": speeds, "cancels": [asdict(each) for each in cancels]})
    curves = {
        name: [(float(number), rates[name]) for number, rates in speeds.items()] for name in speeds[CONCURRENCY[0]]
    }
    draw_curves(directory / PLOT, [Panel("concurrent samples", "tokens/s", curves, log="xy")])


def measure(
    runner: asyncio.Runner, model: Any, vllm: Engine | None, num_samples: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    """Median tokens per second of the embedded engine, vLLM and transformers' best-sized manager, measured in turn."""
    prompts = make_prompts(num_samples)
    managers = [start_manager(copy.deepcopy(model), num_samples, new_tokens, *size) for size in MANAGER_SIZES]
    embedded = load_embedded(model, num_samples, new_tokens + 32)
    engines: dict[str, Engine] = {"embedded": embedded} | ({} if vllm is None else {"vLLM": vllm})
    runs: list[Run] = [partial(run_in, runner, engine, prompts, new_tokens) for engine in engines.values()]
    runs += [partial(run_manager, manager, prompts) for manager in managers]
    for run in runs:
        run()
    speeds = [[tokens_per_s(run) for run in runs] for _ in range(repeats)]
    runner.run(embedded.close())
    for manager in managers:
        manager.stop(block=True, timeout=RESULT_DEADLINE_S)
    medians = [median(column) for column in zip(*speeds, strict=True)]
    return dict(zip(engines, medians, strict=False)) | {"transformers": max(medians[len(engines) :])}


async def measure_cancels(model: Any, vllm: Any) -> list[Cancels]:
    """From the cancel to the events that acknowledge it, with `CANCEL_CONCURRENCY` samples in flight."""
    embedded = load_embedded(model, CANCEL_CONCURRENCY, CANCEL_NEW_TOKENS + 32)
    found = [Cancels("embedded", *await cancel_latencies(embedded))]
    await embedded.close()
    if vllm is not None:
        found.append(Cancels("vLLM", *await cancel_latencies(vllm)))
        found.append(Cancels("vLLM, paused", await paused_cancel_latencies(vllm), []))
    return found


async def cancel_latencies(engine: Engine) -> tuple[list[float], list[float]]:
    """Seconds until each of many cancels was acknowledged, and of a step without one. A new sample takes each place."""
    next_id = 0
    latencies_s: list[float] = []
    steps_s: list[float] = []
    while len(latencies_s) < NUM_CANCELS:
        while engine.num_unfinished < CANCEL_CONCURRENCY:
            engine.start(endless_request(next_id))
            next_id += 1
        for _ in range(3):
            start_s = time.perf_counter()
            await engine.step()
            steps_s.append(time.perf_counter() - start_s)
        latencies_s.append(await cancel(engine, next_id - CANCEL_CONCURRENCY // 2))
    await cancel_all(engine, next_id)
    return latencies_s, steps_s


async def paused_cancel_latencies(vllm: Any) -> list[float]:
    """The same while vLLM stands still; every pause sees four of them."""
    next_id = 0
    latencies_s: list[float] = []
    while len(latencies_s) < NUM_CANCELS:
        while vllm.num_unfinished < CANCEL_CONCURRENCY:
            vllm.start(endless_request(next_id))
            next_id += 1
        for _ in range(3):
            await vllm.step()
        async with vllm.paused():
            vllm.take()
            latencies_s += [await cancel(vllm, next_id - CANCEL_CONCURRENCY // 2 - place) for place in range(4)]
    await cancel_all(vllm, next_id)
    return latencies_s


async def cancel(engine: Engine, sample_id: int) -> float:
    """Seconds until a cancel was acknowledged; nothing is measured of a sample that had left before."""
    start_s = time.perf_counter()
    engine.cancel(sample_id)
    events = await engine.step()
    assert [end.sample_id for end in events.ended] == [sample_id]
    return time.perf_counter() - start_s


async def cancel_all(engine: Engine, num_ids: int) -> None:
    """Leave the engine empty."""
    for sample_id in range(num_ids):
        engine.cancel(sample_id)
    while engine.num_unfinished:
        await engine.step()


def endless_request(sample_id: int) -> Generate:
    """A sample that does not end by itself while it is measured."""
    prompt = np.array([5, 6, 7, 8], np.int32)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=CANCEL_NEW_TOKENS)
    return Generate(sample_id, prompt, np.empty(0, np.int32), seed=sample_id, sampling=sampling)


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


def load_embedded(model: Any, num_slots: int, max_context_tokens: int) -> EmbeddedEngine:
    """A copy is taken over. No token ends a response, here and in `load_vllm`."""
    return EmbeddedEngine(
        copy.deepcopy(model), num_slots=num_slots, max_context_tokens=max_context_tokens, eos_token_ids=()
    )


async def load_vllm(model: Any, dtype: str) -> Any:
    """vLLM with as many slots as are ever needed."""
    from darts_async.generator.vllm.engine import VllmEngine
    from darts_async.generator.vllm.startup import VllmRequest, start_vllm

    thread = ThreadPoolExecutor(max_workers=1)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(Path(directory))
        num_slots, max_context_tokens = max(CONCURRENCY), CANCEL_NEW_TOKENS + 32
        wanted = VllmRequest(directory, VllmConfig(), dtype, num_slots, max_context_tokens, seed=0)
        started = await asyncio.to_thread(start_vllm, thread, wanted)
    return VllmEngine(replace(started, eos_token_ids=()), thread, step_deadline_s=RESULT_DEADLINE_S)


def load_model(model_path: str | None, dtype: str) -> Any:
    """The model to measure, or one of the quickstart's size with random weights."""
    if model_path is not None:
        return AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
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
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()


def run_in(runner: asyncio.Runner, engine: Engine, prompts: list[NDArray[np.int32]], new_tokens: int) -> int:
    """`run_engine` on this loop."""
    return runner.run(run_engine(engine, prompts, new_tokens))


async def run_engine(engine: Engine, prompts: list[NDArray[np.int32]], new_tokens: int) -> int:
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
