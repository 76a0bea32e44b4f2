"""Tasks of the package `reasoning-gym` as records, and which of them are held out.

A family with its arguments and a seed is an endless sequence of tasks, in which a question may come again. The first
different ones are held out, the next ones are trained on. So no question is in both, and the held-out ones are the same
for any number of training ones. (Two seeds of that package are no two sets: task n of seed s is task n - 1 of s + 1.)
The name of a set is part of its seed, so that two sets of one family are not the same tasks.
"""

import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from darts_async.config.prompts import FamilyConfig
from darts_async.errors import DataError
from darts_async.extensions import TASKS
from darts_async.machine.trial_process import TrialError, trial_process
from darts_async.prompts.task_maker import FamilyOrder, Made, Order, Refused

DEFAULT_NUM_TRAIN = 1024
PACKAGE = "reasoning_gym"
EXTRA = "pip install 'darts-async[reasoning-gym]'"
_DEADLINE_S = 240.0


@dataclass(frozen=True, slots=True)
class FamilyTasks:
    """The records of one family."""

    family: FamilyConfig
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def is_installed() -> bool:
    """Whether tasks can be made here."""
    return importlib.util.find_spec(PACKAGE) is not None


def make_tasks(
    families: Sequence[FamilyConfig],
    *,
    num_train: int | None,
    held_out: int,
    seed: int,
    of_set: str = "",
    deadline_s: float = _DEADLINE_S,
) -> list[FamilyTasks]:
    """The tasks of each family. Blocks while another process makes them.

    Args:
        families: what is made.
        num_train: tasks to train on, at least one of each family; 0: none at all; None: `DEFAULT_NUM_TRAIN`.
        held_out: tasks that are held out.
        seed: that of the run.
        of_set: name of a part of a mixture, or of a set to evaluate on; each has tasks of its own.
        deadline_s: the longest wait.

    Raises:
        DataError: the package is missing, there is no such family or argument, a family has too few different
            questions, or it takes longer than `deadline_s`.
    """
    if not is_installed():
        raise DataError(f"prompts.source is {TASKS!r}, which needs the package reasoning-gym: {EXTRA}")
    weights = [family.weight for family in families]
    shares = apportioned(held_out, weights)
    total = DEFAULT_NUM_TRAIN if num_train is None else num_train
    wanted = [max(1, share) if total else 0 for share in apportioned(total, weights)]
    order = Order(
        [
            FamilyOrder(family.name, family.arguments, _seed_of(seed, of_set, place), shares[place] + wanted[place])
            for place, family in enumerate(families)
        ]
    )
    made = [
        FamilyTasks(family, records[share:], records[:share])
        for family, records, share in zip(families, _made(order, deadline_s), shares, strict=True)
    ]
    if total:
        for tasks in made:
            _check_enough(tasks)
    return made


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, with this sum: the largest remainders are rounded up.

    Example:
        >>> apportioned(10, [1.0, 1.0, 2.0])
        [3, 2, 5]
    """
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares


def _seed_of(seed: int, of_set: str, place: int) -> int:
    """Far from that of another run, set or family: see the module."""
    return random.Random(f"{seed}/{of_set}/{place}").randrange(1 << 31)


def _check_enough(tasks: FamilyTasks) -> None:
    if tasks.train:
        return
    raise DataError(
        f"the family {tasks.family.name!r} with the arguments {tasks.family.arguments} has only "
        f"{len(tasks.held_out)} different questions, and all of them are held out; widen its arguments, or lower "
        "prompts.held_out"
    )


def _made(order: Order, deadline_s: float) -> list[list[dict[str, Any]]]:
    names = ", ".join(family.name for family in order.families)
    try:
        with trial_process("darts_async.prompts.task_maker", order, PYTHONHASHSEED="0") as child:
            output = child.answer(deadline_s)
    except TimeoutError as error:
        raise DataError(
            f"making tasks of the families {names} took longer than {deadline_s:g} s; some arguments make a family "
            "search without an end: change them, or lower prompts.num_train"
        ) from error
    except TrialError as error:
        raise DataError(f"the process that makes tasks of the families {names} ended {error}") from error
    reply = msgspec.json.decode(output, type=Made | Refused)
    if isinstance(reply, Refused):
        raise DataError(f"prompts.families: {reply.error}")
    return reply.families
