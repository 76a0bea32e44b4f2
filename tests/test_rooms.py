"""The rooms: what is imported flows one way, between files and between folders."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("darts_async", "launcher")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, those inside functions and for types alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in FILES or node.module in FILES:
                    yield inner if inner in FILES else node.module


IMPORTS = {name: set(imported(path)) - {name} for name, path in FILES.items()}


def rooms_inside(folder: str) -> dict[str, set[str]]:
    """What the files and folders directly inside a folder import of each other."""
    prefix = f"{folder}." if folder else ""
    graph: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        room = _room(name, prefix)
        if room is not None:
            found = {_room(other, prefix) for other in others} - {room, None}
            graph.setdefault(room, set()).update(other for other in found if other is not None)
    return graph


def _room(name: str, prefix: str) -> str | None:
    return name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else None


def test_no_file_is_part_of_a_circle_of_imports() -> None:
    assert len(list(graphlib.TopologicalSorter(IMPORTS).static_order())) == len(FILES)


@pytest.mark.parametrize("folder", ["", *sorted({name.rpartition(".")[0] for name in FILES} - {""})])
def test_no_folder_is_part_of_a_circle_of_imports(folder: str) -> None:
    assert list(graphlib.TopologicalSorter(rooms_inside(folder)).static_order())


def test_a_circle_is_seen() -> None:
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"one": {"other"}, "other": {"one"}}).prepare()
