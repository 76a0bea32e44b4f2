"""Reward functions that come with the package and need nothing beyond it.

Every reward function, a user's too, has this shape:

    def f(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float

`metadata` holds the other fields of the record, as they are in the data set (`prompts.metadata_fields` says which).
`response` is decoded without special tokens; `finish_reason` is `stop` or `length` (cut at the token limit).

Example:
    >>> def brief(*, response: str, answer: str, **_: object) -> float:
    ...     return float(response.endswith(answer)) - 0.001 * len(response)

It returns one finite number; an array or a tensor without a dimension is one too. A function that raises, takes longer
than `reward.deadline_s` or exceeds one of `reward.limits` gives no reward, which is not a reward of zero: the sample is
left out, and its group is trained on the others (`shaping.min_keep`). What a function starts ends with its worker.
"""

from typing import Any


def exact_match(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    """1.0 if the whole response is the answer, case and white space aside.

    Example:
        >>> exact_match(prompt="", response=" Four\\n", answer="four", metadata={}, finish_reason="stop")
        1.0
    """
    return float(_normalised(response) == _normalised(answer))


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
