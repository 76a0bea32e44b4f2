r"""The reward function `math`: mathematical equality by math-verify. Importing sympy takes a second.

The library can limit its own time, but then a comparison without a result counts as "not equal". A reward that was not
computed must not be zero, so these limits are off and only the deadline of the pool applies.

This module decides what the answer of a response is (`answer_in`). The library's search could choose one of several
boxes, or a box inside the thoughts. A box is found by its braces and math by its delimiters; a dollar after a backslash
(`\$36`) is money.
"""

import logging
import re
from typing import Any

from math_verify import parse, verify

from darts_async.reward.answer_forms import content_of, has_math, last_box, prose

# The library warns that its time is not limited. The pool limits it.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_THINKING, _THOUGHT = "<think>", "</think>"
_LETTER = r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\**\(?\s*(?P<letter>[A-J])\s*\)?"
_CHOICE = re.compile(rf"\s*{_LETTER}[.:]?\**\s*\}}?\s*")
_BETWEEN = r"(?:[\s{}()$]|\\[,; ]|\\(?:text|textbf|mathrm|mathbf)\b)*"
_ANOTHER = rf"{_BETWEEN}(?:[,;&]|and\b|or\b){_BETWEEN}(?-i:[A-J])(?![A-Za-z])"
_BOXED_CHOICE = re.compile(rf"(?>\s*{_LETTER})(?![A-Za-z0-9-]|\s*[_^=+*/]|{_ANOTHER})", re.IGNORECASE)
"""A box with two letters or a formula is not a choice."""
_NAMED_CHOICE = re.compile(rf"(?i:answer|choice|option)(?i:\s+is)?\s*[:=]?\s*\$?{_LETTER}(?!\w)")
_MONEY = re.compile(r"\\\$(?=\s*\d)")


def math(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    r"""1.0 if the answer of the response equals `answer` as mathematics, else 0.0.

    `answer` may be bare (`\frac{1}{2}`, `\$36`, `5\text{ cm}`), in dollars or boxed, or a sentence with math in it. Its
    units, money signs and thousands separators are not compared, nor are words before it ("The total is", "Answer:")
    and a full stop after it. Number words are numbers (see `answer_forms`). If it is one letter from A to J, also in
    parentheses or in `\text`, it is a choice, and is compared as a letter. If it is in words (`2 hours and 5 minutes`,
    `no solution`), a box has to hold the same words; case, spacing and `\text` are not compared. A box
    that holds the very text of `answer` is right, whatever that is.

    The answer of a response must be after the last `</think>`; a response without the end of its thoughts has no
    answer. (If the chat template begins the thoughts itself, a response that was cut before `</think>` seems to have no
    thoughts, and a box in it counts.) The answer is

    - the content of the last closed box (`\boxed` or `\fbox`), even if other boxes differ; a box with two letters
      ("B or C") is not a choice;
    - without a box, for a choice: the letter that follows the last "answer", "option" or "choice", or else a last line
      that is a letter alone;
    - without a box, for anything else: the last expression, where one that follows "answer" comes before others.

    A response without an answer earns 0.0.

    Raises:
        ValueError: `answer` is not an expression, so no response could be right.
    """
    said = answer_in(response)
    content, box = content_of(answer), last_box(said)
    choice = _CHOICE.fullmatch(content)
    if choice is not None:
        return float(choice["letter"] == _choice_in(said))
    if box is not None and content and content == content_of(box):
        return 1.0
    words = prose(content)
    if box is not None and words is not None:
        return float(words == prose(content_of(box)))
    gold = parse(_as_boxed(answer), parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} is not a mathematical expression")
    found = parse(_MONEY.sub("", said) if box is None else _as_boxed(box), parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


def answer_in(response: str) -> str:
    """The text after the thoughts; empty if these have no end."""
    _thoughts, end, said = response.rpartition(_THOUGHT)
    return "" if _THINKING in said else said if end else response


def _as_boxed(answer: str) -> str:
    """The answer in a form that the library reads without searching; a sentence with math unchanged."""
    content = content_of(answer)
    return content if has_math(content) else rf"\boxed{{{content}}}"


def _choice_in(said: str) -> str | None:
    box = last_box(said)
    if box is not None:
        found = _BOXED_CHOICE.match(content_of(box))
        return found["letter"].upper() if found is not None else None
    named = list(_NAMED_CHOICE.finditer(said))
    lines = said.strip().splitlines()
    last = named[-1] if named else _CHOICE.fullmatch(lines[-1]) if lines else None
    return last["letter"] if last is not None else None
