"""A reward function that fails too often ends the run, and the error names it."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from darts_async.config import RunConfig
from darts_async.errors import RewardError
from darts_async.protocol import SampleScored, Score, ScoreFailed
from darts_async.reward import process
from darts_async.reward.process import MIN_ITEMS, WATCHED_ITEMS, RewardActor
from darts_async.transport import Received

OWN = "exact_match"


class Pool:
    """Only the reward function of a part fails."""

    def __init__(self, functions: Any, *_: object, **settings: object) -> None:
        self._fails = functions[0].function == OWN

    async def start(self) -> None:
        pass

    async def score(self, item: Score) -> object:
        if self._fails:
            return ScoreFailed(item.sample_id, "raised", "ValueError: no")
        return SampleScored(item.sample_id, 1.0)


def error_after(monkeypatch: pytest.MonkeyPatch, *functions: str) -> RewardError | None:
    """The error of the process after items with these functions."""

    def nothing(*_: object) -> None: ...

    mixture = [{"name": "a", "reward": OWN}, {"name": "b"}]
    config = RunConfig.model_validate({"prompts": {"mixture": mixture}, "reward": {"function": "math"}})
    monkeypatch.setattr(process, "RewardPool", Pool)
    monkeypatch.setattr(process, "become_subreaper", nothing)
    monkeypatch.setattr(process, "resolve_model_path", nothing)
    runtime: Any = SimpleNamespace(
        config=config,
        faults=SimpleNamespace(reach=nothing),
        clock=SimpleNamespace(busy=lambda _: nullcontext()),
        send=nothing,
        trace=SimpleNamespace(sample=nothing),
    )

    async def score() -> None:
        actor = RewardActor(runtime)
        async with asyncio.TaskGroup() as tasks:
            await actor.open(tasks)
            for number, function in enumerate(functions):
                item = Score(number, "p", "a", "{}", np.zeros(1, np.int32), "stop", function)
                actor.handle(Received("rewards", "shaper/0", 1, item))

    try:
        asyncio.run(score())
    except ExceptionGroup as group:
        [error] = group.exceptions
        assert isinstance(error, RewardError)
        return error
    return None


def test_the_function_of_a_part_is_named_although_that_of_the_settings_works(monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_after(monkeypatch, *[""] * WATCHED_ITEMS, *[OWN] * MIN_ITEMS)
    assert f"reward function {OWN!r} failed on 100% of the last {MIN_ITEMS} responses" in str(error)


def test_few_failures_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_after(monkeypatch, *[""] * WATCHED_ITEMS, *[OWN] * (MIN_ITEMS - 1)) is None
