"""Calls a reward function as a run will: with the reference answer of the first prompt as the response, and with an
empty response.

A function that gives both the same reward may read the wrong field, or want a form that the answer by itself does not
have. So where both are the same, the answer in a box is tried as well. A run can start with either: these are hints.
"""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Iterator
from typing import Any, Literal

import msgspec

from darts_async.extensions import REWARDS, Extension, Kind
from darts_async.reward.values import checked_reward
from launcher.preflight.prompt_figures import PromptFigures
from launcher.problems import Problem, shown

_FORMS = "{}", r"\boxed{{{}}}"


class RewardTrial(msgspec.Struct, frozen=True):
    """Rewards of two responses. A text is the reason why there is none."""

    name: str
    answer: str
    with_answer: float | str
    """Of a response that is the reference answer, or that has it in a box."""
    is_boxed: bool
    with_nothing: float | str
    """Of an empty response."""

    def __str__(self) -> str:
        answer = f"the reference answer {shown(self.answer)}{' in a box' if self.is_boxed else ''}"
        if self.is_equal:
            return f"{_told(self.with_nothing)} for {answer} and for an empty response alike"
        return f"{_told(self.with_answer)} for {answer}, {_told(self.with_nothing)} for an empty response"

    @property
    def is_equal(self) -> bool:
        """Whether there are two rewards, and they are the same."""
        return self.with_answer == self.with_nothing and not isinstance(self.with_nothing, str)


Takes = Literal["sample", "batch"]


def try_reward(name: str, function: Extension, figures: PromptFigures, takes: Takes = "sample") -> RewardTrial:
    """Two calls of the function, or three."""
    with_nothing = _reward(function, figures, "", takes)
    for is_boxed, form in enumerate(_FORMS):
        with_answer = _reward(function, figures, form.format(figures.answer), takes)
        if with_answer != with_nothing or isinstance(with_answer, str):
            return RewardTrial(name, figures.answer, with_answer, bool(is_boxed), with_nothing)
    return RewardTrial(name, figures.answer, with_answer, False, with_nothing)


def doubts(kind: Kind, trial: RewardTrial) -> Iterator[Problem]:
    """Hints about what was found. Functions of this package are known, and none is given about them."""
    value = shown(trial.name)
    failed = [each for each in (trial.with_answer, trial.with_nothing) if isinstance(each, str)]
    if failed:
        fix = "a response on which it fails has no reward and is not trained on: correct it if this is not meant"
        yield Problem(kind.setting, f"gives {trial}", value, fix, is_hint=True)
    elif trial.is_equal and kind.is_of_user(trial.name):
        fix = (
            "if it wants a certain form, such as tags, all is well; otherwise look at how it reads `response` and "
            "`answer`, for equal rewards teach nothing"
        )
        yield Problem(kind.setting, f"gives {trial}", value, fix, is_hint=True)


def _reward(function: Extension, figures: PromptFigures, response: str, takes: Takes) -> float | str:
    values = figures.prompt, response, figures.answer, json.loads(figures.metadata_json), "stop"
    given = values if takes == "sample" else tuple([each] for each in values)
    sample = dict(zip(REWARDS[takes].arguments, given, strict=True))
    try:
        found = function(**sample)
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
        return checked_reward(found if takes == "sample" else found[0])
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a user's code may raise anything, even leave Python
        return f"{type(error).__name__}: {error}"[:200]


async def _awaited(found: Awaitable[Any]) -> Any:
    return await found


def _told(reward: float | str) -> str:
    return f"{reward:g}" if isinstance(reward, float) else f"no reward ({reward})"
