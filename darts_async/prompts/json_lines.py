"""Decodes a line of JSON in which only the used fields must be readable.

Python's `json` refuses values that are nested too deeply and numbers of thousands of digits. A record may have such a
value in an unused field. If `json` fails on a line, the line is split into its fields, and only the used ones are
decoded. The end of an unused field is found by counting brackets outside of strings, without recursion and in linear
time.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from darts_async.errors import DataError

_PIECE = re.compile(r'\s*(?P<piece>"[^"\\]*(?:\\.[^"\\]*)*"|[][{}:,]|[^][{}:,"\s]+)', re.DOTALL)
_WHOLE_RECORD = (
    "shorten it, remove it, or, if the reward does not need it, list the needed fields in prompts.metadata_fields"
)
_USED = "shorten it, or remove the record"


def decode_line(line: bytes, place: str, fields: Collection[str] | None) -> Any:
    """The value of a line. An unused field that cannot be read is None.

    Args:
        place: file and line, for messages.
        fields: the used fields, including dotted names; None: all.

    Raises:
        DataError: the line is not JSON, or a used field cannot be read.
    """
    try:
        text = line.decode()
        value = _value_of(text, place, fields)
        if "\\u" in text:  # an escape may be half of a surrogate pair, which is valid JSON but not valid text
            used = value if fields is None else [look_up(value, name) for name in fields]
            json.dumps(used, ensure_ascii=False).encode()
    except DataError:
        raise
    except RecursionError as error:  # it was just shallow enough to be read
        raise DataError(f"{place}: a field is nested too deeply to be checked; {_WHOLE_RECORD}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: {error}; save the file as UTF-8: iconv -t UTF-8") from error
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON: {error}; each line must hold one JSON object") from error
    return value


def look_up(row: Any, name: str, default: Any = None) -> Any:
    """The field of an object with this name, or at the path of a dotted name."""
    if isinstance(row, dict) and name in row:
        return row[name]
    value = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def members(text: str) -> Iterator[tuple[str, str]]:
    """The names and the undecoded values of a JSON object. The values are not checked.

    Raises:
        ValueError: the text is not an object, or an end is missing.

    Example:
        >>> list(members('{"a": [1, {}], "b": "}"}'))
        [('a', '[1, {}]'), ('b', '"}"')]
    """
    pieces = _Pieces(text)
    pieces.expect("{")
    if pieces.peek() == "}":
        pieces.expect("}")
    else:
        yield pieces.member()
        while pieces.peek() == ",":
            pieces.expect(",")
            yield pieces.member()
        pieces.expect("}")
    if pieces.peek():
        raise ValueError(f"more text after the object, at character {pieces.end}")


class _Pieces:
    """A text, read piece by piece: a bracket, a comma, a colon, a string, or anything else up to one of these."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.end = 0
        """End of the last piece."""

    def peek(self) -> str:
        """The next piece; empty at the end of the text, or if a string has no end."""
        match = _PIECE.match(self._text, self.end)
        return match["piece"] if match is not None else ""

    def expect(self, piece: str) -> None:
        if self._take() != piece:
            raise ValueError(f"{piece!r} is missing at character {self.end}")

    def member(self) -> tuple[str, str]:
        name = self._take()
        if not name.startswith('"'):
            raise ValueError(f"the name of a field is missing at character {self.end}")
        self.expect(":")
        first = self.peek()
        if first in ("", "]", "}", ",", ":"):
            raise ValueError(f"a value is missing at character {self.end}")
        begin = self.end
        self._skip_value()
        return json.loads(name), self._text[begin : self.end].strip()

    def _skip_value(self) -> None:
        num_open = 0
        while True:
            piece = self._take()
            num_open += (piece in ("[", "{")) - (piece in ("]", "}"))
            if num_open == 0:
                return

    def _take(self) -> str:
        match = _PIECE.match(self._text, self.end)
        if match is None:
            raise ValueError(f"the text ends too early, or a string in it has no end, at character {self.end}")
        self.end = match.end()
        return match["piece"]


def _value_of(text: str, place: str, fields: Collection[str] | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return _used_of(text, None if fields is None else frozenset(fields), place, ())


def _used_of(text: str, used: frozenset[str] | None, place: str, path: tuple[str, ...]) -> Any:
    """An object, with None for its unused fields."""
    if not text.lstrip().startswith("{"):
        return _decoded(text, place, path, None if used is None else _USED)
    row: dict[str, Any] = {}
    for name, value in members(text):
        inner = frozenset(each.removeprefix(f"{name}.") for each in used or () if each.startswith(f"{name}."))
        if used is None or name in used:
            row[name] = _decoded(value, place, (*path, name), _WHOLE_RECORD if used is None else _USED)
        else:
            row[name] = _used_of(value, inner, place, (*path, name)) if inner else None
    return row


def _decoded(text: str, place: str, path: tuple[str, ...], fix: str | None) -> Any:
    where = f"{place}: field {'.'.join(path)!r}" if path else place
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to be read; {fix or _USED}") from error
    except ValueError as error:
        raise DataError(f"{where} holds a number that cannot be read: {error}; {fix or _USED}") from error
