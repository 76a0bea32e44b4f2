"""Writes to the terminal safely. No other module writes to it.

Texts may come from a model, a data set or a library. Some characters are commands to a terminal (move the cursor, set
the title, clear the screen), and some invisibly change what a reader sees (the direction of text, zero width). Each of
them is shown as an escape, `\\u001b`. Square brackets are never markup.

A character that the terminal's encoding lacks is replaced by another sign or an escape, and never causes an error.
"""

import codecs
import sys
import traceback
import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_HIDDEN = frozenset(["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"])
"""Categories of Unicode: control, format (direction, zero width), surrogate, private, unassigned, separators."""
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_LAYOUT = frozenset("\n\t")
_ERRORS = "darts-launch"
_ASCII = {
    **{"✓": "+", "✗": "x", "■": "#", "•": "*", "·": ".", "…": "...", "│": "|", "→": "->", "±": "+-"},
    **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
    **dict(zip("▏▎▍▌▋▊▉", "...----", strict=True)),
}
"""Replacements of our own signs for a terminal with ASCII only."""


def printable(text: str) -> str:
    """The text with every command or invisible character replaced by its JSON escape, except line ends and tabs."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    return character not in _LAYOUT and (unicodedata.category(character) in _HIDDEN or character in _INVISIBLE)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[index : index + 2].hex()}" for index in range(0, len(units), 2))


def _stand_ins(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(character) or _escaped(character) for character in lacking), error.end


codecs.register_error(_ERRORS, _stand_ins)


def accept_any_text() -> None:
    """Make standard output and standard error accept characters that their encoding lacks. Called once."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def show_traceback(error: Exception) -> None:
    """Print an unexpected error to standard error. Its message may hold unsafe text."""
    sys.stderr.write(printable("".join(traceback.format_exception(error))))


class Screen(Console):
    """A console on which all text is printable and none is markup."""

    def __init__(self, *, stderr: bool = False, file: TextIO | None = None) -> None:
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text printable before it is measured, so that tables get the right width."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Make all text printable; only rich's own commands reach the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def show_error(text: str) -> None:
    """One error to standard error."""
    Screen(stderr=True).print(Text.assemble(("✗ ", "red"), text), soft_wrap=True)


def write_line(text: str) -> None:
    """One line of plain text to standard output."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def write_json(data: bytes) -> None:
    """A JSON value in ASCII on one line, which any encoding can carry."""
    text = data.decode()
    sys.stdout.write("".join(each if each.isascii() and each.isprintable() else _escaped(each) for each in text) + "\n")
    sys.stdout.flush()
