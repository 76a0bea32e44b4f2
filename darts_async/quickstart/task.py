"""A chain of operations on a digit, modulo 10: a prompt source and a reward function, without torch and transformers.

A prompt is a start digit and k operations. A response applies them one by one, may verify, and answers:

    prompt     7 +5 *3 -9 =
    response   +5 2 *3 6 -9 7  check +5 2 *3 6 -9 7  ans 7

Every operation is a bijection of the digits, so a slip carries over to the end unless another one happens to undo it: k
is the difficulty. There are two kinds of verification. `check` copies the block before it (verbosity without effect);
`redo` computes the chain again (useful depth). The answer is the last result of the last block.

Training and held-out prompts are disjoint for every seed, because a checksum of the text decides (`is_held_out`). The
warm start of the shipped model draws from the training pool too. Words are separated by single spaces and are one token
each.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Any

from darts_async.errors import DataError

MIN_OPERATIONS = 2
MAX_OPERATIONS = 10
OPERATIONS = (*(f"+{n}" for n in range(1, 10)), *(f"-{n}" for n in range(1, 10)), "*3", "*7", "*9")
EQUALS, CHECK, REDO, ANSWER = "=", "check", "redo", "ans"
WORDS = (EQUALS, ANSWER, CHECK, REDO, *(str(digit) for digit in range(10)), *OPERATIONS)
"""Every word of prompts and responses."""

DEFAULT_NUM_TRAIN = 4096
HELD_OUT_SHARE = 16
"""One text in so many belongs to the held-out pool."""


def prompts(*, num_train: int | None, held_out: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The task as a prompt source. `num_train` prompts are made; without it `DEFAULT_NUM_TRAIN`."""
    train, others = make_prompts(DEFAULT_NUM_TRAIN if num_train is None else num_train, held_out, seed)
    return {"train": [_record(each) for each in train], "held_out": [_record(each) for each in others]}


def reward(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    """The task as a reward function: 1.0 if the model ended its response with the right answer."""
    return verify(response, answer, finish_reason == "stop")


@dataclass(frozen=True, slots=True)
class ChainPrompt:
    """A prompt of the task."""

    text: str
    answer: str
    k: int
    """Number of operations."""


def apply_operation(digit: int, operation: str) -> int:
    """The result of one operation, modulo 10."""
    operand = int(operation[1:])
    match operation[0]:
        case "+":
            return (digit + operand) % 10
        case "-":
            return (digit - operand) % 10
        case "*":
            return (digit * operand) % 10
    raise ValueError(f"{operation!r} is not an operation of this task")


def is_held_out(text: str) -> bool:
    """Whether the text of a prompt belongs to the held-out pool."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def make_prompts(num_train: int, num_held_out: int, seed: int) -> tuple[list[ChainPrompt], list[ChainPrompt]]:
    """Distinct training and held-out prompts, difficulties in turn. Each list depends on the seed and its own length
    alone, and a shorter list is the beginning of a longer one. Raises `DataError` when so many are asked for that the
    texts of the lowest difficulty would run short."""
    train = _draw_distinct(random.Random(f"train/{seed}"), num_train, from_held_out=False)
    return train, _draw_distinct(random.Random(f"held-out/{seed}"), num_held_out, from_held_out=True)


def draw_prompt(rng: random.Random, k: int) -> ChainPrompt:
    """A prompt with k operations, of either pool."""
    digit = rng.randrange(10)
    operations = rng.choices(OPERATIONS, k=k)
    text = " ".join((str(digit), *operations, EQUALS))
    for operation in operations:
        digit = apply_operation(digit, operation)
    return ChainPrompt(text, str(digit), k)


def verify(response_text: str, answer: str, finished: bool) -> float:
    """1.0 if the response ends with the right answer and was finished by the end-of-sequence token, else 0.0.
    `response_text` is decoded without special tokens."""
    return float(finished and response_text.split()[-2:] == [ANSWER, answer])


def _record(prompt: ChainPrompt) -> dict[str, Any]:
    return {"prompt": prompt.text, "answer": prompt.answer, "k": prompt.k}


def _draw_distinct(rng: random.Random, num_prompts: int, *, from_held_out: bool) -> list[ChainPrompt]:
    _refuse_too_many(num_prompts, from_held_out=from_held_out)
    prompts: dict[str, ChainPrompt] = {}
    while len(prompts) < num_prompts:
        k = MIN_OPERATIONS + len(prompts) % (MAX_OPERATIONS - MIN_OPERATIONS + 1)
        prompt = draw_prompt(rng, k)
        if is_held_out(prompt.text) == from_held_out:
            prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def _refuse_too_many(num_prompts: int, *, from_held_out: bool) -> None:
    # Half of the shortest texts: a pool that is nearly used up makes drawing distinct ones slow.
    num_texts = 10 * len(OPERATIONS) ** MIN_OPERATIONS
    pool = num_texts // HELD_OUT_SHARE if from_held_out else num_texts - num_texts // HELD_OUT_SHARE
    limit = pool // 2 * (MAX_OPERATIONS - MIN_OPERATIONS + 1)
    if not 0 <= num_prompts <= limit:
        name = "held-out" if from_held_out else "training"
        raise DataError(f"{num_prompts} {name} prompts asked of the chain task, which can make 0 to {limit}")
