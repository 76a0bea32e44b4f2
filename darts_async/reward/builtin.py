"""The reward functions of this package that need no extra.

Every reward function, including a user's, has this signature:

    def f(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float

`metadata` holds the other fields of the record, as they are in the data set (`prompts.metadata_fields` says which).
`response` is decoded without special tokens; `finish_reason` is `stop` or `length` (cut at the token limit).

Example:
    >>> def brief(*, response: str, answer: str, **_: object) -> float:
    ...     return float(response.endswith(answer)) - 0.001 * len(response)

It returns one finite number, also as an array or a tensor without dimensions. If it raises, takes longer than
`reward.deadline_s` or exceeds one of `reward.limits`, there is no reward, which is not a reward of zero: training uses
the group without the sample (`shaping.min_keep`). Processes that a function starts end with its worker.
"""

from typing import Any


def exact_match(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    """1.0 if the complete response equals the answer, apart from case and white space.

    Example:
        >>> exact_match(prompt="", response=" Four\\n", answer="four", metadata={}, finish_reason="stop")
        1.0
    """
    return float(_normalised(response) == _normalised(answer))


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
