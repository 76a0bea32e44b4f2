"""A generator whose shaper is away; its engine is scripted and its links are lists."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from darts_async.config import RunConfig
from darts_async.faults import Faults
from darts_async.generator.process import GeneratorActor
from darts_async.protocol import GeneratorReady, Greet, Message, TokensDecoded
from darts_async.telemetry import BusyClock
from darts_async.trace import Trace
from darts_async.transport import PeerDown, PeerUp, Received
from tests.generator.world import generate

SHAPER = "shaper/0"


class Generator:
    """The actor, and what it has told the shaper."""

    def __init__(self) -> None:
        script = {"median_tokens": 100_000, "prompt_sigma": 0.0, "sample_sigma": 0.0, "token_latency_s": 0.0}
        config = RunConfig.model_validate(
            {
                "generator": {"engine": "scripted", "num_slots": 64, "script": script, "max_context_tokens": 1 << 20},
                "sampling": {"max_new_tokens": 1 << 18},
            }
        )
        self.told: list[Message] = []
        self._tells = asyncio.Event()
        runtime: Any = SimpleNamespace(
            config=config, host="127.0.0.1", send=self._send, clock=BusyClock(), trace=Trace(), faults=Faults()
        )
        self.actor = GeneratorActor(runtime)

    def hear(self, message: Message) -> None:
        self.actor.handle(Received("generators", SHAPER, 1, message))

    @property
    def num_told(self) -> int:
        return sum(len(message.token_ids) for message in self.told if isinstance(message, TokensDecoded))

    def _send(self, link: str, peer: str, message: Message) -> None:
        assert (link, peer) == ("generators", SHAPER)
        self.told.append(message)
        self._tells.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self._tells.clear()
                await self._tells.wait()

    async def until_told(self, num_tokens: int) -> None:
        await self.until(lambda: self.num_told >= num_tokens)


@asynccontextmanager
async def decoding() -> AsyncIterator[Generator]:
    """A generator that has told the first tokens of two long samples."""
    generator = Generator()

    async def live() -> None:
        async with asyncio.TaskGroup() as tasks:
            await generator.actor.open(tasks)

    life = asyncio.create_task(live(), name="generator")
    generator.hear(Greet(1))
    for sample_id in (1, 2):
        generator.hear(generate(sample_id, max_new_tokens=1 << 18))
    await generator.until_told(20)
    yield generator
    life.cancel()
    await asyncio.wait([life], timeout=10)
    await generator.actor.close()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_nothing_is_decoded_while_the_shaper_is_away() -> None:
    async with decoding() as generator:
        generator.actor.handle(PeerDown("generators", SHAPER, 1, "it has ended"))
        assert generator.actor.gauges().num_in_flight == 0, "it holds samples, and does not hang"
        await turns(50)
        num_told = generator.num_told
        await turns(500)
        assert generator.num_told == num_told == generator.actor.gauges().num_tokens, "all it has decoded is told"
        generator.actor.handle(PeerUp("generators", SHAPER, 1))
        await generator.until_told(num_told + 20)


async def test_a_greeting_ends_every_sample_and_counts_all_of_its_tokens() -> None:
    async with decoding() as generator:
        generator.actor.handle(PeerDown("generators", SHAPER, 1, "it has ended"))
        generator.actor.handle(PeerUp("generators", SHAPER, 2))
        generator.hear(Greet(7))
        await generator.until(lambda: GeneratorReady(7, 64, 1 << 20) in generator.told)
        assert generator.num_told == generator.actor.gauges().num_tokens
        assert generator.actor.gauges().num_in_flight == 0
        prefix = np.arange(5, dtype=np.int32)
        generator.hear(generate(1, prefix=tuple(prefix.tolist()), max_new_tokens=1 << 18))
        await generator.until_told(generator.num_told + 20)
