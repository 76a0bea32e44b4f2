"""Loads the prompts of a run: reads, renders, tokenises, checks and splits them.

No prompt is in both sets: a training prompt that is also held out, apart from white space, is removed. The data and the
seed alone decide which prompts are held out, so that runs of different sizes are evaluated on the same ones. This
module imports neither torch nor transformers.
"""

import datetime
import decimal
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from darts_async.config.paths import expanded
from darts_async.errors import ConfigError, DataError, ModelError
from darts_async.extensions import PROMPTS, load
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.prompts.chat import ChatMessage, ChatTemplate
from darts_async.prompts.chat_files import load_chat_template
from darts_async.prompts.files import FileFormat
from darts_async.prompts.records import Fields, Record, parse_record, read_records
from darts_async.prompts.source import Prompt

if TYPE_CHECKING:
    from darts_async.config import PromptsConfig, RunConfig

Rows = Iterable[Mapping[str, Any]]
MAX_RECORDS = 1 << 22
"""What a source may give of each set: one without an end is a mistake."""
_TEXTS_PER_BATCH = 1024


class Source(Protocol):
    """Gives records, of which some are held out, or two sets of them, `train` and `held_out`.

    Example:
        >>> def sums(*, num_train: int | None, held_out: int, seed: int) -> Rows:
        ...     for number in range((num_train or 1000) + held_out):
        ...         yield {"prompt": f"{number} + {number} =", "answer": 2 * number, "size": len(str(number))}
        >>> next(iter(sums(num_train=64, held_out=8, seed=0)))
        {'prompt': '0 + 0 =', 'answer': 0, 'size': 1}
    """

    def __call__(self, *, num_train: int | None, held_out: int, seed: int) -> Rows | Mapping[str, Rows]:
        """`prompts.num_train` (None if it is not set), `prompts.held_out` and the seed of the run are handed over. The
        same ones give the same records: a shaper that is started again asks again."""


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
    train_records, held_out_records = _read(config.prompts, config.seed)
    train, num_too_long = _to_prompts(train_records, encoder, config.prompts, first_id=0)
    if held_out_records is None:
        train, held_out = split_off(train, config.prompts.held_out, config.seed)
    else:
        others, num_others_too_long = _to_prompts(held_out_records, encoder, config.prompts, len(train_records))
        num_too_long += num_others_too_long
        _, held_out = split_off(others, config.prompts.held_out, config.seed)
    distinct = without_those_of(train, held_out)
    if not distinct:
        sets = PromptSets((), tuple(held_out), num_too_long, len(train))
        raise DataError(f"of {len(train_records)} records there are {sets.counts}; give more, or hold out fewer")
    num_duplicates = len(train) - len(distinct)
    return PromptSets(tuple(distinct[: config.prompts.num_train]), tuple(held_out), num_too_long, num_duplicates)


def split_off(prompts: list[Prompt], num_held_out: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(the others, `num_held_out` prompts chosen by the seed), both in the order of the data set."""
    if num_held_out > len(prompts):
        raise DataError(
            f"prompts.held_out is {num_held_out}, but there are only {len(prompts)} prompts to take them from; "
            "lower prompts.held_out or give more records"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(prompts))[:num_held_out].tolist())
    others = [prompt for place, prompt in enumerate(prompts) if place not in chosen]
    return others, [prompts[place] for place in sorted(chosen)]


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


def _read(config: "PromptsConfig", seed: int) -> tuple[list[Record], list[Record] | None]:
    """Training records, and the held-out records if they are a separate set."""
    pattern = None if config.answer_pattern is None else re.compile(config.answer_pattern)
    fields = Fields(config.prompt_field, config.answer_field, pattern, config.metadata_fields)
    if config.source not in PROMPTS.built_in:
        return _ask(config, seed, fields)
    assert config.path is not None, "the configuration requires it"
    file_format: FileFormat = "parquet" if config.source == "parquet" else "jsonl"
    records = read_records(expanded(config.path, "prompts.path"), file_format, fields)
    if config.held_out_path is None:
        return records, None
    held_out_path = expanded(config.held_out_path, "prompts.held_out_path")
    return records, read_records(held_out_path, file_format, fields)


def _ask(config: "PromptsConfig", seed: int, fields: Fields) -> tuple[list[Record], list[Record] | None]:
    """The records of a source that is called: an iterable of them, or a mapping of two sets."""
    where = f"prompts.source {config.source!r}"
    source: Source = load(PROMPTS, config.source)
    try:
        given = source(num_train=config.num_train, held_out=config.held_out, seed=seed)
        sets = given if isinstance(given, Mapping) else {"train": given}
        rows = {name: list(itertools.islice(sets[name], MAX_RECORDS + 1)) for name in sets}
    except DataError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise DataError(f"{where} raised {type(error).__name__}: {error}") from error
    if "train" not in rows or not rows.keys() <= {"train", "held_out"}:
        raise DataError(f"{where} gave sets named {sorted(map(str, rows))}; name them 'train' and 'held_out'")
    for name, found in rows.items():
        if not 0 < len(found) <= MAX_RECORDS:
            amount = "no records" if not found else f"more than {MAX_RECORDS:,} records"
            raise DataError(f"{where} gave {amount} of the set {name!r}; give at least 1, and come to an end")
    records = {
        name: [parse_record(row, f"{where}, {name} record {place}", fields) for place, row in enumerate(found)]
        for name, found in rows.items()
    }
    return records["train"], records.get("held_out")


def _to_prompts(
    records: list[Record], encoder: PromptEncoder, config: "PromptsConfig", first_id: int
) -> tuple[list[Prompt], int]:
    """The prompts that fit, numbered by their position among the records, and how many do not fit."""
    prompts = []
    for place, (record, token_ids) in enumerate(zip(records, encoder.encode(records), strict=True)):
        if _fits(len(token_ids), record, config):
            ids = np.array(token_ids, np.int32)
            prompts.append(Prompt(first_id + place, record.question, ids, record.answer, metadata_json(record)))
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
