"""What goes to a terminal: nothing else in the package writes to one.

Much of what is shown was written by others: by a model, a data set, an exception of a library. A terminal takes some
characters for commands (move the cursor, set the title, clear the screen), and some change what a reader sees without
being seen (the direction of text, zero width). So every such character is shown as its escape, `\\u001b`, and square
brackets are never markup.

What the encoding of the terminal lacks becomes a sign that it has, or an escape: a screen never fails by a check mark.
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
"""Letters and marks that show nothing."""
_LAYOUT = frozenset("\n\t")
_ERRORS = "darts-launch"
_ASCII = {
    **{"✓": "+", "✗": "x", "■": "#", "•": "*", "·": ".", "…": "...", "│": "|", "→": "->", "±": "+-"},
    **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
    **dict(zip("▏▎▍▌▋▊▉", "...----", strict=True)),
}
"""Our own signs, for a terminal that knows no other characters."""


def printable(text: str) -> str:
    """The text with every character that a terminal may obey or hide replaced by its escape, as JSON writes it; ends of
    lines and tabs stay."""
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
    """Have standard output and standard error take what their encoding lacks. Called once, at the start."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def show_traceback(error: Exception) -> None:
    """To standard error: an error that is ours, whose message may hold the text of others."""
    sys.stderr.write(printable("".join(traceback.format_exception(error))))


class Screen(Console):
    """A console on which all text is printable, and none is markup."""

    def __init__(self, *, stderr: bool = False, file: TextIO | None = None) -> None:
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """A text before it is measured, so that tables are as wide as what they show."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is drawn; commands to the terminal are rich's own alone."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def write_line(text: str) -> None:
    """One line of plain text to standard output."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def write_json(data: bytes) -> None:
    """A JSON value, in ASCII, on a line: any reader gets the same text from it."""
    text = data.decode()
    sys.stdout.write("".join(each if each.isascii() and each.isprintable() else _escaped(each) for each in text) + "\n")
    sys.stdout.flush()
