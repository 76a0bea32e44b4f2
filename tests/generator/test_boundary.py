"""What a generator takes from the shaper and the learner, and that its engine decodes on whatever that was."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig, ScriptConfig
from darts_async.generator.boundary import refusal_of_learner, refusal_of_shaper
from darts_async.generator.scripted import ScriptedEngine
from darts_async.protocol import (
    Cancel,
    EpochFormed,
    Generate,
    Greet,
    LearnerToGenerator,
    SamplingParams,
    Score,
    ShaperToGenerator,
    UpdateCommitted,
    UpdateOffered,
    WeightManifest,
)
from darts_async.reward.process import RewardActor
from darts_async.simulation.chaos.process import finish
from darts_async.transport import Received
from tests.support.nonsense import messages

NONE = np.empty(0, np.int32)
HONEST = Generate((1 << 40) + 1, np.array([1, 2], np.int32), NONE, 7, SamplingParams(1.0, 1.0, 0, 5))
INFINITE = float("inf")


class StoppedClock:
    def now(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        pass


def asked(**changes: Any) -> Generate:
    return msgspec.structs.replace(HONEST, **changes)


@pytest.mark.parametrize(
    "message",
    [
        Greet(0),
        asked(sample_id=-1),
        asked(sample_id=1 << 62),
        asked(seed=-1),
        asked(seed=1 << 63),
        asked(priority=1 << 40),
        asked(sampling=SamplingParams(INFINITE, 1.0, 0, 5)),
        asked(sampling=SamplingParams(1.0, 1.0, 1 << 40, 5)),
    ],
)
def test_commands_that_cannot_be_meant_are_refused(message: ShaperToGenerator) -> None:
    assert refusal_of_shaper(message, ()) is not None


def test_a_sample_is_not_started_twice() -> None:
    assert refusal_of_shaper(HONEST, ()) is None
    assert refusal_of_shaper(HONEST, {HONEST.sample_id}) == f"sample {HONEST.sample_id} twice"
    assert refusal_of_shaper(Cancel(1 << 63), ()) is None, "unknown ids are answered by nothing"


@pytest.mark.parametrize(
    "message",
    [
        EpochFormed(1, 0, 2, "gloo", "127.0.0.1", 1.0),
        EpochFormed(1, 2, 2, "gloo", "127.0.0.1", 1.0),
        EpochFormed(1, 1, 1 << 40, "gloo", "127.0.0.1", 1.0),
        EpochFormed(1, 1, 2, "gloo", "127.0.0.1", INFINITE),
        UpdateOffered(1, -1, WeightManifest((), 4096), 1.0),
        UpdateOffered(1, 1, WeightManifest((), 4096), -1.0),
    ],
)
def test_epochs_and_offers_that_cannot_be_meant_are_refused(message: LearnerToGenerator) -> None:
    assert refusal_of_learner(message) is not None


def test_what_is_of_no_use_any_more_is_not_refused() -> None:
    assert refusal_of_learner(UpdateCommitted(-3, -1)) is None
    assert refusal_of_learner(EpochFormed(1, 1, 2, "gloo", "127.0.0.1", 1.0)) is None


@pytest.mark.slow
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(said=st.lists(messages(ShaperToGenerator), max_size=12), steps=st.lists(st.booleans(), min_size=12))
def test_the_engine_decodes_whatever_it_was_asked(said: list[ShaperToGenerator], steps: list[bool]) -> None:
    engine = ScriptedEngine(
        ScriptConfig(median_tokens=3.0), num_slots=2, max_context_tokens=16, seed=0, clock=StoppedClock()
    )
    ended: set[int] = set()
    live: set[int] = set()

    def step() -> None:
        events = finish(engine.step())
        over = {end.sample_id for end in events.ended} | {sample_id for sample_id, _ in events.rejected}
        ended.update(over)
        live.difference_update(over)

    for message, is_step in zip([HONEST, *said], [False, *steps], strict=False):
        if refusal_of_shaper(message, live) is None:
            match message:
                case Generate():
                    live.add(message.sample_id)
                    engine.start(message)
                case Cancel(sample_id=sample_id):
                    engine.cancel(sample_id)
        if is_step and engine.num_unfinished:
            step()
    for _ in range(200):
        if not engine.num_unfinished:
            break
        step()
    assert HONEST.sample_id in ended
    assert not live
    finish(engine.close())


def test_items_for_the_reward_process_before_this_one_are_dropped() -> None:
    """The pool has not started. The shaper gives them again to a process that says that it takes items."""
    unexpected: Callable[..., None] = pytest.fail
    runtime: Any = SimpleNamespace(config=RunConfig(), faults=SimpleNamespace(reach=unexpected))
    actor = RewardActor(runtime)
    actor.handle(Received("rewards", "shaper/0", 1, Score(1, "p", "a", {}, NONE, "stop")))
    assert actor.gauges().num_in_flight == 0
