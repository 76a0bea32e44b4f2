"""What a reward function returns, held to what a reward is: one finite number for each response."""

import math
import numbers

import numpy as np

_LARGEST_REWARD = float(np.finfo(np.float32).max)


class WrongTypeError(ValueError):
    """A reward function returned something that is not a number."""


class NotFiniteError(ValueError):
    """A reward function returned a number that is not finite."""


def checked_reward(value: object) -> float:
    """`value` as a float, if it is a finite number in the range of float32, in which rewards travel.

    Arrays and tensors without a dimension are numbers.

    Raises:
        WrongTypeError: it is not a number.
        NotFiniteError: it is a number that is infinite, NaN or out of range.
    """
    number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if not isinstance(number, (numbers.Real, np.bool_)):
        raise WrongTypeError(f"the reward must be a number, and {_shown(value)} is not one; return a float")
    try:
        reward = float(number)
    except OverflowError:
        reward = math.inf
    if not abs(reward) <= _LARGEST_REWARD:
        raise NotFiniteError(f"the reward must be finite, and {_shown(value)} is not")
    return reward


def checked_rewards(result: object, num_items: int) -> list[object]:
    """`result` as a list with an element for each item: a list, a tuple, an array or a tensor of one dimension.

    Raises:
        WrongTypeError: it is something else, or has another length.
    """
    found = result.tolist() if getattr(result, "ndim", None) == 1 and hasattr(result, "tolist") else result
    if not isinstance(found, (list, tuple)):
        raise WrongTypeError(f"the rewards must be a list of {num_items} numbers, and {_shown(result)} is not a list")
    if len(found) != num_items:
        raise WrongTypeError(f"the rewards must be a list of {num_items} numbers, and there are {len(found)}")
    return list(found)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {repr(value)[:100]}"
