"""A second task, of another kind than the quickstart's: find the digit at which a chain of operations has to begin.

    prompt     +5 *3 = 1 from
    response   try 4 +5 9 *3 7 no try 0 +5 5 *3 5 no try 2 +5 7 *3 1 yes ans 2

A response tries digits, each with the results of all operations, until one leads to the end that was asked for; or it
gives up before that and guesses. So a model gets better by going on for longer, unlike that of the quickstart's task.
Among the samples of one model long ones are no better all the same: who goes on may slip, or reach the cap. Digits are
tried at random, also again, which makes lengths geometric: long-tailed within a prompt.

    python -m bench.search_task --out DIR [--tokens 600000] [--seed 0]

makes what a run needs: prompts as JSON lines, and a model that writes such responses, with slips: the quickstart's,
which can compute, trained on written ones. The reward is `bench.search_task:reward`. Held-out prompts are of another
pool of texts than all that is trained on.
"""

import argparse
import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from transformers import Qwen3ForCausalLM

from bench.quickstart.tokenizer import EOS_ID, VOCABULARY
from bench.quickstart.warm_start import Phase, Sample, save, train
from darts_async.quickstart import MODEL_PATH
from darts_async.quickstart.task import ANSWER, EQUALS, OPERATIONS, apply_operation, is_held_out

TRY, NO, YES, FROM = "try", "no", "yes", "from"
WORDS: Final = VOCABULARY | {word: len(VOCABULARY) + place for place, word in enumerate((TRY, NO, YES, FROM))}
MIN_OPERATIONS, MAX_OPERATIONS = 2, 3
NUM_TRAIN, NUM_HELD_OUT = 2048, 128
DEFAULT_TOKENS = 600_000
TRAIN_FILE, HELD_OUT_FILE, MODEL_DIR = "train.jsonl", "held_out.jsonl", "model"


@dataclass(frozen=True, slots=True)
class Style:
    """How the responses are written that the model begins with. Every field is a probability."""

    give_up: float
    """After a digit that does not fit, the response ends with a guess."""
    slip: float
    """A result is wrong."""


PERFECT = Style(give_up=0.0, slip=0.0)
HUMAN = Style(give_up=0.06, slip=0.02)


def reward(*, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str) -> float:
    """1.0 if the response ends with the digit that was looked for, and was ended by the model."""
    return judge(response, answer, finish_reason == "stop")


def judge(response: str, answer: str, finished: bool) -> float:
    """The same, of what the reward is made of."""
    return float(finished and response.split()[-2:] == [ANSWER, answer])


def draw_prompt(rng: random.Random, num_operations: int) -> tuple[str, str]:
    """Text and answer, of either pool."""
    start, operations = rng.randrange(10), rng.choices(OPERATIONS, k=num_operations)
    end = results(start, operations)[-1]
    return " ".join((*operations, EQUALS, str(end), FROM)), str(start)


def results(digit: int, operations: list[str]) -> list[int]:
    """The digit after each operation."""
    found = []
    for operation in operations:
        digit = apply_operation(digit, operation)
        found.append(digit)
    return found


def write_response(rng: random.Random, text: str, style: Style) -> str:
    """One response, without the end of sequence."""
    *operations, _, end, _ = text.split()
    words: list[str] = []
    while True:
        start = digit = rng.randrange(10)
        words += [TRY, str(start)]
        for operation in operations:
            digit = apply_operation(digit, operation)
            if rng.random() < style.slip:
                digit = (digit + rng.randrange(1, 10)) % 10
            words += [operation, str(digit)]
        if str(digit) == end:
            return " ".join((*words, YES, ANSWER, str(start)))
        words.append(NO)
        if rng.random() < style.give_up:
            return " ".join((*words, ANSWER, str(rng.randrange(10))))


def draw_sample(rng: random.Random, min_k: int, max_k: int, style: Style) -> Sample:
    """A prompt of the training pool with a response, for supervised training."""
    text, _ = draw_prompt(rng, rng.randint(min_k, max_k))
    while is_held_out(text):
        text, _ = draw_prompt(rng, rng.randint(min_k, max_k))
    prompt_ids, response_ids = ([WORDS[word] for word in of.split()] for of in (text, write_response(rng, text, style)))
    return [*prompt_ids, *response_ids, EOS_ID], len(prompt_ids)


CURRICULUM: Final = (
    Phase(0.3, 512, partial(draw_sample, min_k=1, max_k=MAX_OPERATIONS, style=PERFECT)),
    Phase(0.7, 1024, partial(draw_sample, min_k=MIN_OPERATIONS, max_k=MAX_OPERATIONS, style=HUMAN), decays=True),
)


def write_prompts(path: Path, num_prompts: int, seed: int, *, from_held_out: bool) -> None:
    """Distinct prompts of one pool, one JSON object in a line."""
    rng = random.Random(f"search/{from_held_out}/{seed}")
    prompts: dict[str, str] = {}
    while len(prompts) < num_prompts:
        text, answer = draw_prompt(rng, MIN_OPERATIONS + len(prompts) % (MAX_OPERATIONS - MIN_OPERATIONS + 1))
        if is_held_out(text) == from_held_out:
            prompts.setdefault(text, answer)
    lines = [json.dumps({"prompt": text, "answer": answer}) for text, answer in prompts.items()]
    path.write_text("\n".join(lines) + "\n")


def make(directory: Path, num_tokens: int, seed: int) -> None:
    """Prompts and model."""
    directory.mkdir(parents=True, exist_ok=True)
    write_prompts(directory / TRAIN_FILE, NUM_TRAIN, seed, from_held_out=False)
    write_prompts(directory / HELD_OUT_FILE, NUM_HELD_OUT, seed, from_held_out=True)
    torch.set_num_threads(1)
    model = Qwen3ForCausalLM.from_pretrained(MODEL_PATH)
    train(model, num_tokens, seed, CURRICULUM)
    save(model, directory / MODEL_DIR, WORDS)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.tokens, arguments.seed)


if __name__ == "__main__":
    main()
