"""The settings of a run as one tree of YAML: a file, further files over it, and words of the command line over both.

    file.yaml  <-  --file more.yaml  <-  --file again.yaml  <-  learner.learning_rate=1e-5
    a mapping is merged key by key; any other value, also a list, replaces what was there

Each node remembers where it was written, so that a message can name it. Two surprising rules of YAML 1.1 are changed: a
repeated key is an error (in YAML the last one wins), and `5e-4` is a number (in YAML it is a text).

A few lines of aliases of aliases may mean more values than a machine can hold, so values are counted before aliases are
expanded.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.problems import InputError, Problem, shown

MAX_FILE_BYTES = 256 << 10
"""Size limit of a file. A file with every setting has a twentieth of it; the parser needs over a second for it."""
MAX_VALUES = 100_000
"""Most values of a file, with aliases expanded."""
COMMAND_LINE = "the command line"

_MAX_DIGITS = 100
"""Length limit of a whole number, including underscores and colons."""

Place = tuple[str | int, ...]
"""Path of a value: keys and list positions."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """What replaces settings of a run's file. Later ones win, and `words` win over `files`.

    >>> Overrides(words=("learner.steps=200", "seed=3")).words
    ('learner.steps=200', 'seed=3')
    """

    files: tuple[Path, ...] = ()
    words: tuple[str, ...] = ()
    """Each is `section.setting=value`. The value is read as YAML."""

    def __bool__(self) -> bool:
        return bool(self.files or self.words)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written."""

    line: int | None
    """Counted from 1."""
    source: str | None = None
    """`the command line`, or a file; None for the run's own file."""


@dataclass(frozen=True, slots=True)
class SettingsTree:
    """The merged settings of a run."""

    values: dict[str, Any]
    origins: dict[Place, Origin]
    """The origin of each place."""
    repeated: tuple[Problem, ...]
    """A problem for each key that one file has twice."""


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
        """Raises `ConstructorError` for a text with a null character or half of a surrogate pair."""
        if "\0" in node.value:
            raise yaml.constructor.ConstructorError(None, None, "a text with a null character", node.start_mark)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            fault = "a text with half of a surrogate pair (write the character itself)"
            raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
        return str(super().construct_yaml_str(node))


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_tree(texts: list[tuple[Path, str]], words: tuple[str, ...]) -> SettingsTree:
    """Merge files, of which the first is the run's own, and words of the command line.

    Raises:
        InputError: one of them cannot be read. The error names the run's own file or the file at fault.
    """
    own = texts[0][0]
    sources = [_of_file(path, text, is_own=path is own) for path, text in texts]
    sources += [_of_word(word, own) for word in words]
    root: yaml.Node = sources[0][0]
    for over, _ in sources[1:]:
        root = _merged(root, over)
    repeated = tuple(problem for _, problems in sources for problem in problems)
    return SettingsTree(_values(root, own), dict(_origins(root, ())), repeated)


def dotted(place: Place) -> str:
    """`section.setting` of a place."""
    return ".".join(str(part) for part in place)


# --- one source ----------------------------------------------------------------------------------------------


def _of_file(path: Path, text: str, *, is_own: bool) -> tuple[yaml.MappingNode, tuple[Problem, ...]]:
    """The tree of a file, and a problem for each repeated key."""
    name = None if is_own else str(path)
    try:
        node = _composed(text, name)
        if node is None:
            raise InputError(path, (Problem("", "the file is empty", fix="start from configs/quickstart.yaml"),))
        found = _values(node, path)
        if not isinstance(node, yaml.MappingNode):
            fix = "write `section:` with keys below it"
            raise InputError(path, (Problem("", "is not a mapping", shown(found), fix, 1),))
        return node, tuple(_repeated(_origins(node, ())))
    except yaml.YAMLError as error:
        raise InputError(path, (_syntax_problem(error),)) from error
    except RecursionError as error:  # an alias inside its own anchor, or hundreds of brackets
        raise InputError(path, (Problem("", "is nested too deeply", fix="write values out"),)) from error
    except _TooManyValuesError as error:
        raise InputError(path, (error.problem,)) from error


def _of_word(word: str, own: Path) -> tuple[yaml.MappingNode, tuple[Problem, ...]]:
    """The tree of `section.setting=value`."""
    name, equals, text = word.partition("=")
    keys = name.split(".")
    fix = "write it as section.setting=value, for example learner.steps=200"
    if not equals or not all(keys):
        raise InputError(own, (Problem(word, "this word of the command line is not a setting", fix=fix),))
    node: yaml.Node | None
    try:
        node = _composed(text, COMMAND_LINE)
        if node is not None:
            _Loader("").construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError, _TooManyValuesError) as error:
        fix = f"put the value in quotes: '{name}=\"...\"'"
        problem = Problem(name, "the value is not YAML", shown(text), fix, source=COMMAND_LINE)
        raise InputError(own, (problem,)) from error
    mark = yaml.Mark(COMMAND_LINE, 0, 0, 0, None, 0)
    value = node or yaml.ScalarNode("tag:yaml.org,2002:null", "", mark, mark)
    for key in reversed(keys):
        value = yaml.MappingNode(
            "tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", key, mark, mark), value)], mark, mark
        )
    assert isinstance(value, yaml.MappingNode)
    return value, ()


class _TooManyValuesError(Exception):
    def __init__(self, problem: Problem) -> None:
        self.problem = problem


def _composed(text: str, name: str | None) -> yaml.Node | None:
    """The node of a text, whose marks have the name of its source (empty for the run's own file)."""
    loader = _Loader(text)
    loader.name = name or ""
    node = loader.get_single_node()
    if node is not None and (problem := _too_many_values(node)) is not None:
        raise _TooManyValuesError(problem)
    return node


def _values(node: yaml.Node, path: Path) -> Any:
    try:
        return _Loader("").construct_document(node)
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


def _repeated(places: Iterable[tuple[Place, Origin]]) -> Iterator[Problem]:
    """A problem for each repeated key of a file, but none for the keys below it."""
    first: dict[Place, Origin] = {}
    repeated: set[Place] = set()
    for place, origin in places:
        if place not in first:
            first[place] = origin
            continue
        repeated.add(place)
        if place[:-1] not in repeated:
            message = f"this key is repeated; it is first on line {first[place].line}"
            fix = "remove one of them"
            yield Problem(dotted(place), message, fix=fix, line=origin.line, source=origin.source)


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    if mark is None:
        return Problem("", f"is not YAML: {what}")
    fix = "check indentation, colons and quotes there"
    return Problem("", f"is not YAML: {what} (column {mark.column + 1})", fix=fix, line=mark.line + 1)


# --- several -------------------------------------------------------------------------------------------------


def _merged(base: yaml.Node, over: yaml.Node) -> yaml.Node:
    """`over` laid over `base`. Neither is changed, except that merge keys (`<<`) are resolved."""
    if not (isinstance(base, yaml.MappingNode) and isinstance(over, yaml.MappingNode)):
        return over
    for node in (base, over):
        _Loader("").flatten_mapping(node)
    pairs = {str(key.value): (key, value) for key, value in base.value}
    for key, value in over.value:
        name = str(key.value)
        if name in pairs:
            value = _merged(pairs[name][1], value)
            key = key if value.start_mark is not pairs[name][1].start_mark else pairs[name][0]
        pairs[name] = (key, value)
    return yaml.MappingNode(base.tag, list(pairs.values()), base.start_mark, base.end_mark)


def _origins(node: yaml.Node, place: Place) -> Iterator[tuple[Place, Origin]]:
    """Every place with its origin, in order. A repeated key comes again."""
    if isinstance(node, yaml.MappingNode):
        inner: list[tuple[Place, yaml.Node, yaml.Node]] = [
            ((*place, str(key.value)), key, value) for key, value in node.value
        ]
    else:
        inner = [((*place, index), value, value) for index, value in enumerate(_inner(node))]
    for at, marked, value in inner:
        yield at, _origin(marked)
        yield from _origins(value, at)


def _origin(node: yaml.Node) -> Origin:
    source = node.start_mark.name or None
    return Origin(None if source == COMMAND_LINE else node.start_mark.line + 1, source)
