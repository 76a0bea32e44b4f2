"""Mathematical equality by math-verify. A module of its own: importing sympy takes a second.

The library can limit its own time, but then takes a comparison that it gave up for "not equal". A reward that
was never computed must not become a zero, so its limits are off and the deadline of the pool is the only one.
"""

import logging
from typing import Any

from math_verify import parse, verify

# It warns once that nothing limits its time; the pool does.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    r"""1.0 if the final expression of the response equals the answer as mathematics.

    `answer` may be bare (`\frac{1}{2}`), in dollars or boxed. A response without an expression earns 0.0.

    Raises:
        ValueError: the answer is not an expression; no response could ever be right.
    """
    marked = "$" in answer or r"\boxed" in answer
    gold = parse(answer if marked else rf"\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} is not a mathematical expression")
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))
