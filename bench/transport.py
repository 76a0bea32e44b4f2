"""How many messages per second does a link carry, and how long does one take? With CURVE, as every link.

    python -m bench.transport [--messages N] [--repeats N] [--out DIR]

Two processes on this machine, a hub that sends and a spoke that handles and acknowledges, over loopback TCP under
uvloop. Throughput: time until a message behind the last is answered. Latency: half a round trip, one message at a time.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop

from bench.charts import draw_bars, for_plots
from bench.results import conditions, keep, table
from darts_async.config import TransportConfig
from darts_async.protocol import Cancel, Message, Score, TokensDecoded, TrainGroup
from darts_async.transport import Endpoint, Link, Mailbox, Received, create_run_keys, load_keys

HUB, SPOKE = "hub", "spoke"
CONFIG = TransportConfig()
DEADLINE_S = 120.0
STOP = Cancel(-1)
PLOT = "transport.png"


Carriable = Cancel | TokensDecoded | Score | TrainGroup


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


def score(num_tokens: int = 1024) -> Score:
    """A response that is to be scored: 4 KB."""
    return Score(0, "prompt", "answer", "{}", np.arange(num_tokens, dtype=np.int32), "stop")


def train_group(num_samples: int = 8, tokens_each: int = 1024) -> TrainGroup:
    """What the learner trains on: 96 KB."""
    total = num_samples * tokens_each
    return TrainGroup(
        group_id=0,
        step=0,
        prompt_tokens=np.zeros(128, np.int32),
        num_tokens=np.full(num_samples, tokens_each, np.int32),
        token_ids=np.zeros(total, np.int32),
        logprobs=np.zeros(total, np.float32),
        versions=np.zeros(total, np.int32),
        rewards=np.zeros(num_samples, np.float32),
        weights=np.ones(num_samples, np.float32),
    )


KINDS: dict[str, tuple[Message, int]] = {
    "Cancel": (Cancel(0), 1),
    "TokensDecoded (64 samples, 256 tokens)": (tokens_decoded(), 4),
    "Score (1,024 tokens)": (score(), 4),
    "TrainGroup (8 of 1,024 tokens)": (train_group(), 40),
}
"""What links carry, and how many times fewer are sent than small ones."""


async def echo(address: str, directory: Path) -> None:
    """The spoke: handles everything, answers each `Cancel`."""
    mailbox = Mailbox()
    keys = load_keys(directory, SPOKE)
    endpoint = Endpoint(SPOKE, 0, keys, CONFIG, mailbox)
    link = endpoint.connect_link(
        name="hub",
        address=address,
        peer=HUB,
        peer_key=keys.public_of(HUB),
        receives=Carriable,
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


def run_spoke(address: str, directory: Path) -> None:
    uvloop.run(echo(address, directory))


async def settled(link: Link, mailbox: Mailbox, num_left: int) -> None:
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
    await answered(link, mailbox, num_messages)
    return num_messages / (time.perf_counter() - start_s)


async def answered(link: Link, mailbox: Mailbox, index: int) -> None:
    """Until the spoke has handled everything and said so."""
    link.send(SPOKE, Cancel(index))
    while not any(isinstance(event, Received) for event in await mailbox.receive(DEADLINE_S)):
        pass


async def latency_s(link: Link, mailbox: Mailbox, num_messages: int) -> list[float]:
    times_s = []
    for index in range(1, num_messages + 1):
        start_s = time.perf_counter()
        await answered(link, mailbox, index)
        times_s.append((time.perf_counter() - start_s) / 2)
    return times_s


@dataclass(frozen=True)
class Carried:
    """What a link has carried."""

    messages_per_s: dict[str, list[float]]
    """By kind of message: one for each repeat."""
    latencies_s: list[float]
    """In ascending order."""

    def latency_s(self, share: float) -> float:
        """A quantile."""
        return self.latencies_s[round(share * (len(self.latencies_s) - 1))]


async def measure(directory: Path, num_messages: int, repeats: int) -> Carried:
    """All kinds of messages, again and again, and then the latency of a small one."""
    mailbox = Mailbox()
    keys = load_keys(directory, HUB)
    endpoint = Endpoint(HUB, 0, keys, CONFIG, mailbox)
    link = endpoint.bind_link(
        name="spokes",
        address="tcp://127.0.0.1:0",
        receives=Cancel,
        sends=Carriable,
        allowed={SPOKE: keys.public_of(SPOKE)},
    )
    process = multiprocessing.get_context("spawn").Process(target=run_spoke, args=(link.address, directory))
    process.start()
    await latency_s(link, mailbox, 100)
    rates: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(repeats):
        for name, (message, fewer) in KINDS.items():
            rates[name].append(await throughput(link, mailbox, message, num_messages // fewer))
    times_s = sorted(await latency_s(link, mailbox, num_messages // 10))
    mailbox.acknowledge()  # or the spoke waits for it in vain
    link.send(SPOKE, STOP)
    await endpoint.close()
    await asyncio.to_thread(process.join, DEADLINE_S)
    return Carried(rates, times_s)


def report(arguments: argparse.Namespace, found: dict[str, Carried]) -> str:
    """The table."""
    titles = ["", *(f"{name}/s" for name in KINDS), "latency p50", "p99"]
    rows = [
        [
            label,
            *(f"{statistics.median(rates):,.0f}" for rates in each.messages_per_s.values()),
            *(f"{each.latency_s(share) * 1e6:.0f} us" for share in (0.5, 0.99)),
        ]
        for label, each in found.items()
    ]
    return "\n".join(
        [
            "# Transport: messages and latency",
            "",
            f"{conditions('transport')} Two processes on loopback, uvloop; up to {arguments.messages:,} messages, "
            f"medians of {arguments.repeats}. Cancel goes from the shaper to generators, TokensDecoded back, Score to "
            "rewards, TrainGroup to the learner. Latency: half of a round trip of a Cancel, one at a time.",
            "",
            *table(titles, rows),
            "",
            f"![messages per second]({PLOT})",
        ]
    )


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=for_plots, help="directory for transport.md, .json and .png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "keys"
        create_run_keys(directory, [HUB, SPOKE])
        found = {"with CURVE": uvloop.run(measure(directory, arguments.messages, arguments.repeats))}
    text = report(arguments, found)
    print(text)
    if arguments.out:
        numbers = {
            label: {"messages_per_s": each.messages_per_s, "latency_p50_s": each.latency_s(0.5)}
            | {"latency_p99_s": each.latency_s(0.99)}
            for label, each in found.items()
        }
        keep(arguments.out, "transport", text, {"links": numbers})
        bars = {name: {label: each.messages_per_s[name] for label, each in found.items()} for name in KINDS}
        draw_bars(arguments.out / PLOT, bars, "messages/s")


if __name__ == "__main__":
    main()
