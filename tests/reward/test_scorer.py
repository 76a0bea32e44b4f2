"""Several functions, batched and awaited ones: what each response gets, and what a failure costs."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from darts_async.errors import RewardUnavailableError
from darts_async.reward.scorer import RewardFunction, Scorer
from darts_async.reward.values import WrongTypeError, checked_rewards
from darts_async.reward.worker_messages import (
    Failed,
    FunctionSpec,
    Job,
    Rewarded,
    WorkItem,
    as_argument,
    failure_text,
    of_argument,
)
from tests.support.byte_tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()


def job(*responses: str, metadata: str = '{"k": 1}') -> Job:
    tokens = [np.array(TOKENIZER.encode(response).ids, np.int32).tobytes() for response in responses]
    return Job(0, 10.0, [WorkItem(f"p{i}", f"a{i}", metadata, "stop", each) for i, each in enumerate(tokens)])


def function(call: Callable[..., Any], **spec: Any) -> RewardFunction:
    return RewardFunction(FunctionSpec("module:name", **spec), call)


def replies_of(job: Job, *functions: RewardFunction) -> list[Rewarded | Failed]:
    scoring = Scorer(functions, TOKENIZER).begin(job)
    asyncio.run(scoring.await_coroutines())
    return scoring.replies()


def length(*, response: str, **_: Any) -> float:
    return float(len(response))


async def slow_length(*, response: str, **_: Any) -> float:
    await asyncio.sleep(0)
    return float(len(response))


def lengths(*, responses: list[str], **_: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def raises(**_: Any) -> float:
    raise KeyError("the place")


def test_a_single_function_gives_the_reward_and_no_parts() -> None:
    assert replies_of(job("abc"), function(length)) == [Rewarded(3.0)]


def test_several_functions_are_summed_by_weight_and_each_is_told_without_it() -> None:
    one, other = function(length, label="one", weight=2.0), function(lambda **_: 0.5, label="other", weight=-1.0)
    assert replies_of(job("abc", "x"), one, other) == [Rewarded(5.5, (3.0, 0.5)), Rewarded(1.5, (1.0, 0.5))]


def test_a_function_of_weight_zero_has_a_part_and_no_influence() -> None:
    one, other = function(length, label="one"), function(lambda **_: 7.0, label="other", weight=0.0)
    assert replies_of(job("abc"), one, other) == [Rewarded(3.0, (3.0, 7.0))]


def test_plain_batched_and_awaited_functions_are_mixed_in_the_order_of_the_settings() -> None:
    mixed = (
        function(slow_length, label="awaited", weight=100.0),
        function(lengths, label="batched", weight=10.0, takes="batch"),
        function(length, label="plain"),
    )
    assert replies_of(job("abc", "x"), *mixed) == [Rewarded(333.0, (3.0, 3.0, 3.0)), Rewarded(111.0, (1.0, 1.0, 1.0))]


def test_a_batch_is_called_once_with_lists_of_all_fields() -> None:
    calls = []

    async def remember(**fields: Any) -> list[int]:
        calls.append(fields)
        return [1, 2]

    assert replies_of(job("x", "y"), function(remember, label="it", takes="batch")) == [
        Rewarded(1.0, (1.0,)),
        Rewarded(2.0, (2.0,)),
    ]
    assert calls == [
        {
            "prompts": ["p0", "p1"],
            "responses": ["x", "y"],
            "answers": ["a0", "a1"],
            "metadata": [{"k": 1}, {"k": 1}],
            "finish_reasons": ["stop", "stop"],
        }
    ]


def test_coroutines_of_a_job_run_at_the_same_time() -> None:
    running: list[str] = []
    all_run = asyncio.Event()

    async def wait_for_the_others(*, response: str, **_: Any) -> float:
        running.append(response)
        if len(running) == 3:
            all_run.set()
        await all_run.wait()
        return 1.0

    assert replies_of(job("x", "y", "z"), function(wait_for_the_others)) == [Rewarded(1.0)] * 3


def test_the_first_function_that_fails_costs_the_response_its_reward_and_is_named() -> None:
    bad = function(lambda **_: "one", label="bad")
    [failed] = replies_of(job("abc"), function(length, label="good"), bad, function(raises, label="worse"))
    assert isinstance(failed, Failed)
    assert failed.kind == "wrong_type"
    assert failed.error == "bad: the reward must be a number, and str 'one' is not one; return a float"
    [failed] = replies_of(job("abc"), function(raises, label="worse"), bad)
    assert isinstance(failed, Failed)
    assert failure_text(failed.kind, failed.error) == "raised: worse: KeyError: 'the place'"


def test_a_single_function_that_fails_is_not_named() -> None:
    [failed] = replies_of(job("abc"), function(raises))
    assert isinstance(failed, Failed)
    assert failure_text(failed.kind, failed.error) == "raised: KeyError: 'the place'"


def test_one_bad_number_of_a_batch_costs_one_response() -> None:
    [good, bad] = replies_of(job("x", "y"), function(lambda **_: [1.0, float("nan")], label="it", takes="batch"))
    assert good == Rewarded(1.0, (1.0,))
    assert isinstance(bad, Failed)
    assert (bad.kind, bad.error) == ("not_finite", "it: the reward must be finite, and float nan is not")


@pytest.mark.parametrize(
    ("result", "error"),
    [
        ([1.0], "it: the rewards must be a list of 2 numbers, and there are 1"),
        (1.0, "it: the rewards must be a list of 2 numbers, and float 1.0 is not a list"),
    ],
)
def test_a_batch_of_the_wrong_length_costs_all_of_it(result: object, error: str) -> None:
    failed = replies_of(job("x", "y"), function(lambda **_: result, label="it", takes="batch"))
    assert failed == [Failed("wrong_type", error)] * 2


def test_a_batch_that_raises_costs_all_of_it() -> None:
    failed = replies_of(job("x", "y"), function(raises, label="it", takes="batch"))
    assert [each.kind for each in failed if isinstance(each, Failed)] == ["raised", "raised"]


def test_rewards_may_be_an_array() -> None:
    assert checked_rewards(np.array([1.0, 2.0]), 2) == [1.0, 2.0]
    with pytest.raises(WrongTypeError):
        checked_rewards(np.zeros((1, 2)), 2)


def test_a_coroutine_that_is_late_is_cancelled_and_costs_its_own_response() -> None:
    async def sometimes(*, response: str, **_: Any) -> float:
        if response == "slow":
            await asyncio.Event().wait()
        return 1.0

    short = Job(0, 0.05, job("slow", "fast").items)
    late, reward = replies_of(short, function(sometimes, label="it"))
    said = "it: the reward function took longer than reward.deadline_s (0.05 s), and was cancelled"
    assert (late, reward) == (Failed("timeout", said), Rewarded(1.0, (1.0,)))


def test_a_timeout_of_the_function_itself_is_its_own_exception() -> None:
    async def gives_up(**_: Any) -> float:
        raise TimeoutError("the server")

    [failed] = replies_of(job("x"), function(gives_up))
    assert isinstance(failed, Failed)
    assert (failed.kind, "TimeoutError: the server" in failed.error) == ("raised", True)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_whatever_a_coroutine_raises_costs_its_response_alone(error: BaseException) -> None:
    async def odd(*, response: str, **_: Any) -> float:
        if response == "x":
            raise error
        return 1.0

    failed, reward = replies_of(job("x", "y"), function(odd))
    assert isinstance(failed, Failed)
    assert (failed.kind, reward) == ("raised", Rewarded(1.0))


def test_a_sum_that_overflows_is_not_a_reward() -> None:
    [failed] = replies_of(job("x"), function(lambda **_: 3e38, label="it", weight=10.0))
    assert isinstance(failed, Failed)
    assert failed.kind == "not_finite"
    assert "the weighted sum of (3e+38,)" in failed.error


def test_metadata_that_cannot_be_read_costs_its_response_alone() -> None:
    whole, broken = job("x").items[0], job("y", metadata="{").items[0]
    failed, reward = replies_of(Job(0, 10.0, [broken, whole]), function(length, label="it"))
    assert isinstance(failed, Failed)
    assert (failed.kind, reward) == ("raised", Rewarded(1.0, (1.0,)))


def test_partial_functions_and_objects_may_be_coroutine_functions() -> None:
    class Judge:
        async def __call__(self, **_: Any) -> float:
            return 1.0

    assert function(functools.partial(slow_length, extra=1)).is_async
    assert function(Judge()).is_async
    assert not function(length).is_async


def test_functions_travel_as_an_argument() -> None:
    functions = (FunctionSpec("a:b"), FunctionSpec("c:d", "déjà", "batch", -0.5))
    assert of_argument(as_argument(functions)) == functions


def test_what_cannot_be_asked_at_the_moment_is_unavailable() -> None:
    def away(**_: Any) -> float:
        raise RewardUnavailableError("the server is away")

    assert replies_of(job("x"), function(away, label="it")) == [Failed("unavailable", "it: the server is away")]
