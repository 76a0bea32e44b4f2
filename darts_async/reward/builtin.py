"""The reward functions of this package that need no extra.

Every reward function, including a user's, has this signature:

    def f(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float

`metadata` holds the other fields of the record, as they are in the data set (`prompts.metadata_fields` says which).
`response` is decoded without special tokens; `finish_reason` is `stop` or `length` (cut at the token limit).

It returns one finite number, also as an array or a tensor without dimensions. If it raises, takes longer than
`reward.deadline_s` or exceeds one of `reward.limits`, there is no reward, which is not a reward of zero: training uses
the group without the sample (`shaping.min_keep`). Processes that a function starts end with its worker.
"""

from typing import Any

from darts_async.quickstart.task import verify


def chain(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    """1.0 if the response solves the quickstart's chain correctly and was ended by the model."""
    return verify(response, answer, finish_reason == "stop")


def exact_match(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    """1.0 if the complete response equals the answer, apart from case and white space."""
    return float(_normalised(response) == _normalised(answer))


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
