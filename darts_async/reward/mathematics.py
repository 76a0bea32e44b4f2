r"""Mathematical equality by math-verify. A module of its own: importing sympy takes a second.

The library can limit its own time, but then takes a comparison that it gave up for "not equal". A reward that
was never computed must not become a zero, so its limits are off and the deadline of the pool is the only one.

What counts as the answer of a response is decided here (`answer_in`), and not by the library's search: that takes one
of several boxes, and boxes of what was only thought. A box is found by its braces and math by its delimiters, where a
dollar that follows a backslash (`\$36`) is money.
"""

import logging
import re
from typing import Any

from math_verify import parse, verify

# It warns once that nothing limits its time; the pool does.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_THINKING, _THOUGHT = "<think>", "</think>"
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<display>(?:\\.|[^\\$])+)\$\$|(?<!\\)\$(?P<inline>(?:\\.|[^\\$])+)\$"
    r"|\\\[(?P<bracket>.+?)\\\]|\\\((?P<parenthesis>.+?)\\\)",
    re.DOTALL,
)
_LETTER = r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\**\(?\s*(?P<letter>[A-J])\s*\)?"
_CHOICE = re.compile(rf"\s*{_LETTER}[.:]?\**\s*\}}?\s*")
_BETWEEN = r"(?:[\s{}()$]|\\[,; ]|\\(?:text|textbf|mathrm|mathbf)\b)*"
_ANOTHER = rf"{_BETWEEN}(?:[,;&]|and\b|or\b){_BETWEEN}(?-i:[A-J])(?![A-Za-z])"
_BOXED_CHOICE = re.compile(rf"(?>\s*{_LETTER})(?![A-Za-z0-9-]|\s*[_^=+*/]|{_ANOTHER})", re.IGNORECASE)
"""A box of two letters is no choice, nor is one of a formula."""
_NAMED_CHOICE = re.compile(rf"(?i:answer|choice|option)(?i:\s+is)?\s*[:=]?\s*\$?{_LETTER}(?!\w)")
_LEAD = re.compile(r"\A\s*[A-Za-z ]*(?:\bis\s|[a-z]{3}:)\s*(?=.*\d|\W*[A-J]\W*$)")
"""The words before an answer: "The total is", "Answer:"."""
_FULL_STOP = re.compile(r"(?<!\\right)\.\Z")
_MONEY = re.compile(r"\\\$(?=\s*\d)")


def math(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    r"""1.0 if the answer of the response equals `answer` as mathematics, else 0.0.

    `answer` may be bare (`\frac{1}{2}`, `\$36`, `5\text{ cm}`), in dollars or boxed, or a sentence with math in it. Its
    units, money signs and thousands separators are not compared, nor are words before it ("The total is", "Answer:")
    and a full stop after it. If it is one letter from A to J, also in parentheses
    or in `\text`, it is a choice, and is compared as a letter.

    The answer of a response is looked for after the last `</think>`: what was thought is not answered, and a response
    that is still thinking has no answer. (Where the chat template opens the thoughts itself, a response that was cut
    before `</think>` looks like one without thoughts, and a box in it counts.) There it is

    - the content of the last box (`\boxed` or `\fbox`) that is closed, whatever other boxes say; one of two letters
      ("B or C") is no choice;
    - without a box, for a choice: the letter that follows the last "answer", "option" or "choice", or else a last line
      that is a letter alone;
    - without a box, for anything else: the last expression, where one that follows "answer" comes before others.

    A response without an answer earns 0.0.

    Raises:
        ValueError: `answer` is not an expression; no response could ever be right.
    """
    said = answer_in(response)
    choice = _CHOICE.fullmatch(_content(answer))
    if choice is not None:
        return float(choice["letter"] == _choice_in(said))
    gold = parse(_as_boxed(answer), parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} is not a mathematical expression")
    box = last_box(said)
    found = parse(_MONEY.sub("", said) if box is None else _as_boxed(box), parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


def answer_in(response: str) -> str:
    """What follows the thoughts; empty while these have no end."""
    _thoughts, end, said = response.rpartition(_THOUGHT)
    return "" if _THINKING in said else said if end else response


def last_box(text: str) -> str | None:
    """The content of the last box that is closed. A brace that follows a backslash is text."""
    opened, last = list[int | None](), (-1, -1)
    for token in _BRACES.finditer(text):
        if token.lastgroup == "box":
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            begin = opened.pop()
            last = max(last, (begin, token.start())) if begin is not None else last
    return text[slice(*last)] if last[0] >= 0 else None


def _content(answer: str) -> str:
    """Without the box or the delimiters around all of it, the words before it and the full stop after it."""
    box = last_box(answer)
    content = _FULL_STOP.sub("", _LEAD.sub("", answer if box is None else box).strip())
    math = _MATH.fullmatch(content)
    return math[math.lastgroup] if math is not None and math.lastgroup is not None else content


def _as_boxed(answer: str) -> str:
    """As the library reads it without searching; a sentence with math in it as it is."""
    content = _content(answer)
    return content if _MATH.search(content) else rf"\boxed{{{content}}}"


def _choice_in(said: str) -> str | None:
    box = last_box(said)
    if box is not None:
        found = _BOXED_CHOICE.match(_content(box))
        return found["letter"].upper() if found is not None else None
    named = list(_NAMED_CHOICE.finditer(said))
    lines = said.strip().splitlines()
    last = named[-1] if named else _CHOICE.fullmatch(lines[-1]) if lines else None
    return last["letter"] if last is not None else None
