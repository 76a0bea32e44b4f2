"""Records of a data set file, checked field by field: every refusal names the file, the line and the fix.

A record is an object with a prompt (a text, or a list of {role, content} messages), a reference answer (a text or
a number; a dotted name such as `reward_model.ground_truth` reaches into nested objects, a pattern such as
`####\\s*(.+)` finds the answer behind its reasoning) and anything else. Other fields that hold a text, a number or a
truth value become metadata.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from darts_async.errors import DataError
from darts_async.prompts.chat import ChatMessage

FileFormat = Literal["jsonl", "parquet"]

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Record:
    """One usable record."""

    place: str
    """File and line, for messages."""
    prompt: str | tuple[ChatMessage, ...]
    answer: str
    metadata: dict[str, str]

    @property
    def question(self) -> str:
        """What is asked, as text: of a conversation all turns but the system's."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(message["content"] for message in self.prompt if message["role"] != "system")


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a record has what."""

    prompt: str
    answer: str
    answer_pattern: re.Pattern[str] | None = None
    """Finds the answer in its field: the first group, or all that is matched."""


def read_records(path: Path, file_format: FileFormat, fields: Fields) -> list[Record]:
    """All records of a file, in its order.

    Raises:
        DataError: the file is missing or empty, or one of its records cannot be used.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path.absolute()}; check prompts.path and prompts.held_out_path")
    rows = _jsonl_rows(path) if file_format == "jsonl" else _parquet_rows(path)
    records = [parse_record(row, place, fields) for place, row in rows]
    if not records:
        raise DataError(f"{path} holds no records")
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
    used = {_top_level(row, fields.prompt), _top_level(row, fields.answer)}
    metadata = {
        str(name): text for name, value in row.items() if name not in used and (text := _scalar_text(value)) is not None
    }
    return Record(place, prompt, answer, metadata)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    decoder = msgspec.json.Decoder()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                yield place, decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{place}: not valid JSON: {error}; each line must hold one JSON object") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a parquet file; reading it needs the extra `data`: pip install 'darts-async[data]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet (at row {number}): {error}") from error


def _field(row: Mapping[str, Any], name: str, place: str, setting: str) -> Any:
    value = _look_up(row, name)
    if value is not _ABSENT:
        return value
    near = difflib.get_close_matches(name, [str(key) for key in row], n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"{place}: no field {name!r} ({setting}); the record has {sorted(map(str, row))}{suggestion}")


def _look_up(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


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
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{place}: role and content must be texts, found {_named_type(role)} and {_named_type(content)}"
        )
    return ChatMessage(role=role, content=content)


def _parse_answer(value: Any, place: str) -> str:
    text = _scalar_text(value)
    if text is None:
        raise DataError(
            f"{place}: the answer must be a text or a number, found {_named_type(value)}; "
            "a dotted name reaches into nested objects"
        )
    return text


def _found(pattern: re.Pattern[str], text: str, place: str) -> str:
    match = pattern.search(text)
    found = (match[1 if pattern.groups else 0] or "").strip() if match else ""
    if not found:
        raise DataError(f"{place}: prompts.answer_pattern {pattern.pattern!r} finds nothing in {text[-60:]!r}")
    return found


def _scalar_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, (bool, int, float)) else None


def _named_type(value: Any) -> str:
    return "nothing (null)" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
