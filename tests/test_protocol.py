"""The messages: what the protocol says of itself is made from its unions."""

import ast
import re
import textwrap
from typing import get_args

from darts_async import protocol
from tests import ROOT

UNIONS = {
    match.groups(): [message.__name__ for message in get_args(union)]
    for name, union in vars(protocol).items()
    if (match := re.fullmatch(r"([A-Z][a-z]+)To([A-Z][a-z]+)", name))
}


def picture() -> str:
    """One paragraph for each union."""
    heads = {names: f"    {names[0]} -> {names[1]}" for names in UNIONS}
    width = max(map(len, heads.values())) + 2
    return "\n".join(
        textwrap.fill(", ".join(UNIONS[names]), 119, initial_indent=f"{head:{width}}", subsequent_indent=" " * width)
        for names, head in heads.items()
    )


def test_the_picture_of_the_protocol_is_made_from_its_unions() -> None:
    assert picture() in str(protocol.__doc__), f"the docstring of the protocol should hold\n\n{picture()}\n"


def test_every_message_is_in_a_union() -> None:
    in_unions = {name for names in UNIONS.values() for name in names}
    messages = {name for name, kind in vars(protocol).items() if _is_message(kind)}
    assert messages == in_unions


def test_messages_elsewhere_are_in_the_modules_that_the_protocol_names() -> None:
    """Tagged structs that are written to files have tags too: these modules say which files."""
    of_files = {"darts_async.trace", "darts_async.shaper.ledger", "darts_async.shaper.durable.replayable_state"}
    for folder in ("darts_async", "launcher"):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if _tagged(path.read_text()) and module != "darts_async.protocol":
                assert module in of_files or f"    {module} " in str(protocol.__doc__), module


def _is_message(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, protocol.Message) and kind is not protocol.Message


def _tagged(source: str) -> bool:
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return any(keyword.arg == "tag" for node in classes for keyword in node.keywords)
