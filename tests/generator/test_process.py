"""The owner of an engine, over an engine whose last steps bring tokens that nobody waits for."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from darts_async.config import GeneratorConfig, RunConfig, WeightsConfig
from darts_async.config.engines import Capabilities
from darts_async.errors import ConfigError, ExtensionError
from darts_async.faults import Faults
from darts_async.generator import process
from darts_async.generator.engine import Hold, SampleEnd, StepEvents
from darts_async.generator.process import GeneratorActor, make_engine
from darts_async.generator.stop_strings import StopStrings
from darts_async.protocol import (
    Generate,
    GeneratorReady,
    Greet,
    Message,
    SampleCancelled,
    SampleFinished,
    TokensDecoded,
)
from darts_async.telemetry import BusyClock
from darts_async.trace import Trace, Value
from darts_async.transport import Received
from tests.generator.world import generate
from tests.support.byte_tokenizer import make_byte_tokenizer

HOST = "127.0.0.7"


class NoWeights:
    """A transfer that is never told anything."""

    num_ranks = 1

    async def open(self, *_: object) -> None:
        """Nothing to do."""

    async def close(self, deadline_s: float) -> None:
        """Nothing to do."""


class LastWords:
    """An engine in which a sample that is cancelled brings one more token, as one that decodes ahead does."""

    num_slots, max_context_tokens = 4, 64
    capabilities = Capabilities(decodes_by_itself=True)

    def __init__(self) -> None:
        self.num_tokens_decoded = 0
        self.interface: str | None = None
        self._lengths: dict[int, int] = {}
        self._cancelled: set[int] = set()

    @property
    def num_unfinished(self) -> int:
        return len(self._lengths)

    def start(self, request: Generate) -> None:
        self._lengths[request.sample_id] = 0

    def cancel(self, sample_id: int) -> None:
        self._cancelled.add(sample_id)

    async def step(self) -> StepEvents:
        await asyncio.sleep(0)
        ids = sorted(self._lengths)
        self.num_tokens_decoded += len(ids)
        for sample_id in ids:
            self._lengths[sample_id] += 1
        ended = tuple(SampleEnd(i, self._lengths.pop(i), None) for i in ids if i in self._cancelled)
        return StepEvents(np.array(ids, np.int64), np.ones(len(ids), np.int32), np.zeros(len(ids), np.float32), ended)

    def weight_transfer(self, hold: Hold, interface: str, config: WeightsConfig) -> Any:
        self.interface = interface
        return NoWeights()

    async def close(self) -> None:
        """Nothing to do."""


class Watched(BusyClock):
    """Knows how many intervals are open."""

    num_open = 0

    @contextmanager
    def busy(self, stage: str, **args: Value) -> Iterator[None]:
        self.num_open += 1
        with super().busy(stage, **args):
            yield
        self.num_open -= 1


@asynccontextmanager
async def decoding(
    engine: LastWords,
    send: Callable[[str, str, Message], None],
    clock: BusyClock,
    flush_every_steps: int,
    stopping: StopStrings | None = None,
) -> AsyncIterator[Callable[[Message], None]]:
    """A generator's actor with this engine; yields what has it hear a message of the shaper."""
    config = RunConfig(generator=GeneratorConfig(flush_every_steps=flush_every_steps))
    runtime: Any = SimpleNamespace(config=config, host=HOST, send=send, clock=clock, trace=Trace(), faults=Faults())
    with mock.patch.object(process, "make_stop_strings", return_value=stopping):
        actor = GeneratorActor(runtime)

    def hear(message: Message) -> None:
        actor.handle(Received(link="generators", peer="shaper/0", incarnation=1, message=message))

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        with mock.patch.object(process, "make_engine", return_value=engine):
            await actor.open(tasks)
        yield hear
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
    await actor.close()


async def test_what_was_decoded_before_a_new_greeting_is_told_before_it_is_answered() -> None:
    engine, told, is_ready = LastWords(), list[Message](), asyncio.Event()

    def send(link: str, peer: str, message: Message) -> None:
        told.append(message)
        if isinstance(message, GeneratorReady):
            is_ready.set()

    async with decoding(engine, send, BusyClock(), flush_every_steps=1000) as hear:
        assert engine.interface == HOST, "the collective listens at the address of its node"
        hear(Greet(1))
        await is_ready.wait()
        is_ready.clear()
        for sample_id in range(3):
            hear(generate(sample_id))
        while engine.num_tokens_decoded < 30:  # noqa: ASYNC110  (the actor's own task decodes)
            await asyncio.sleep(0)
        hear(Greet(2))
        await is_ready.wait()

    assert isinstance(told[-1], GeneratorReady)
    assert told[-1].greeting == 2
    tokens = [message for message in told if isinstance(message, TokensDecoded)]
    assert sum(len(message.token_ids) for message in tokens) == engine.num_tokens_decoded
    assert [message.sample_id for message in told if isinstance(message, SampleCancelled)] == [0, 1, 2]


@pytest.mark.parametrize("decodes_by_itself", [True, False])
async def test_telling_of_tokens_costs_an_engine_time_unless_it_decodes_meanwhile(decodes_by_itself: bool) -> None:
    engine, clock, num_open, is_told = LastWords(), Watched(), list[int](), asyncio.Event()
    engine.capabilities = Capabilities(decodes_by_itself=decodes_by_itself)

    def send(link: str, peer: str, message: Message) -> None:
        if isinstance(message, TokensDecoded):
            num_open.append(clock.num_open)
            if len(num_open) > 20:
                is_told.set()

    async with decoding(engine, send, clock, flush_every_steps=1) as hear:
        hear(Greet(1))
        hear(generate(0))
        await is_told.wait()
    assert set(num_open) == {1 if decodes_by_itself else 0}


class Writer(LastWords):
    """Writes the same text for every sample, a byte at a step, and does not end by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = make_byte_tokenizer().encode(text).ids

    def start(self, request: Generate) -> None:
        self._lengths[request.sample_id] = len(request.prefix_tokens)

    async def step(self) -> StepEvents:
        events = await super().step()
        lengths = [
            self._lengths.get(i, 0) or next(e.num_tokens for e in events.ended if e.sample_id == i)
            for i in events.sample_ids
        ]
        tokens = np.array([self._text[(n - 1) % len(self._text)] for n in lengths], np.int32)
        return StepEvents(events.sample_ids, tokens, events.logprobs, events.ended)


async def test_a_response_ends_at_a_stop_string_and_its_slot_is_free() -> None:
    tokenizer = make_byte_tokenizer()
    engine, told, is_over = Writer("one STOP two"), list[Message](), asyncio.Event()

    def send(link: str, peer: str, message: Message) -> None:
        told.append(message)
        if sum(isinstance(each, SampleFinished) for each in told) == 3:
            is_over.set()

    stopping = StopStrings(("STOP",), tokenizer)
    async with decoding(engine, send, BusyClock(), flush_every_steps=1, stopping=stopping) as hear:
        hear(Greet(1))
        hear(generate(0))
        hear(generate(1, prefix=tokenizer.encode("one ST").ids))
        hear(generate(2, prefix=tokenizer.encode("one STOP").ids))
        await is_over.wait()
        while engine.num_unfinished:  # noqa: ASYNC110  (the actor's own task decodes)
            await asyncio.sleep(0)

    texts = dict.fromkeys(range(3), "")
    for message in told:
        if isinstance(message, TokensDecoded):
            starts = np.cumsum(message.num_tokens) - message.num_tokens
            for sample_id, start, count in zip(message.sample_ids, starts, message.num_tokens, strict=True):
                texts[sample_id] += tokenizer.decode(message.token_ids[start : start + count].tolist())
    assert texts == {0: "one STOP", 1: "OP", 2: ""}
    ends = {message.sample_id: message for message in told if isinstance(message, SampleFinished)}
    assert {i: (end.finish_reason, end.num_tokens) for i, end in ends.items()} == dict.fromkeys(range(3), ("stop", 8))
    assert engine.num_tokens_decoded == 8 + 2 + stopping.num_tokens_dropped
    assert not [message for message in told if isinstance(message, SampleCancelled)], "the shaper asked for none"


def test_an_engine_that_does_not_say_what_it_can_do_is_refused() -> None:
    config = RunConfig.model_validate({"generator": {"engine": "tests.fakes.sources:no_engine"}})
    with pytest.raises(ExtensionError, match=r"what it makes, object, has no `capabilities`; give it `capabilities ="):
        make_engine(config)


class Able(LastWords):
    """An engine of the user's that can do more than is assumed, and one thing less."""

    capabilities = Capabilities(receives_directly=True, reprefills=True, temperatures=(0.5, 1.5))

    def __init__(self, config: RunConfig) -> None:
        super().__init__()


@pytest.mark.parametrize("weights", [{"receive": "direct"}, {"reprefill": True}])
def test_an_engine_of_the_user_gets_the_settings_that_its_capabilities_allow(weights: dict[str, Any]) -> None:
    settings = {"generator": {"engine": f"{__name__}:Able"}, "weights": weights}
    assert isinstance(make_engine(RunConfig.model_validate(settings)), Able)
    plain = RunConfig.model_validate(settings | {"generator": {"engine": f"{__name__}:Plain"}})
    with pytest.raises(ConfigError, match=r"Plain receives weights staged and keeps its KV cache; leave both out"):
        make_engine(plain)


class Plain(Able):
    """An engine that can do nothing special."""

    capabilities = Capabilities()


def test_an_engine_of_the_user_is_not_asked_to_draw_at_a_temperature_at_which_it_cannot() -> None:
    settings = {"generator": {"engine": f"{__name__}:Able"}, "sampling": {"temperature": 2.0}}
    with pytest.raises(ConfigError, match=r"Able samples only at 0\.5 to 1\.5: choose a temperature in this range"):
        make_engine(RunConfig.model_validate(settings))
