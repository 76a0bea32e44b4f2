"""Reads the YAML file of a run as a typed configuration, or reports all of its problems.

The text is parsed once into nodes, which know their lines. `RunConfig` validates their values. So a message can name
the line of a setting. Two surprising rules of YAML 1.1 are changed: a repeated key is an error (in YAML the last one
wins), and `5e-4` is a number (in YAML it is a text).

A few lines of aliases of aliases may mean more values than a machine can hold, so values are counted before aliases are
expanded.
"""

import datetime
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from darts_async.config import RunConfig
from launcher.field_names import OURS
from launcher.problems import InputError, Problem, shown

MAX_FILE_BYTES = 256 << 10
"""Size limit of a file. A file with every setting has a twentieth of it; the parser needs over a second for it."""
MAX_VALUES = 100_000
"""Most values of a file, with aliases expanded."""

_MAX_DIGITS = 100
"""Length limit of a whole number, including underscores and colons."""

_MAX_SUGGESTIONS = 6

Place = tuple[str | int, ...]
"""Path of a value in the file: keys and list positions."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which also reads numbers such as `5e-4`. It refuses values that no setting can hold: whole
    numbers of more than 64 bits, and texts with a null character."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Raises `ConstructorError` for a number of more than 64 bits."""
        is_short = len(node.value) <= _MAX_DIGITS
        value = super().construct_yaml_int(node) if is_short else None
        if value is None or not -(1 << 63) <= value < 1 << 63:
            raise yaml.constructor.ConstructorError(None, None, "a whole number of more than 64 bits", node.start_mark)
        return int(value)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Raises `ConstructorError` for a text with a null character."""
        if "\0" in node.value:
            raise yaml.constructor.ConstructorError(None, None, "a text with a null character", node.start_mark)
        return str(super().construct_yaml_str(node))


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def load_config(path: Path) -> RunConfig:
    """Read and validate a run's file. Raises `InputError` with all problems of the file."""
    return parse_config(_read(path), path)


def parse_config(text: str, path: Path) -> RunConfig:
    """Validate the text of a run's file; `path` names it in messages. Raises `InputError`."""
    data, lines, repeated = _parse(text, path)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        found = tuple(_problem(details, lines) for details in error.errors(include_url=False))
        by_line = sorted((*repeated, *found), key=lambda problem: problem.line or 0)
        raise InputError(path, tuple(by_line)) from error
    if repeated:
        raise InputError(path, repeated)
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


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[Place, int], tuple[Problem, ...]]:
    """Values, the line of each place, and a problem for each repeated key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise InputError(path, (Problem("", "the file is empty", fix="start from configs/quickstart.yaml"),))
        if (problem := _too_many_values(node)) is not None:
            raise InputError(path, (problem,))
        if not isinstance(node, yaml.MappingNode):
            found = shown(_values(loader, node, path))
            raise InputError(path, (Problem("", "is not a mapping", found, "write `section:` with keys below it", 1),))
        places = tuple(_places(node, ()))
        repeated = tuple(_repeated(places))
        data = _values(loader, node, path)
    except yaml.YAMLError as error:
        raise InputError(path, (_syntax_problem(error),)) from error
    except RecursionError as error:  # an alias inside its own anchor, or hundreds of brackets
        raise InputError(path, (Problem("", "is nested too deeply", fix="write values out"),)) from error
    return data, dict(places), repeated


def _values(loader: _Loader, node: yaml.Node, path: Path) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # an invalid date, a number with thousands of digits
        raise InputError(path, (Problem("", f"holds a value that cannot be read: {error}"),)) from error


def _too_many_values(root: yaml.Node) -> Problem | None:
    """The innermost value that holds too many values once aliases are expanded. The parser has one node for an alias
    and its anchor, so each is counted once. A node within itself raises `RecursionError`."""
    counts: dict[int, int] = {}

    def count(node: yaml.Node) -> yaml.Node | None:
        """The culprit, if there is one; otherwise the node is in `counts`."""
        if id(node) in counts:
            return None
        inner = _inner(node)
        culprit = next((found for each in inner if (found := count(each)) is not None), None)
        counts[id(node)] = 1 + sum(counts.get(id(each), 0) for each in inner)
        return culprit or (node if counts[id(node)] > MAX_VALUES else None)

    culprit = count(root)
    if culprit is None:
        return None
    line, fix = culprit.start_mark.line + 1, "write fewer aliases (`*name`) of aliases"
    return Problem("", f"holds more than {MAX_VALUES:,} values once its aliases are expanded", fix=fix, line=line)


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _places(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    """Every place in the file with its line, in file order. A repeated key comes again."""
    if isinstance(node, yaml.MappingNode):
        inner: list[tuple[Place, yaml.Node, yaml.Node]] = [
            ((*place, str(key.value)), key, value) for key, value in node.value
        ]
    else:
        inner = [((*place, index), value, value) for index, value in enumerate(_inner(node))]
    for at, marked, value in inner:
        yield at, marked.start_mark.line + 1
        yield from _places(value, at)


def _repeated(places: Iterable[tuple[Place, int]]) -> Iterator[Problem]:
    """A problem for each repeated key, but none for the keys below it."""
    first: dict[Place, int] = {}
    repeated: set[Place] = set()
    for place, line in places:
        if place not in first:
            first[place] = line
            continue
        repeated.add(place)
        if place[:-1] not in repeated:
            message = f"this key is repeated; it is first on line {first[place]}"
            yield Problem(_dotted(place), message, fix="remove one of them", line=line)


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    if mark is None:
        return Problem("", f"is not YAML: {what}")
    fix = "check indentation, colons and quotes there"
    return Problem("", f"is not YAML: {what} (column {mark.column + 1})", fix=fix, line=mark.line + 1)


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)


def _problem(details: ErrorDetails, lines: Mapping[Place, int]) -> Problem:
    place = tuple(details["loc"])
    line = next((lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in lines), None)
    if details["type"] == "extra_forbidden":
        fix = _suggestion(place, details["input"])
        return Problem(_dotted(place), "there is no such setting", shown(details["input"]), fix, line)
    if details["type"] == "value_error":
        return _refused(_dotted(place), details["input"], str(details["ctx"]["error"]), line)
    expected = _EXPECTED.get(details["type"]) or details["msg"].replace("Input should be", "expected", 1)
    return Problem(_dotted(place), expected, shown(details["input"]), _type_fix(details), line)


def _refused(place: str, value: Any, text: str, line: int | None) -> Problem:
    """A problem that the settings describe as `what is wrong; the fix`. A value is shown once."""
    found = shown(value) if isinstance(value, str | int | float) else None
    message, _, fix = text.partition("; ")
    for beginning in (f"{place} is {found}", f"{place} {found} ", f"{found} "):
        message = message.removeprefix(beginning)
    return Problem(place, message or "there is no such choice", found, fix or None, line)


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
        return f"did you mean {_dotted((*place[:-1], near[0]))}?"
    elsewhere = next((found for found in all_places(RunConfig, ()) if found[-1] == key), None)
    return f"did you mean {_dotted(elsewhere)}?" if elsewhere is not None else ""


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
