"""Finding a reward function by name, and holding what it returns to what a reward is: one finite number."""

import difflib
import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np

from darts_async.errors import RewardError

RewardFunction = Callable[..., float]
"""Called as `f(prompt=, response=, answer=, metadata=, finish_reason=)`; see `builtin`."""

BUILT_IN = {
    "chain": "darts_async.reward.builtin:chain",
    "exact_match": "darts_async.reward.builtin:exact_match",
    "math": "darts_async.reward.mathematics:math",
}
KEYWORDS = ("prompt", "response", "answer", "metadata", "finish_reason")


class WrongTypeError(ValueError):
    """A reward function returned something that is not a number."""


class NotFiniteError(ValueError):
    """A reward function returned a number that is not finite."""


def load_function(name: str) -> RewardFunction:
    """The reward function of a name: one of `BUILT_IN`, or `module:function`.

    Modules of the user's are looked for in the current directory too, which is first on the path from then on.

    Raises:
        RewardError: no such module or function, its import fails, or it cannot be called as it must be.
    """
    target = BUILT_IN.get(name, name)
    module_name, colon, function_name = target.partition(":")
    if not (module_name and colon and function_name):
        raise RewardError(
            f"reward.function is {name!r}; it must be one of {sorted(BUILT_IN)} or have the form module:function"
            + _suggestion(name, BUILT_IN)
        )
    function = _get_function(_import_module(module_name, name), function_name, name)
    _check_signature(function, name)
    return function


_LARGEST_REWARD = float(np.finfo(np.float32).max)


def checked_reward(value: object) -> float:
    """`value` as a float, if it is a finite number in the range of float32, in which rewards travel.

    Arrays and tensors without a dimension are numbers.

    Raises:
        WrongTypeError: it is not a number.
        NotFiniteError: it is a number that is infinite, NaN or out of range.
    """
    number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if not isinstance(number, (numbers.Real, np.bool_)):
        raise WrongTypeError(f"the reward must be a number, and {_shown(value)} is not one")
    try:
        reward = float(number)
    except OverflowError:
        reward = math.inf
    if not abs(reward) <= _LARGEST_REWARD:
        raise NotFiniteError(f"the reward must be finite, and {_shown(value)} is not")
    return reward


def _import_module(module_name: str, name: str) -> ModuleType:
    if name not in BUILT_IN and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's module raises while it is imported, `sys.exit` included
        raise RewardError(_import_complaint(module_name, name, error)) from error


def _import_complaint(module_name: str, name: str, error: BaseException) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
        return (
            f"reward.function is {name!r}, but there is no module {missing!r}; looked in the current directory "
            f"({os.getcwd()}) and in what is installed for {sys.executable}"
        )
    return f"reward.function is {name!r}, but importing {module_name!r} raised {type(error).__name__}: {error}"


def _get_function(module: ModuleType, function_name: str, name: str) -> RewardFunction:
    if not hasattr(module, function_name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(
            f"reward.function is {name!r}, but {module.__name__!r} ({module.__file__}) has no {function_name!r}"
            + _suggestion(function_name, public)
        )
    function = getattr(module, function_name)
    if not callable(function):
        raise RewardError(f"reward.function is {name!r}, which is a {type(function).__name__} and cannot be called")
    return function  # type: ignore[no-any-return]


def _check_signature(function: RewardFunction, name: str) -> None:
    expected = f"it is called as {name.rpartition(':')[2]}({', '.join(f'{key}=' for key in KEYWORDS)})"
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"reward.function {name!r} is a coroutine function, and none can be awaited; {expected}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature: the first call will tell
        return
    try:
        signature.bind(**dict.fromkeys(KEYWORDS))
    except TypeError as error:
        raise RewardError(f"reward.function {name!r} takes {signature}: {error}; {expected}") from error


def _suggestion(name: str, known: object) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)  # type: ignore[call-overload]
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: object) -> str:
    return f"{type(value).__name__} {repr(value)[:100]}"
