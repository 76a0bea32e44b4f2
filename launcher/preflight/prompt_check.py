"""Whether prompts can be loaded, and whether the reward functions can give a reward for their records.

Answers are only checked for `math`, and test cases for `code`: what a function of the user reads is not known.
"""

from collections.abc import Iterator, Sequence

import msgspec

from darts_async.config import RunConfig
from darts_async.errors import ConfigError, DataError, ExtensionError, ModelError
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.prompts.load import PromptCounts, PromptSets, load_prompts
from darts_async.prompts.source import Prompt
from darts_async.reward.answer_forms import content_of, prose
from darts_async.reward.code import cases_of
from launcher.preflight.prompt_figures import PromptFigures, figures_of, unknown_tokens
from launcher.preflight.reward_trial import RewardTrial
from launcher.problems import Problem, shown

_NO_LIMIT = 1 << 30


class Found(msgspec.Struct, frozen=True):
    """What was found out about something that a setting names."""

    problems: tuple[Problem, ...] = ()
    counts: PromptCounts | None = None
    figures: PromptFigures | None = None
    reward: RewardTrial | None = None


def look_at_prompts(config: RunConfig) -> Found:
    """Tokenizer and data sets load, no set is empty, every prompt fits, and answers can be equalled."""
    try:
        sets = load_prompts(config)
    except ModelError as error:
        return Found((Problem("model.path", str(error), shown(config.model.path)),))
    except DataError as error:
        return Found((Problem("prompts", f"{error}{_also_too_long(config)}"),))
    except (ConfigError, ExtensionError) as error:
        return Found((Problem("prompts", str(error)),))
    tokenizer = load_tokenizer(resolve_model_path(config.model.path, with_weights=False))
    figures = figures_of(sets, tokenizer, config.prompts.max_prompt_tokens)
    hints = unknown_tokens(figures, len(sets.train), config.model.path)
    problems = *check_answers(config, sets), *check_test_cases(config, sets), *hints
    return Found(problems, sets.counts, figures)


def _also_too_long(config: RunConfig) -> str:
    """How many prompts are over the limit, if that is all that is wrong with them."""
    limit = config.prompts.max_prompt_tokens
    prompts = config.prompts.model_copy(update={"max_prompt_tokens": _NO_LIMIT})
    try:
        sets = load_prompts(config.model_copy(update={"prompts": prompts}))
    except (DataError, ExtensionError):
        return ""
    lengths = sorted(len(prompt.token_ids) for prompt in (*sets.train, *sets.held_out))
    num_over = sum(length > limit for length in lengths)
    if not num_over:
        return ""
    share = f"{num_over:,} of {len(lengths):,} prompts ({num_over / len(lengths):.1%}) are over the limit"
    return f". {share}: they have {lengths[0]} to {lengths[-1]} tokens, half of them up to {lengths[len(lengths) // 2]}"


def check_answers(config: RunConfig, prompts: PromptSets) -> Iterator[Problem]:
    """`math` has reference answers that a response can equal: none at all is an error, words are a hint."""
    every = [
        (prompt, content_of(prompt.answer))
        for prompt in (*prompts.train, *prompts.held_out)
        if "math" in ((prompt.reward,) if prompt.reward else config.reward.names)
    ]
    empty = [prompt for prompt, content in every if not content.strip("$ ")]
    in_words = [prompt for prompt, content in every if prose(content) is not None]
    if empty:
        message = f"{_share(empty, len(every))} empty, and no response can equal them; {_first(empty)}"
        yield Problem("prompts.answer_field", message, fix="remove the records, or name the field that has the answer")
    if in_words:
        message = (
            f"{_share(in_words, len(every))} in words, which no number or expression can equal: a response is right "
            f"only if its box repeats them; {_first(in_words)}"
        )
        fix = "give answers as numbers or expressions, or a reward function of your own"
        yield Problem("prompts.answer_field", message, fix=fix, is_hint=True)


def check_test_cases(config: RunConfig, prompts: PromptSets) -> Iterator[Problem]:
    """`code` has test cases in every record."""
    for field in {part.code.tests_field: None for part in config.reward.functions if part.code is not None}:
        wrong = list[tuple[Prompt, str]]()
        every = (*prompts.train, *prompts.held_out)
        for prompt in every:
            try:
                cases_of(msgspec.json.decode(prompt.metadata_json), field)
            except DataError as error:
                wrong.append((prompt, str(error)))
        if wrong:
            (prompt, reason), number = wrong[0], f"{len(wrong):,} of {len(every):,} records"
            message = f"{number} have no test cases that can be run; of the prompt {shown(prompt.text)}: {reason}"
            yield Problem("reward.functions", message, fix="name their field in `tests_field`, or remove the records")


def _share(some: Sequence[Prompt], num_prompts: int) -> str:
    return f"{len(some):,} of {num_prompts:,} reference answers are"


def _first(some: Sequence[Prompt]) -> str:
    return f"the first is {shown(some[0].answer)}, to the prompt {shown(some[0].text)}"
