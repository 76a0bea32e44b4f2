"""Reads the YAML of a run as a typed configuration, or reports all of its problems.

`settings_tree` merges files and words of the command line, and knows where each value was written. `RunConfig`
validates the values. So a message can name the line of a setting.
"""

import datetime
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from darts_async.config import RunConfig
from launcher.field_names import OURS
from launcher.problems import InputError, Problem, shown
from launcher.settings_tree import COMMAND_LINE, MAX_FILE_BYTES, Origin, Overrides, Place, dotted, read_tree

_MAX_SUGGESTIONS = 6
NO_OVERRIDES = Overrides()
_FOLLOWS = "default_factory_not_called"
"""What pydantic says of a default that follows from another setting, where that one is wrong."""


def load_config(path: Path, overrides: Overrides = NO_OVERRIDES) -> RunConfig:
    """Read and validate a run's file, with what replaces its settings. Raises `InputError` with all problems."""
    return parse_config(_read(path), path, overrides)


def parse_config(text: str, path: Path, overrides: Overrides = NO_OVERRIDES) -> RunConfig:
    """Validate the text of a run's file; `path` names it in messages. Raises `InputError`."""
    texts = [(path, text), *((file, _read(file)) for file in overrides.files)]
    tree = read_tree(texts, overrides.words)
    try:
        config = RunConfig.model_validate(tree.values)
    except ValidationError as error:
        details_of = [each for each in error.errors(include_url=False) if each["type"] != _FOLLOWS]
        found = tuple(_problem(details, tree.origins) for details in details_of)
        in_order = sorted((*tree.repeated, *found), key=lambda problem: (problem.source or "", problem.line or 0))
        raise InputError(path, tuple(in_order)) from error
    if tree.repeated:
        raise InputError(path, tree.repeated)
    return config


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            fix = "give the YAML file of a run"
            raise InputError(path, (Problem("", f"is longer than {MAX_FILE_BYTES:,} bytes", fix=fix),))
        return data.decode()
    except FileNotFoundError as error:
        raise InputError(path, (_missing_file(path),)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, (Problem("", f"cannot be read: {error}"),)) from error


def _missing_file(path: Path) -> Problem:
    """Names are compared without their endings, because these make any two names similar."""
    there = {found.stem: found for found in sorted(path.parent.glob("*.y*ml"))} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(path.stem, there, n=1)
    if near:
        fix = f"did you mean {there[near[0]]}?"
    elif there:
        fix = f"the YAML files there are {', '.join(found.name for found in [*there.values()][:_MAX_SUGGESTIONS])}"
    else:
        fix = "give the path of a YAML file"
    return Problem("", "there is no such file", fix=fix)


def _problem(details: ErrorDetails, origins: Mapping[Place, Origin]) -> Problem:
    place = tuple(details["loc"])
    known = (origins[place[:end]] for end in range(len(place), 0, -1) if place[:end] in origins)
    origin = next(known, Origin(None))
    name, found = dotted(place), shown(details["input"])
    fix: str | None
    if details["type"] == "extra_forbidden":
        message, fix = "there is no such setting", _suggestion(place, details["input"])
        return Problem(name, message, found, fix, origin.line, source=origin.source)
    if details["type"] == "value_error":
        return _refused(name, details["input"], str(details["ctx"]["error"]), origin)
    expected = _EXPECTED.get(details["type"]) or details["msg"].replace("Input should be", "expected", 1)
    fix = _type_fix(details)
    if origin.source == COMMAND_LINE and details["type"] == "string_type":  # the shell takes the outer quotes
        fix = f"put it in two pairs of quotes: {name}='\"{details['input']}\"'"
    elif details["type"] in _NUMBERS and not _is_number(details["input"]):
        fix = None
    return Problem(name, expected, found, fix, origin.line, source=origin.source)


def _refused(place: str, value: Any, text: str, origin: Origin) -> Problem:
    """A problem that the settings describe as `what is wrong; the fix`. A value is shown once."""
    found = shown(value) if isinstance(value, str | int | float) else None
    message, _, fix = text.partition("; ")
    for beginning in (f"{place} is {found}", f"{place} {found} ", f"{found} "):
        message = message.removeprefix(beginning)
    return Problem(place, message or "there is no such choice", found, fix or None, origin.line, source=origin.source)


_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "model_type": "expected a section: keys and values, indented below",
    "dict_type": "expected a mapping",
    "tuple_type": "expected a list",
    "finite_number": "expected a finite number",
}


_NUMBERS = ("int_type", "float_type")


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True


def _type_fix(details: ErrorDetails) -> str | None:
    kind, value = details["type"], details["input"]
    if kind == "string_type" and isinstance(value, (int, float, datetime.date)):
        return f"put it in quotes: '{value}'"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return "write it without quotes"
    if kind == "literal_error" and isinstance(value, str):
        options = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        near = difflib.get_close_matches(value, options, n=1)
        return f"did you mean {near[0]}?" if near else None
    return None


def _suggestion(place: Place, value: Any) -> str:
    """What the key is here, and then what the keys below it are."""
    known = _known_as(place)
    below = [f"{theirs} is {OURS[theirs]}" for theirs in dict.fromkeys(_keys(value)) if theirs in OURS]
    if below:
        return f"{known or 'leave this section out'}; of its keys, {', '.join(below[:_MAX_SUGGESTIONS])}"
    return known or "the settings here are " + ", ".join(_section(place[:-1]).model_fields)


def _known_as(place: Place) -> str:
    """Our name of the key, the nearest key of that section, or the same key in another section; empty without any."""
    key = str(place[-1])
    if key in OURS:
        return f"here it is {OURS[key]}"
    near = difflib.get_close_matches(key, list(_section(place[:-1]).model_fields), n=1, cutoff=0.6)
    if near:
        return f"did you mean {dotted((*place[:-1], near[0]))}?"
    elsewhere = next((found for found in all_places(RunConfig, ()) if found[-1] == key), None)
    return f"did you mean {dotted(elsewhere)}?" if elsewhere is not None else ""


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)


def _section(place: Place) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for part in place:
        section = _section_of(section, str(part)) or section
    return section


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one (`X` or `X | None`)."""
    annotation = section.model_fields[key].annotation if key in section.model_fields else None
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def all_places(section: type[BaseModel], place: Place) -> Iterator[Place]:
    for key in section.model_fields:
        yield (*place, key)
        inner = _section_of(section, key)
        if inner is not None:
            yield from all_places(inner, (*place, key))
