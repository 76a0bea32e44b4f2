"""The reward function `reasoning_gym`: a task of that package is scored by the scorer of its own family.

That scorer is given the answer alone, so this module finds it in the response (`answer_in`). What the scorer returns is
the reward: from 0 to 1, and many families give a part of it to an answer that is nearly right.
"""

import json
import re
from functools import lru_cache
from typing import Any

from darts_async.reward.answer_forms import last_box
from darts_async.reward.task_guard import guard, is_harmless

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")


def score(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    """What the family's scorer gives to the answer of the response; 0.0 if the response was cut at the token limit, and
    for an answer that the scorer would execute (see `task_guard`).

    Raises:
        ValueError: the prompt is not of `prompts.source: reasoning_gym`, or its family cannot be scored safely.
    """
    if not {"family", "arguments", "entry"} <= metadata.keys():
        raise ValueError("reward.function reasoning_gym scores prompts of prompts.source reasoning_gym, and no others")
    if finish_reason != "stop":
        return 0.0
    dataset = _family(metadata["family"], json.dumps(metadata["arguments"]))
    entry = {"question": prompt, **metadata["entry"]}
    found = answer_in(response, answer)
    return float(dataset.score_answer(found, entry)) if is_harmless(metadata["family"], found, entry) else 0.0


def answer_in(response: str, reference: str) -> str:
    r"""The answer of a response: what is in its last `<answer>` tags, or else in its last `\boxed`, or else its last
    number if the reference answer is a number, or else all of it.

    Example:
        >>> answer_in("4 + 5 is 9. The answer: 9.", "9"), answer_in(" yes\\n", "Yes")
        ('9', 'yes')
    """
    if tagged := _TAGGED.findall(response):
        return str(tagged[-1]).strip()
    if (box := last_box(response)) is not None:
        return box.strip()
    if _NUMBER.fullmatch(reference.strip()) and (numbers := _NUMBER.findall(response)):
        return str(numbers[-1])
    return response.strip()


@lru_cache(maxsize=256)
def _family(name: str, arguments_json: str) -> Any:
    from reasoning_gym.factory import create_dataset  # two seconds, and rarely needed

    guard(name)
    return create_dataset(name, seed=0, size=1, **json.loads(arguments_json))
