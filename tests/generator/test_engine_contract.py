"""What every engine promises, checked on both that run in this process."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from darts_async.config import ScriptConfig
from darts_async.config.engines import BuiltIn, capabilities_of
from darts_async.generator.embedded.engine import EmbeddedEngine
from darts_async.generator.engine import Engine, SampleEnd
from darts_async.generator.scripted import ScriptedEngine
from darts_async.generator.vllm.engine import VllmEngine
from darts_async.protocol import Generate
from tests.generator.world import Record, decode, embedded, generate, run


@dataclass
class VirtualClock:
    """Time that passes only by sleeping."""

    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def scripted(*, num_slots: int = 4, max_context_tokens: int = 96) -> ScriptedEngine:
    script = ScriptConfig(median_tokens=20)
    return ScriptedEngine(
        script, num_slots=num_slots, max_context_tokens=max_context_tokens, clock=VirtualClock(), vocab_size=48
    )


def endless(*, num_slots: int = 4, max_context_tokens: int = 96) -> Engine:
    """The embedded engine with an end-of-sequence token that does not exist, so that samples run to their limit."""
    return embedded(num_slots=num_slots, max_context_tokens=max_context_tokens, eos=1000)


MakeEngine = Callable[..., Engine]


@pytest.fixture(params=[endless, scripted], ids=["embedded", "scripted"])
def make(request: pytest.FixtureRequest) -> MakeEngine:
    maker: MakeEngine = request.param
    return maker


def test_an_engine_says_of_itself_what_settings_are_checked_by() -> None:
    found = {"embedded": EmbeddedEngine, "scripted": ScriptedEngine, "vllm": VllmEngine}
    assert {name: capabilities_of(name) for name in found} == {name: kind.capabilities for name, kind in found.items()}


def test_nothing_special_is_taken_for_granted_of_an_engine_that_is_not_in_the_table() -> None:
    assert capabilities_of("my_engine:Mine") == BuiltIn()


async def test_every_sample_ends_once_with_all_its_tokens(make: MakeEngine) -> None:
    record = await decode(make(num_slots=3), *(generate(i, max_new_tokens=3 + i) for i in range(8)))
    assert set(record.ended) == set(range(8))
    for sample_id, end in record.ended.items():
        assert end.num_tokens == len(record.tokens[sample_id]) <= 3 + sample_id
        assert end.finish_reason in ("stop", "length")
        assert all(logprob < 0 for logprob in record.logprobs[sample_id])


async def test_an_idle_engine_steps_at_once_with_nothing(make: MakeEngine) -> None:
    engine = make()
    events = await engine.step()
    assert len(events.sample_ids) == 0
    assert not events.ended
    await engine.close()


async def test_the_limit_ends_a_sample_with_length(make: MakeEngine) -> None:
    record = await decode(make(), generate(0, max_new_tokens=2))
    assert record.ended[0] == SampleEnd(0, 2, "length")


async def test_a_cancelled_sample_is_acknowledged_and_frees_its_slot_at_the_next_step(make: MakeEngine) -> None:
    engine = make(num_slots=1)
    record = Record()
    engine.start(generate(0))
    engine.start(generate(1))
    for _ in range(3):
        record.add(await engine.step())
    assert len(record.tokens[0]) == 3
    assert 1 not in record.tokens
    engine.cancel(0)
    events = await engine.step()
    assert events.ended == (SampleEnd(0, 3, None),)
    assert events.sample_ids.tolist() == [1]
    await engine.close()


async def test_a_waiting_sample_can_be_cancelled(make: MakeEngine) -> None:
    engine = make(num_slots=1)
    engine.start(generate(0))
    engine.start(generate(1, prefix=(3, 4)))
    engine.cancel(1)
    events = await engine.step()
    assert events.ended == (SampleEnd(1, 2, None),)
    assert events.sample_ids.tolist() == [0]
    await engine.close()


async def test_a_sample_cancelled_before_its_first_step_is_still_acknowledged(make: MakeEngine) -> None:
    engine = make()
    engine.start(generate(0))
    engine.cancel(0)
    assert engine.num_unfinished == 1
    record = await run(engine)
    assert record.ended == {0: SampleEnd(0, 0, None)}
    assert record.tokens == {}
    await engine.close()


async def test_cancelling_an_unknown_or_ended_sample_does_nothing(make: MakeEngine) -> None:
    engine = make()
    engine.cancel(7)
    engine.start(generate(0, max_new_tokens=1))
    record = await run(engine)
    engine.cancel(0)
    record.add(await engine.step())  # raises on a second end
    assert record.ended[0].finish_reason == "length"
    await engine.close()


async def test_cancelling_twice_gives_one_end(make: MakeEngine) -> None:
    engine = make()
    engine.start(generate(0))
    record = Record()
    record.add(await engine.step())
    engine.cancel(0)
    engine.cancel(0)
    record = await run(engine, record)
    assert record.ended[0] == SampleEnd(0, 1, None)
    await engine.close()


async def test_a_prefix_counts_and_is_not_reported_again(make: MakeEngine) -> None:
    record = await decode(make(), generate(0, prefix=(8, 9, 10), max_new_tokens=5))
    assert len(record.tokens[0]) == 2
    assert record.ended[0] == SampleEnd(0, 5, "length")


async def test_a_continued_sample_draws_what_it_would_have_drawn(make: MakeEngine) -> None:
    whole = await decode(make(), generate(0, max_new_tokens=12))
    tokens = whole.tokens[0]
    others = [generate(i, prompt=(2, 3)) for i in (1, 2)]
    rest = await decode(make(), *others, generate(0, prefix=tokens[:5], max_new_tokens=12))
    assert rest.tokens[0] == tokens[5:]
    assert rest.ended[0] == whole.ended[0]
    np.testing.assert_allclose(rest.logprobs[0], whole.logprobs[0][5:], atol=1e-4)


async def test_tokens_depend_on_the_seed_and_not_on_the_batch(make: MakeEngine) -> None:
    requests = [generate(i, prompt=range(1, 3 + i), seed=100 + i) for i in range(9)]
    together = await decode(make(num_slots=9), *requests)
    by_twos = await decode(make(num_slots=2), *reversed(requests))
    assert together.tokens == by_twos.tokens
    other_seed = await decode(make(), generate(0, prompt=(1, 2), seed=5))
    assert other_seed.tokens[0] != together.tokens[0]


async def test_lower_priority_numbers_go_first_and_equals_by_arrival(make: MakeEngine) -> None:
    engine = make(num_slots=1)
    for sample_id, priority in ((0, 1), (1, 1), (2, 0), (3, 0)):
        engine.start(generate(sample_id, max_new_tokens=1, priority=priority))
    order = [(await engine.step()).sample_ids.tolist() for _ in range(4)]
    assert order == [[2], [3], [0], [1]]
    await engine.close()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (generate(0, prompt=range(1, 41), max_new_tokens=57), "max_context_tokens 96"),
        (generate(0, prompt=()), "empty"),
        (generate(0, prefix=(1, 2), max_new_tokens=2), "max_new_tokens 2"),
        (generate(0, temperature=0.0), "temperature 0.0"),
        (generate(0, top_p=0.0), "top_p 0.0"),
    ],
)
async def test_what_cannot_be_decoded_is_rejected_with_the_reason(
    make: MakeEngine, request_: Generate, reason: str
) -> None:
    engine = make()
    engine.start(generate(1, max_new_tokens=1))
    engine.start(request_)
    record = await run(engine)
    assert reason in record.rejected[0]
    assert set(record.ended) == {1}
    await engine.close()


async def test_a_sample_that_just_fits_is_decoded_to_its_limit(make: MakeEngine) -> None:
    record = await decode(make(max_context_tokens=8), generate(0, prompt=(1, 2, 3, 4), max_new_tokens=4))
    assert record.ended[0] == SampleEnd(0, 4, "length")


async def test_tokens_of_cancelled_samples_are_counted(make: MakeEngine) -> None:
    engine = make()
    engine.start(generate(0))
    engine.start(generate(1, prefix=(1, 2, 3)))
    await engine.step()
    await engine.step()
    engine.cancel(0)
    engine.cancel(1)
    await run(engine)
    assert engine.num_tokens_decoded == 4
    await engine.close()


async def test_a_call_after_close_is_a_bug_and_closing_twice_is_not(make: MakeEngine) -> None:
    engine = make()
    await engine.close()
    await engine.close()
    with pytest.raises(AssertionError, match="closed"):
        engine.start(generate(0))


async def test_an_id_started_twice_is_a_bug(make: MakeEngine) -> None:
    engine = make()
    engine.start(generate(0))
    with pytest.raises(AssertionError, match="started twice"):
        engine.start(generate(0))
    await engine.close()
