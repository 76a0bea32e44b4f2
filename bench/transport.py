"""How many messages per second does a link carry, how long does one take, and what does CURVE cost?

    python bench/transport.py [--messages N] [--repeats N]

Two processes on this machine, a hub that sends and a spoke that handles and acknowledges, over loopback TCP under
uvloop. Throughput: time until the last message is acknowledged. Latency: half a round trip, one message at a time.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import uvloop

from darts_async.config import TransportConfig
from darts_async.protocol import Cancel, Message, TokensDecoded
from darts_async.transport import Endpoint, Link, Mailbox, Received, RunKeys, create_run_keys, load_keys

HUB, SPOKE = "hub", "spoke"
CONFIG = TransportConfig()
DEADLINE_S = 120.0
STOP = Cancel(-1)


def tokens_decoded(num_samples: int = 64, tokens_each: int = 4) -> TokensDecoded:
    """What a generator with 64 slots sends every 4 engine steps: 3 KB."""
    total = num_samples * tokens_each
    return TokensDecoded(
        policy_version=1,
        sample_ids=np.arange(num_samples, dtype=np.int64),
        num_tokens=np.full(num_samples, tokens_each, np.int32),
        token_ids=np.arange(total, dtype=np.int32),
        logprobs=np.zeros(total, np.float32),
    )


def keys_of(name: str, directory: Path | None) -> RunKeys | None:
    return load_keys(directory, name) if directory else None


async def echo(address: str, directory: Path | None) -> None:
    """The spoke: handles everything, answers each `Cancel`."""
    mailbox = Mailbox()
    keys = keys_of(SPOKE, directory)
    endpoint = Endpoint(SPOKE, 0, keys, CONFIG, mailbox)
    link = endpoint.connect_link(
        name="hub",
        address=address,
        peer=HUB,
        peer_key=keys.public_of(HUB) if keys else "",
        receives=Cancel | TokensDecoded,
        sends=Cancel,
    )
    with contextlib.suppress(StopAsyncIteration):
        while True:
            for event in await mailbox.receive(1.0):
                answer(link, event)
    mailbox.acknowledge()
    await endpoint.close()


def answer(link: Link, event: object) -> None:
    match event:
        case Received(message=Cancel(sample_id=-1)):
            raise StopAsyncIteration
        case Received(message=Cancel(sample_id=sample_id)) if sample_id > 0:
            link.send(HUB, Cancel(sample_id))


def run_spoke(address: str, directory: Path | None) -> None:
    uvloop.run(echo(address, directory))


async def settled(link: Link, mailbox: Mailbox, num_left: int = 0) -> None:
    """Until the spoke has acknowledged all but so many messages."""
    async with asyncio.timeout(DEADLINE_S):
        while link.num_unacknowledged(SPOKE) > num_left:
            await mailbox.receive(0.001)


async def throughput(link: Link, mailbox: Mailbox, message: Message, num_messages: int) -> float:
    start_s = time.perf_counter()
    for index in range(num_messages):
        link.send(SPOKE, message)
        if index % CONFIG.window == 0:
            await settled(link, mailbox, num_left=2 * CONFIG.window)
    await settled(link, mailbox)
    return num_messages / (time.perf_counter() - start_s)


async def latency_s(link: Link, mailbox: Mailbox, num_messages: int) -> list[float]:
    times_s = []
    for index in range(1, num_messages + 1):
        start_s = time.perf_counter()
        link.send(SPOKE, Cancel(index))
        while not any(isinstance(event, Received) for event in await mailbox.receive(DEADLINE_S)):
            pass
        times_s.append((time.perf_counter() - start_s) / 2)
    return times_s


async def measure(directory: Path | None, num_messages: int, repeats: int) -> tuple[float, float, float, float]:
    """Small messages/s, TokensDecoded/s, median and 99th percentile of the latency in seconds."""
    mailbox = Mailbox()
    keys = keys_of(HUB, directory)
    endpoint = Endpoint(HUB, 0, keys, CONFIG, mailbox)
    link = endpoint.bind_link(
        name="spokes",
        address="tcp://127.0.0.1:0",
        receives=Cancel,
        sends=Cancel | TokensDecoded,
        allowed={SPOKE: keys.public_of(SPOKE) if keys else ""},
    )
    process = multiprocessing.get_context("spawn").Process(target=run_spoke, args=(link.address, directory))
    process.start()
    await latency_s(link, mailbox, 100)
    small = [await throughput(link, mailbox, Cancel(0), num_messages) for _ in range(repeats)]
    large = [await throughput(link, mailbox, tokens_decoded(), num_messages // 4) for _ in range(repeats)]
    times_s = sorted(await latency_s(link, mailbox, num_messages // 10))
    link.send(SPOKE, STOP)
    await endpoint.close()
    await asyncio.to_thread(process.join, DEADLINE_S)
    return statistics.median(small), statistics.median(large), times_s[len(times_s) // 2], times_s[-len(times_s) // 100]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, {arguments.messages} messages, median of {arguments.repeats}\n")
    print("| | small messages/s | TokensDecoded(64 samples, 256 tokens)/s | latency p50 | p99 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "keys"
        create_run_keys(directory, [HUB, SPOKE])
        for label, where in (("without CURVE", None), ("with CURVE", directory)):
            small, large, p50_s, p99_s = uvloop.run(measure(where, arguments.messages, arguments.repeats))
            print(f"| {label} | {small:,.0f} | {large:,.0f} | {p50_s * 1e6:.0f} us | {p99_s * 1e6:.0f} us |")


if __name__ == "__main__":
    main()
