"""A reward process: when failures end the run, and what it removes."""

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
from darts_async.reward.sandbox.isolation import places
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


def nothing(*_: object, **__: object) -> None: ...


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "RewardPool", Pool)
    for name in ("become_subreaper", "resolve_model_path", "kill_strays_beside"):
        monkeypatch.setattr(process, name, nothing)


def actor_of(reward: dict[str, Any], own: str | None = None) -> RewardActor:
    mixture = [{"name": "a", "reward": own}, {"name": "b"}]
    runtime: Any = SimpleNamespace(
        config=RunConfig.model_validate({"prompts": {"mixture": mixture}, "reward": reward}),
        faults=SimpleNamespace(reach=nothing),
        clock=SimpleNamespace(busy=lambda _: nullcontext()),
        send=nothing,
        trace=SimpleNamespace(sample=nothing),
    )
    return RewardActor(runtime)


def error_after(*functions: str) -> RewardError | None:
    """The error of the process after items with these functions."""

    async def score() -> None:
        actor = actor_of({"function": "math"}, OWN)
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


def test_the_function_of_a_part_is_named_although_that_of_the_settings_works() -> None:
    error = error_after(*[""] * WATCHED_ITEMS, *[OWN] * MIN_ITEMS)
    assert f"reward function {OWN!r} failed on 100% of the last {MIN_ITEMS} responses" in str(error)


def test_few_failures_end_nothing() -> None:
    assert error_after(*[""] * WATCHED_ITEMS, *[OWN] * (MIN_ITEMS - 1)) is None


@pytest.mark.parametrize(("function", "num_sweeps"), [({"code": {}}, 2), ({"function": "math"}, 0)])
def test_directories_of_dead_workers_are_removed_once_a_minute(
    function: dict[str, Any], num_sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[object] = []
    monkeypatch.setattr(process, "remove_orphans", swept.append)

    async def wait() -> None:
        actor = actor_of({"functions": [function]})
        async with asyncio.TaskGroup() as tasks:
            await actor.open(tasks)
            for now_s in (100.0, 101.0, 159.0, 160.0):
                actor.tick(now_s)

    asyncio.run(wait())
    assert swept == [places()] * num_sweeps
