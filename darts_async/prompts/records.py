"""Reads records of a data set file and checks each field. Every error names the file, the line and the fix.

A record is an object with a prompt (a text, or a list of {role, content} messages), a reference answer (a text or
a number; a dotted name such as `reward_model.ground_truth` reaches into nested objects, a pattern such as
`####\\s*(.+)` finds the answer after its reasoning) and anything else. The other fields, or those that are asked for,
are metadata: the reward function gets them as they are, numbers, lists and objects included. A message may have more
than role and content, and keeps it. Fields of a message without a value (null) are left out: parquet adds them.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts_async.errors import DataError
from darts_async.prompts.chat import ChatMessage
from darts_async.prompts.files import FileFormat, read_rows
from darts_async.prompts.json_lines import look_up

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Record:
    """One usable record."""

    place: str
    """File and line, for messages."""
    prompt: str | tuple[ChatMessage, ...]
    answer: str
    metadata: dict[str, Any]

    @property
    def question(self) -> str:
        """The question as text; for a conversation all turns except the system's."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = (text_of(message.get("content")) for message in self.prompt if message["role"] != "system")
        return "\n\n".join(text for text in texts if text)


@dataclass(frozen=True, slots=True)
class Fields:
    """The names of the fields of a record."""

    prompt: str
    answer: str
    answer_pattern: re.Pattern[str] | None = None
    """Finds the answer in its field: the first group, or the complete match."""
    metadata: tuple[str, ...] | None = None
    """Fields of the metadata; None: all fields except prompt and answer."""

    @property
    def used(self) -> tuple[str, ...] | None:
        """Names of all used fields, including dotted names; None: all fields."""
        return None if self.metadata is None else (self.prompt, self.answer, *self.metadata)


def read_records(paths: Sequence[Path], file_format: FileFormat, fields: Fields) -> list[Record]:
    """All records of some files, in their order.

    Raises:
        DataError: a file is missing, all are empty, or one of the records cannot be used.
    """
    records = [
        parse_record(row, place, fields) for path in paths for place, row in read_rows(path, file_format, fields.used)
    ]
    if not records:
        raise DataError(f"{', '.join(map(str, paths))} holds no records")
    return records


def parse_record(row: Any, place: str, fields: Fields) -> Record:
    """A record from its decoded form."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with fields, found {_named_type(row)}")
    prompt_place, answer_place = f"{place}: field {fields.prompt!r}", f"{place}: field {fields.answer!r}"
    prompt = _parse_prompt(_field(row, fields.prompt, place, "prompts.prompt_field"), prompt_place)
    answer = _parse_answer(_field(row, fields.answer, place, "prompts.answer_field"), answer_place)
    if fields.answer_pattern is not None:
        answer = _found(fields.answer_pattern, answer, answer_place)
    return Record(place, prompt, answer, _metadata(row, place, fields))


def _metadata(row: Mapping[str, Any], place: str, fields: Fields) -> dict[str, Any]:
    if fields.metadata is not None:
        return {name: _field(row, name, place, "prompts.metadata_fields") for name in fields.metadata}
    used = {_top_level(row, fields.prompt), _top_level(row, fields.answer)}
    return {name: value for name, value in row.items() if name not in used}


def _field(row: Mapping[str, Any], name: str, place: str, setting: str) -> Any:
    value = look_up(row, name, _ABSENT)
    if value is not _ABSENT:
        return value
    near = difflib.get_close_matches(name, [str(key) for key in row], n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"{place}: no field {name!r} ({setting}); the record has {sorted(map(str, row))}{suggestion}")


def _top_level(row: Mapping[str, Any], name: str) -> str:
    return name if name in row else name.split(".")[0]


def _parse_prompt(value: Any, place: str) -> str | tuple[ChatMessage, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{place}: the prompt is empty; remove the record")
        return value
    if not isinstance(value, list):
        raise DataError(f"{place}: expected a text or a list of messages, found {_named_type(value)}")
    messages = tuple(_parse_message(message, f"{place}, message {index}") for index, message in enumerate(value))
    if not messages:
        raise DataError(f"{place}: the list of messages is empty; remove the record")
    if messages[-1]["role"] in ("assistant", "system"):
        raise DataError(
            f"{place}: the last message is of the role {messages[-1]['role']!r}; "
            "end the prompt with the turn that the model is to answer"
        )
    return messages


def _parse_message(value: Any, place: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object with role and content, found {_named_type(value)}")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or (text_of(content) is None and not value.get("tool_calls")):
        raise DataError(
            f"{place}: role must be a text, and content a text or a list of texts, found {_named_type(role)} and "
            f"{_named_type(content)}"
        )
    return {name: part for name, part in value.items() if part is not None or name == "content"}


def text_of(content: Any) -> str | None:
    """The text of a message's content, possibly in parts; None if a part is not text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def _parse_answer(value: Any, place: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: the answer is {value}, which equals no number; correct the record")
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise DataError(
        f"{place}: the answer must be a text or a number, found {_named_type(value)}; "
        "a dotted name reaches into nested objects"
    )


def _found(pattern: re.Pattern[str], text: str, place: str) -> str:
    match = pattern.search(text)
    found = (match[1 if pattern.groups else 0] or "").strip() if match else ""
    if not found:
        raise DataError(f"{place}: prompts.answer_pattern {pattern.pattern!r} has no match in {text[-60:]!r}")
    return found


def _named_type(value: Any) -> str:
    return "nothing (null)" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
