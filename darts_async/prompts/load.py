"""Loads the prompts of a run: reads, renders, tokenises, checks and splits them.

No prompt is in both sets: a training prompt that is also held out, apart from white space, is removed. The data and the
seed alone decide which prompts are held out, so that runs of different sizes are evaluated on the same ones. This
module imports neither torch nor transformers.
"""

import datetime
import decimal
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from darts_async.errors import ConfigError, DataError, ModelError
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.prompts.chat import ChatMessage, ChatTemplate
from darts_async.prompts.chat_files import load_chat_template
from darts_async.prompts.record_sources import Part, read_parts
from darts_async.prompts.records import Record
from darts_async.prompts.source import MixedPrompts, Prompt, PromptSource, ShuffledPrompts

if TYPE_CHECKING:
    from darts_async.config import PromptsConfig, RunConfig

_TEXTS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """How many prompts there are, and what was left out on the way."""

    num_train: int
    num_held_out: int
    num_too_long: int
    """Records skipped because the prompt is longer than `max_prompt_tokens`."""
    num_duplicates: int
    """Training records removed because they are also in the held-out set."""

    @property
    def num_left_out(self) -> int:
        """Records that were left out."""
        return self.num_too_long + self.num_duplicates

    def __str__(self) -> str:
        left_out = {
            "longer than prompts.max_prompt_tokens": self.num_too_long,
            "also in the held-out set": self.num_duplicates,
        }
        told = "".join(f"; {number:,} left out: {reason}" for reason, number in left_out.items() if number)
        return f"{self.num_train:,} prompts to train on, {self.num_held_out:,} held out{told}"


@dataclass(frozen=True, slots=True)
class PromptSets:
    """Training and held-out prompts, disjoint."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    num_too_long: int
    num_duplicates: int
    weights: Mapping[str, float] = field(default_factory=dict)
    """How often each part of a mixture is drawn, by name."""

    def in_order(self, seed: int) -> PromptSource:
        """The training prompts, in the order in which they are visited."""
        if len(self.weights) > 1:
            return MixedPrompts(self.train, self.weights, seed=seed)
        return ShuffledPrompts(self.train, seed=seed)

    @property
    def counts(self) -> PromptCounts:
        """How many there are, and how many there could have been."""
        return PromptCounts(len(self.train), len(self.held_out), self.num_too_long, self.num_duplicates)


class PromptEncoder:
    """Turns a record into the tokens of its prompt."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, system_prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._system_prompt = system_prompt

    def encode(self, records: list[Record]) -> list[list[int]]:
        """The token ids of every record's prompt, special tokens included.

        Raises:
            DataError: a record cannot be rendered.
        """
        token_ids: list[list[int]] = []
        for start in range(0, len(records), _TEXTS_PER_BATCH):
            texts = [self._render(record) for record in records[start : start + _TEXTS_PER_BATCH]]
            # The template writes all special tokens; adding them again would double them.
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=self._template is None)
            token_ids.extend(encoding.ids for encoding in encodings)
        return token_ids

    def _render(self, record: Record) -> str:
        if self._template is not None:
            try:
                return self._template.render(self._conversation(record))
            except DataError as error:
                raise DataError(f"{record.place}: {error}") from error
        if isinstance(record.prompt, str):
            return record.prompt
        raise DataError(
            f"{record.place}: the prompt is a list of messages, which needs a chat template; set "
            "prompts.chat_template: true and use a model that has one, or give the prompts as texts"
        )

    def _conversation(self, record: Record) -> tuple[ChatMessage, ...]:
        prompt = record.prompt
        messages = (ChatMessage(role="user", content=prompt),) if isinstance(prompt, str) else prompt
        if self._system_prompt is None:
            return messages
        if messages[0]["role"] in ("system", "developer"):
            raise DataError("the prompt has a system message of its own; remove it, or unset prompts.system_prompt")
        return (ChatMessage(role="system", content=self._system_prompt), *messages)


def load_prompts(config: "RunConfig") -> PromptSets:
    """The prompts of a run. Blocks while it reads and tokenises, so do not call it on an event loop.

    Raises:
        DataError: a file, a source or a record cannot be used, or there are too few of them.
        ExtensionError: the source cannot be loaded.
        ModelError: the model has no tokenizer, or a chat template that cannot be used.
        ConfigError: a system prompt is set, but the chat template is not used.
    """
    encoder = _make_encoder(resolve_model_path(config.model.path, with_weights=False), config.prompts)
    parts = read_parts(config.prompts, config.evaluation.sets, config.seed)
    train, held_out, num_too_long, num_read = list[list[Prompt]](), list[Prompt](), 0, 0
    for part in parts:
        prompts, num_longer = _to_prompts(part.train, encoder, config, num_read, part)
        num_read += len(part.train)
        num_too_long += num_longer
        if part.held_out is None:
            assert part.num_held_out is not None, part.name
            prompts, chosen = split_off(prompts, part.num_held_out, config.seed, part.name)
        else:
            chosen, num_longer = _to_prompts(part.held_out, encoder, config, num_read, part)
            num_read += len(part.held_out)
            num_too_long += num_longer
            if part.num_held_out is not None:
                _, chosen = split_off(chosen, part.num_held_out, config.seed, part.name)
            elif part.held_out and not chosen:
                raise _all_too_long(part, config.prompts.max_prompt_tokens)
        train.append(prompts)
        held_out += chosen
    distinct = [without_those_of(prompts, held_out) for prompts in train]
    num_duplicates = sum(map(len, train)) - sum(map(len, distinct))
    for part, prompts in zip(parts, distinct, strict=True):
        if part.is_trained and not prompts:
            sets = PromptSets((), tuple(held_out), num_too_long, num_duplicates)
            of = f" of {part.name!r}" if len(parts) > 1 else ""
            raise DataError(f"of {len(part.train)} records{of} there are {sets.counts}; give more, or hold out fewer")
    kept = [each for part, prompts in zip(parts, distinct, strict=True) for each in prompts[: part.num_train]]
    weights = {part.name: part.weight for part in parts if part.is_trained}
    return PromptSets(tuple(kept), tuple(held_out), num_too_long, num_duplicates, weights)


def split_off(prompts: list[Prompt], num_held_out: int, seed: int, part: str = "") -> tuple[list[Prompt], list[Prompt]]:
    """(the others, `num_held_out` prompts chosen by the seed), both in the order of the data set."""
    if num_held_out > len(prompts):
        setting = f"held_out of {part!r}" if part else "prompts.held_out"
        raise DataError(
            f"{setting} is {num_held_out}, but there are only {len(prompts)} prompts to take them from; "
            f"lower {setting} or give more records"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(prompts))[:num_held_out].tolist())
    others = [prompt for place, prompt in enumerate(prompts) if place not in chosen]
    return others, [prompts[place] for place in sorted(chosen)]


def _all_too_long(part: Part, limit: int) -> DataError:
    return DataError(
        f"none of the {len(part.held_out or ())} held-out tasks of {part.name!r} has a prompt of at most {limit} "
        "tokens; raise prompts.max_prompt_tokens, or change the arguments of the families"
    )


def without_those_of(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[Prompt]:
    """The prompts that are not in `held_out`, apart from white space."""
    held_out_texts = {_normalised(prompt.text) for prompt in held_out}
    return [prompt for prompt in prompts if _normalised(prompt.text) not in held_out_texts]


def _normalised(text: str) -> str:
    return " ".join(text.split())


def _make_encoder(model_dir: Path, config: "PromptsConfig") -> PromptEncoder:
    if config.system_prompt is not None and not config.chat_template:
        raise ConfigError(
            "prompts.system_prompt is set, but prompts.chat_template is false, so it would not be used; unset it"
        )
    if config.chat_template_arguments and not config.chat_template:
        raise ConfigError(
            "prompts.chat_template_arguments is set, but prompts.chat_template is false, so it would not be used; "
            "unset it"
        )
    template = None
    if config.chat_template is not False:
        name = config.chat_template if isinstance(config.chat_template, str) else None
        template = load_chat_template(model_dir, name, config.chat_template_arguments)
    if config.chat_template_arguments and template is None:
        raise ModelError(f"prompts.chat_template_arguments is set, but {model_dir} has no chat template; unset it")
    if config.system_prompt is not None and template is None:
        raise ModelError(f"prompts.system_prompt is set, but {model_dir} has no chat template; unset it")
    return PromptEncoder(load_tokenizer(model_dir), template, config.system_prompt)


def _to_prompts(
    records: list[Record], encoder: PromptEncoder, config: "RunConfig", first_id: int, part: Part
) -> tuple[list[Prompt], int]:
    """The prompts that fit, numbered by their position among the records, and how many do not fit."""
    prompts, reward = [], part.reward if part.reward in config.own_rewards else ""
    for place, (record, token_ids) in enumerate(zip(records, encoder.encode(records), strict=True)):
        if _fits(len(token_ids), record, config.prompts):
            ids = np.array(token_ids, np.int32)
            told = record.question, ids, record.answer, metadata_json(record)
            prompts.append(Prompt(first_id + place, *told, part.name, reward))
    return prompts, len(records) - len(prompts)


def metadata_json(record: Record) -> str:
    """The metadata as the text of a JSON object, encoded once: it goes to the reward function with every sample.

    Dates become ISO 8601 texts and decimal numbers texts, because JSON has neither. Raises `DataError` for what has no
    such form (bytes, such as those of a picture).
    """
    try:
        return json.dumps(record.metadata, default=_as_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{record.place}: a field cannot be given to the reward function: {error}; list the fields that it needs "
            "in prompts.metadata_fields"
        ) from error


def _as_json(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _fits(num_tokens: int, record: Record, config: "PromptsConfig") -> bool:
    if num_tokens == 0:
        raise DataError(f"{record.place}: the prompt {record.question!r} has no tokens; remove the record")
    if num_tokens > config.max_prompt_tokens and config.on_too_long == "error":
        raise DataError(
            f"{record.place}: the prompt has {num_tokens} tokens, but prompts.max_prompt_tokens is "
            f"{config.max_prompt_tokens}; raise it, or set prompts.on_too_long: skip"
        )
    return num_tokens <= config.max_prompt_tokens
