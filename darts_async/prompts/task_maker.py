"""A program that makes tasks of the package `reasoning-gym`, and says which of its families there are.

It is a process of its own. Some families go through a set of texts, whose order differs from process to process unless
`PYTHONHASHSEED` is set, and the same seed has to give the same tasks again. Some arguments make a family search without
an end: then this process is ended. It reads an `Order` and answers with `Made` or `Refused`, both as JSON.
"""

import dataclasses
import difflib
import json
import os
import sys
from typing import Any

import msgspec

from darts_async.reward.task_guard import refusal

_PATIENCE = 200
"""A family has no more questions when so many draws, and as many more as are wanted, gave none that is new."""
_DRAWS_PER_TASK = 8


class FamilyOrder(msgspec.Struct, frozen=True):
    """So many different tasks of one family."""

    name: str
    arguments: dict[str, Any]
    seed: int
    num_wanted: int


class Order(msgspec.Struct, frozen=True):
    """The families of a run."""

    families: list[FamilyOrder]


class Made(msgspec.Struct, frozen=True, tag=True):
    """The records of each family: fewer than wanted, where it has no more."""

    families: list[list[dict[str, Any]]]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A family that cannot be made."""

    error: str


class _UnusableError(Exception):
    """A family that cannot be made, and why."""


def main() -> None:
    """Carry one order out."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        try:
            reply: Made | Refused = Made([_make(family) for family in order.families])
        except _UnusableError as error:
            reply = Refused(str(error))
        answer.write(msgspec.json.encode(reply))


def _make(order: FamilyOrder) -> list[dict[str, Any]]:
    dataset = _dataset(order)
    found: dict[str, dict[str, Any]] = {}
    num_missed = 0
    for place in range(len(dataset)):
        if len(found) == order.num_wanted or num_missed > order.num_wanted + _PATIENCE:
            break
        try:
            entry = dataset[place]
            record = json.loads(json.dumps(_record(order, entry)))
            score, score_there = (
                dataset.score_answer(entry["answer"], each) for each in (entry, entry | record["entry"])
            )
        except Exception as error:  # whatever a family raises
            raise _UnusableError(
                f"the family {order.name!r} cannot make its task number {place}: {type(error).__name__}: {error}; "
                "change its arguments, or leave it out"
            ) from error
        if score_there < score:
            raise _UnusableError(
                f"the family {order.name!r} cannot be used: its scorer gives {score_there:g} to its own answer after "
                f"the task was sent as JSON, and {score:g} before; leave it out"
            )
        question = " ".join(entry["question"].split())
        num_missed = num_missed + 1 if question in found else 0
        found.setdefault(question, record)
    return list(found.values())


def _record(order: FamilyOrder, entry: dict[str, Any]) -> dict[str, Any]:
    """What is scored needs the complete entry, whose answer may be of no use to anyone else: some have several."""
    answer = entry["answer"]
    return {
        "prompt": entry["question"],
        "answer": answer if isinstance(answer, str) else "",
        "family": order.name,
        "arguments": order.arguments,
        "entry": {name: value for name, value in entry.items() if name != "question"},
    }


def _dataset(order: FamilyOrder) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset

    where = f"the family {order.name!r}"
    if order.name not in DATASETS:
        near = difflib.get_close_matches(order.name, list(DATASETS), n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise _UnusableError(f"reasoning-gym has no family {order.name!r}; {guess}")
    if reason := refusal(order.name):
        raise _UnusableError(reason)
    known = [field.name for field in dataclasses.fields(DATASETS[order.name][1]) if field.name not in ("seed", "size")]
    for name in order.arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise _UnusableError(f"{where} has no argument {name!r}; {guess}")
    try:
        return create_dataset(order.name, seed=order.seed, size=_num_draws(order), **order.arguments)
    except Exception as error:  # whatever a family raises; most of them assert
        raise _UnusableError(f"{where} refuses its arguments {order.arguments}: {error}") from error


def _num_draws(order: FamilyOrder) -> int:
    """At most so many. No family needs more, and some refuse a size beyond what they have."""
    return _DRAWS_PER_TASK * (order.num_wanted + _PATIENCE)


if __name__ == "__main__":
    main()
