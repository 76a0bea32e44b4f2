"""Prompt sources as users write them."""

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

Record = dict[str, Any]


def numbered(*, num_train: int | None, held_out: int, seed: int) -> Iterator[Record]:
    for number in range((num_train or 3) + held_out):
        yield {"prompt": f"question {number}", "answer": number, "seed": seed}


def two_sets(*, num_train: int | None, held_out: int, seed: int) -> dict[str, Iterable[Record]]:
    records = [*numbered(num_train=num_train, held_out=0, seed=seed)]
    return {"train": records, "held_out": ({**each, "prompt": "other " + each["prompt"]} for each in records)}


def wrong_names(**_: object) -> dict[str, list[Record]]:
    return {"train": [], "test": []}


def nothing(**_: object) -> list[Record]:
    return []


def endless(**_: object) -> Iterator[Record]:
    return ({"prompt": f"question {number}", "answer": 1} for number in count())


def no_answer(**_: object) -> list[Record]:
    return [{"prompt": "question", "anwser": "1"}]


def texts(**_: object) -> list[str]:
    return ["question"]


def raises(**_: object) -> Iterator[Record]:
    yield {"prompt": "question", "answer": 1}
    raise ConnectionError("the hub is down")


def none(**_: object) -> None:
    return None


def leaves(**_: object) -> list[Record]:
    raise SystemExit(3)


def no_engine(config: object) -> object:
    """No engine at all."""
    return object()
