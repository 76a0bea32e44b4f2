"""What the prompts of a run look like to the model: lengths, unknown tokens, and the first prompt with its special
tokens. Pure.

A tokenizer that does not know a text writes its unknown token instead. A model learns nothing from such a prompt, and
nothing fails: so the share is told before a run.
"""

from collections.abc import Iterator

import msgspec
import numpy as np
from tokenizers import Tokenizer

from darts_async.config import RunConfig
from darts_async.extensions import TASKS, Kind
from darts_async.prompts.load import PromptSets
from launcher.problems import Problem, shown

_USUAL_UNKNOWN = "<unk>"
"""For tokenizers (Unigram) that do not tell the name of their unknown token."""
_MUCH_UNKNOWN = 0.1


class PromptFigures(msgspec.Struct, frozen=True):
    """Figures of the prompts to train on. Lengths are in tokens, with all that the chat template adds."""

    shortest: int
    median: int
    longest: int
    limit: int
    """`prompts.max_prompt_tokens`."""
    over_limit_share: float
    """Of all records that were read."""
    unknown_share: float
    """Of all tokens."""
    num_all_unknown: int
    """Prompts of which every token but the special ones is unknown."""
    first_text: str
    """The first prompt as the model sees it, decoded with its special tokens."""
    first_tokens: int
    prompt: str
    answer: str
    metadata_json: str
    """The record of the first prompt, as a reward function gets it."""
    own_reward: str = ""
    """The reward function of this prompt, if it has one of its own."""

    def is_scored_by(self, kind: Kind, name: str, config: RunConfig) -> bool:
        """Whether this reward function gets the first prompt, and can be tried without the package of its tasks."""
        if name == TASKS or not kind.setting.startswith("reward."):
            return False
        return name == self.own_reward if self.own_reward else name in kind.names_in(config)


def figures_of(sets: PromptSets, tokenizer: Tokenizer, limit: int) -> PromptFigures:
    """The figures of prompts that were made with this tokenizer; there is at least one."""
    lengths = np.array([len(prompt.token_ids) for prompt in sets.train])
    unknown = unknown_id(tokenizer)
    special = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    num_unknown = num_all_unknown = 0
    for prompt in sets.train if unknown is not None else ():
        count = int((prompt.token_ids == unknown).sum())
        num_unknown += count
        if count:
            words = prompt.token_ids[~np.isin(prompt.token_ids, [each for each in special if each != unknown])]
            num_all_unknown += count == len(words)
    first = sets.train[0]
    num_records = len(sets.train) + len(sets.held_out) + sets.num_duplicates + sets.num_too_long
    return PromptFigures(
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
        limit=limit,
        over_limit_share=sets.num_too_long / num_records,
        unknown_share=num_unknown / int(lengths.sum()),
        num_all_unknown=num_all_unknown,
        first_text=tokenizer.decode(first.token_ids.tolist(), skip_special_tokens=False),
        first_tokens=len(first.token_ids),
        prompt=first.text,
        answer=first.answer,
        metadata_json=first.metadata_json,
        own_reward=first.reward,
    )


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The token that is written for what the tokenizer does not know; None if it knows every text."""
    name = getattr(tokenizer.model, "unk_token", None) or _USUAL_UNKNOWN
    number: int | None = tokenizer.token_to_id(name)
    return number


def unknown_tokens(figures: PromptFigures, num_prompts: int, model: str) -> Iterator[Problem]:
    """A hint where the tokenizer knows too little of the prompts."""
    if figures.unknown_share < _MUCH_UNKNOWN and not figures.num_all_unknown:
        return
    message = (
        f"its tokenizer does not know {figures.unknown_share:.0%} of the tokens of the prompts, and nothing at all of "
        f"{figures.num_all_unknown:,} of {num_prompts:,} prompts; the first prompt is to it {shown(figures.first_text)}"
    )
    fix = "choose a model whose tokenizer knows your language and signs"
    yield Problem("model.path", message, shown(model), fix, is_hint=True)
