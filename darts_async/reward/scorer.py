"""Calls the reward functions of a run for the responses of a job, and adds up what they return.

    job -> arguments of each item -> calls of each function -> numbers -> weighted sum of each item

A function that takes a `sample` is called once for each item, and one that takes a `batch` once for all of them. The
calls of plain functions are made by `begin`, in the thread that calls it, outside of any event loop. Those of
coroutine functions are awaited by `Scoring.finish`, all at the same time.

A failure of one function is a failure of the item, because a sum without one of its terms is another reward. The first
failed function in the order of the settings is the one that is reported.
"""

import asyncio
import errno
import json
import resource
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from darts_async.errors import RewardUnavailableError
from darts_async.extensions import Extension, is_coroutine_function
from darts_async.reward.limits import Limits
from darts_async.reward.values import NotFiniteError, WrongTypeError, checked_reward, checked_rewards
from darts_async.reward.worker_messages import Failed, FunctionSpec, Job, Rewarded, WorkItem

MAX_TRACEBACK_LINES = 8
MAX_LINE_CHARS = 300
"""Longer lines lose their end, because a message begins with the name of its exception."""

Arguments = dict[str, Any]
"""What a function that takes a sample is called with."""
Value = float | Failed
_PLURALS = {"prompt": "prompts", "response": "responses", "answer": "answers", "finish_reason": "finish_reasons"}
"""Names of the lists that a function which takes a batch is called with; the others have the same name."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function that is loaded."""

    spec: FunctionSpec
    call: Extension

    @property
    def is_async(self) -> bool:
        """Whether it has to be awaited."""
        return is_coroutine_function(self.call)

    def arguments(self, items: Sequence[Arguments]) -> list[Arguments]:
        """What it is called with, once or several times."""
        if self.spec.takes == "sample":
            return list(items)
        return [{_PLURALS.get(key, key): [item[key] for item in items] for key in items[0]}] if items else []

    def values(self, result: object, num_items: int) -> list[Value]:
        """The result of one call as the numbers of the items that it was called for."""
        if isinstance(result, Failed):
            return [result] * (1 if self.spec.takes == "sample" else num_items)
        if self.spec.takes == "sample":
            return [self._value(result)]
        try:
            return [self._value(each) for each in checked_rewards(result, num_items)]
        except WrongTypeError as error:
            return [self._named(Failed("wrong_type", str(error)))] * num_items

    def failed(self, error: BaseException) -> Failed:
        """What its exception means."""
        if isinstance(error, RewardUnavailableError):
            return self._named(Failed("unavailable", str(error)))
        return self._named(Failed("raised", last_lines(error)) if not _is_of_file_limit(error) else _too_large(error))

    def late(self, deadline_s: float) -> Failed:
        """It was cancelled."""
        reason = f"the reward function took longer than reward.deadline_s ({deadline_s:g} s), and was cancelled"
        return self._named(Failed("timeout", reason))

    def _value(self, result: object) -> Value:
        try:
            return checked_reward(result)
        except WrongTypeError as error:
            return self._named(Failed("wrong_type", str(error)))
        except NotFiniteError as error:
            return self._named(Failed("not_finite", str(error)))
        except BaseException as error:  # noqa: BLE001 - a user's object may raise whenever it is touched
            return self.failed(error)

    def _named(self, failed: Failed) -> Failed:
        """With the name of the function, in the line that is shown first (see `failure_text`)."""
        if not self.spec.label:
            return failed
        *before, last = failed.error.splitlines() or [""]
        if failed.kind == "raised":
            return Failed(failed.kind, "\n".join([*before, f"{self.spec.label}: {last}"]))
        return Failed(failed.kind, f"{self.spec.label}: {failed.error}")


class Scoring:
    """A job under way."""

    def __init__(self, scorer: "Scorer", job: Job) -> None:
        self._scorer = scorer
        self._job = job
        self._began_s = time.monotonic()
        arguments = [scorer.arguments_of(item) for item in job.items]
        self._unreadable = {number: each for number, each in enumerate(arguments) if isinstance(each, Failed)}
        self._items = [each for each in arguments if not isinstance(each, Failed)]
        self._values: dict[int, list[Value]] = {}
        """By the number of the function, those of all items."""

    def call_plain_functions(self) -> None:
        """Call what need not be awaited."""
        for number, function in enumerate(self._scorer.functions):
            if not function.is_async:
                self._take(number, [_attempt(function, call) for call in function.arguments(self._items)])

    async def await_coroutines(self) -> None:
        """Call the others, and await them all at once, for what is left of the deadline."""
        names = [(number, each) for number, each in enumerate(self._scorer.functions) if each.is_async]
        calls = [[self._await(each, call) for call in each.arguments(self._items)] for _, each in names]
        for (number, _), pending in zip(names, calls, strict=True):
            self._take(number, await asyncio.gather(*pending))

    def replies(self) -> list[Rewarded | Failed]:
        """The answers for all items of the job."""
        rewards = (self._sum([self._values[f][i] for f in sorted(self._values)]) for i in range(len(self._items)))
        return [self._unreadable.get(number) or next(rewards) for number in range(len(self._job.items))]

    async def _await(self, function: RewardFunction, call: Arguments) -> object:
        left_s = self._began_s + self._job.deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s) as limit:
                return await function.call(**call)
        except BaseException as error:  # noqa: BLE001 - whatever a user's code raises is reported, never a zero
            return function.late(self._job.deadline_s) if limit.expired() else function.failed(error)

    def _take(self, number: int, results: Sequence[object]) -> None:
        function = self._scorer.functions[number]
        self._values[number] = [value for each in results for value in function.values(each, len(self._items))]

    def _sum(self, values: Sequence[Value]) -> Rewarded | Failed:
        """One response. `values` has what each function says of it."""
        failed = next((value for value in values if isinstance(value, Failed)), None)
        if failed is not None:
            return failed
        parts = tuple(value for value in values if not isinstance(value, Failed))
        weights = [function.spec.weight for function in self._scorer.functions]
        try:
            reward = checked_reward(sum(weight * part for weight, part in zip(weights, parts, strict=True)))
        except NotFiniteError as error:
            return Failed("not_finite", f"the weighted sum of {parts}: {error}")
        return Rewarded(reward, parts if self._scorer.is_several else ())


class Scorer:
    """The functions of a run."""

    def __init__(self, functions: Sequence[RewardFunction], tokenizer: Tokenizer) -> None:
        self.functions = functions
        self.is_async = any(function.is_async for function in functions)
        self.is_several = any(function.spec.label for function in functions)
        self._tokenizer = tokenizer

    def begin(self, job: Job) -> Scoring:
        """Take up a job and call the plain functions. The others are to be awaited."""
        scoring = Scoring(self, job)
        scoring.call_plain_functions()
        return scoring

    def arguments_of(self, item: WorkItem) -> Arguments | Failed:
        """What the functions get of an item."""
        try:
            token_ids = np.frombuffer(item.token_ids, np.int32).tolist()
            return {
                "prompt": item.prompt,
                "response": self._tokenizer.decode(token_ids, skip_special_tokens=True),
                "answer": item.answer,
                "metadata": json.loads(item.metadata_json),
                "finish_reason": item.finish_reason,
            }
        except (ValueError, OverflowError, RecursionError) as error:
            return Failed("raised", last_lines(error))


def _attempt(function: RewardFunction, call: Arguments) -> object:
    try:
        return function.call(**call)
    except BaseException as error:  # noqa: BLE001 - whatever a user's code raises is reported, never a zero
        return function.failed(error)


def last_lines(error: BaseException) -> str:
    """The end of a traceback, as text that can be encoded."""
    lines = "".join(traceback.format_exception(error)).splitlines()[-MAX_TRACEBACK_LINES:]
    return "\n".join(line[:MAX_LINE_CHARS] for line in lines).encode("utf-8", "replace").decode()


def _too_large(error: BaseException) -> Failed:
    limit = Limits(file_bytes=resource.getrlimit(resource.RLIMIT_FSIZE)[0]).describe("file_bytes")
    return Failed("limit", f"the reward function {limit}:\n{last_lines(error)}")


def _is_of_file_limit(error: BaseException) -> bool:
    """Whether this process, or one that the function has waited for, was kept from writing a large file."""
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY and any(
        getattr(cause, "errno", None) == errno.EFBIG or getattr(cause, "returncode", None) == -signal.SIGXFSZ
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
