"""What does a weight update cost a generator on vLLM, against a bare torch.distributed broadcast of the same buckets?

    python -m bench.weights_vllm [--hidden 32 256] [--samples 32] [--repeats 5]

A learner process (torch alone) publishes versions to the real generator actor on vLLM, while samples are in flight, in
each of three ways: staged, direct, and staged with keys and values computed anew. `stall` is how long the actor stood
still; after `reprefill` the first step is longer too, which `gap` shows: the longest time without a token that reaches
the shaper. `bare` is the broadcast alone between two processes on the same machine, in the same run. Medians.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Coroutine
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.results import conditions
from bench.weights import bare_broadcast, bucket_sizes_of, free_port
from darts_async.config import WeightsConfig
from tests.generator.vllm.weights_world import Member, learner, until, vllm_member
from tests.generator.vllm.world import RunningVllm, running_vllm
from tests.generator.world import generate

WAYS: dict[str, dict[str, object]] = {
    "staged": {},
    "direct": {"receive": "direct"},
    "reprefill": {"reprefill": True},
}
T = TypeVar("T")
PROMPT = [5, 6, 14, 7, 8, 18]


def _has_decoded(member: Member, num_tokens: int) -> bool:
    return member.num_tokens() > num_tokens


async def measure(
    vllm: RunningVllm, settings: dict[str, object], *, hidden: int, samples: int, repeats: int
) -> dict[str, float]:
    """Medians over `repeats` updates, after one that forms the group."""
    weights = WeightsConfig.model_validate({"bucket_bytes": 1 << 20, "deadline_s": 60.0, **settings})
    stalls: list[float] = []
    gaps: list[float] = []
    transfers: list[float] = []
    reports = []
    async with vllm_member(vllm, "a", weights) as member, learner(weights, hidden_size=hidden) as source:
        member.joins(source)
        await source.publish(0)
        member.start(*(generate(i, prompt=PROMPT, max_new_tokens=480) for i in range(samples)))
        await until(lambda: len(member.samples) == samples)
        for version in range(1, repeats + 1):
            before = member.num_tokens()
            await until(partial(_has_decoded, member, before + 5 * samples))
            reports.append(await watching(member, source.publish(version), gaps))
            stalls.append(member.stalls_s[version])
            transfers.append(reports[-1]["transfer_s"])
        in_flight = sum(sample.reason is None for sample in member.samples.values())
    assert in_flight, "samples ended before the last update"
    return {
        "stall": statistics.median(stalls),
        "gap": statistics.median(gaps),
        "transfer": statistics.median(transfers),
        "bytes": reports[-1]["num_bytes"],
    }


async def watching(member: Member, publishing: Coroutine[Any, Any, T], gaps_s: list[float]) -> T:
    """Await it and the first steps behind it, and append the longest time without a token."""
    task = asyncio.create_task(publishing, name="publish")
    last, since, longest, behind = member.num_tokens(), time.perf_counter(), 0.0, 0
    while not task.done() or behind < 3:
        await asyncio.sleep(0.0005)
        now, count = time.perf_counter(), member.num_tokens()
        longest = max(longest, now - since)
        if count != last:
            last, since = count, now
            behind += task.done()
    gaps_s.append(longest)
    return task.result()


async def bare(model: torch.nn.Module, repeats: int) -> float:
    """Seconds of a broadcast of the same buckets between two fresh processes."""
    sizes = bucket_sizes_of(dict(model.named_parameters()), WeightsConfig(bucket_bytes=1 << 20))
    port, loop = free_port(), asyncio.get_running_loop()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        ranks = [loop.run_in_executor(pool, partial(bare_broadcast, r, 2, port, sizes, repeats)) for r in (0, 1)]
        times_s, _ = await asyncio.gather(*ranks)
    return statistics.median(times_s)


async def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, gloo over loopback,")
    print(f"buckets of 1 MiB, {arguments.samples} samples in flight, medians of {arguments.repeats}.\n")
    print("| bytes | way | bare broadcast | transfer | stall | longest gap between tokens |")
    print("|---|---|---|---|---|---|")
    for hidden in arguments.hidden:
        with tempfile.TemporaryDirectory() as directory:
            async with running_vllm(Path(directory), hidden_size=hidden) as vllm:
                for way, settings in WAYS.items():
                    bare_s = await bare(vllm.model, arguments.repeats)
                    row = await measure(
                        vllm, settings, hidden=hidden, samples=arguments.samples, repeats=arguments.repeats
                    )
                    size = f"{row['bytes'] / 1e6:.2f} MB"
                    print(
                        f"| {size} | {way} | {bare_s * 1e3:.1f} ms | {row['transfer'] * 1e3:.0f} ms "
                        f"| {row['stall'] * 1e3:.0f} ms | {row['gap'] * 1e3:.0f} ms |",
                        flush=True,
                    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 1024])
    print(conditions("weights_vllm"))
    asyncio.run(main(parser.parse_args()))
