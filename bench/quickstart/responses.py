"""Responses to the quickstart's prompts, as the shipped model learnt to write them: right, wrong, short and long.

How many blocks there are follows a chain of two states, a brief one that stops soon and a sticky one that does not,
which makes lengths long-tailed within a prompt.
"""

import random
from dataclasses import dataclass

from darts_async.quickstart.task import ANSWER, CHECK, REDO, ChainPrompt, apply_operation


@dataclass(frozen=True, slots=True)
class ResponseStyle:
    """How supervised responses are written. Every field is a probability.

    With `verify * (1 - redo) < 1 - verify` the answer is the likeliest word after the first block. Where a copy is
    likelier, greedy decoding copies forever.
    """

    step_error: float = 0.10
    """A result of the first block is wrong."""
    verify: float = 0.50
    """Another block follows, in the brief state (the state before the first verification)."""
    turn_sticky: float = 0.65
    """The brief state turns into the sticky one, at each verification block."""
    stickiness: float = 0.73
    """Another block follows, in the sticky state. Below 1, or a response never ends."""
    redo: float = 0.15
    """A verification block computes afresh instead of copying."""
    redo_error: float = 0.08
    """A result that is computed afresh is wrong."""
    copy_error: float = 0.01
    """A result is miscopied; the results after it are copied anyway."""


CONCISE = ResponseStyle(verify=0.0)
FLAWLESS = ResponseStyle(step_error=0.0, verify=0.0)


def write_response(rng: random.Random, prompt: ChainPrompt, style: ResponseStyle) -> str:
    """One supervised response to a prompt, without the end-of-sequence token."""
    start, *operations, _equals = prompt.text.split()
    results = _compute(rng, int(start), operations, style.step_error)
    words = _block(operations, results)
    for _ in range(_num_verifications(rng, style)):
        if rng.random() < style.redo:
            results = _compute(rng, int(start), operations, style.redo_error)
            words += [REDO, *_block(operations, results)]
        else:
            results = [_perhaps_wrong(rng, digit, style.copy_error) for digit in results]
            words += [CHECK, *_block(operations, results)]
    return " ".join((*words, ANSWER, str(results[-1])))


def _compute(rng: random.Random, digit: int, operations: list[str], error: float) -> list[int]:
    results = []
    for operation in operations:
        digit = _perhaps_wrong(rng, apply_operation(digit, operation), error)
        results.append(digit)
    return results


def _perhaps_wrong(rng: random.Random, digit: int, error: float) -> int:
    return (digit + rng.randrange(1, 10)) % 10 if rng.random() < error else digit


def _block(operations: list[str], results: list[int]) -> list[str]:
    return [word for operation, result in zip(operations, results, strict=True) for word in (operation, str(result))]


def _num_verifications(rng: random.Random, style: ResponseStyle) -> int:
    num_blocks, sticky = 0, False
    while rng.random() < (style.stickiness if sticky else style.verify):
        num_blocks += 1
        sticky = sticky or rng.random() < style.turn_sticky
    return num_blocks
