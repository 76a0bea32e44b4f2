"""Paths as users write them: `~`, `$VARIABLE` and `${VARIABLE}` are filled in, and `$$` is a dollar sign.

Each process fills in a path where it uses it, so `~` means the home directory of the machine that it runs on.
"""

import difflib
import os
import re
from pathlib import Path

from darts_async.errors import ConfigError

_DOLLAR = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>\w+)\}|(?P<bare>\w+)|(?:\{[^}]*\}?)?)")


def expanded(text: str, setting: str) -> Path:
    """A path with `~` and environment variables filled in.

    Args:
        setting: name of the setting, for the message.

    Raises:
        ConfigError: a variable is not set, a dollar sign does not begin a variable, or there is no such user.

    Example:
        >>> expanded("${TMPDIR}/data.jsonl", "prompts.path")  # doctest: +SKIP
        PosixPath('/tmp/data.jsonl')
        >>> expanded("/data/$$5.jsonl", "prompts.path")
        PosixPath('/data/$5.jsonl')
    """

    def filled_in(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name = found["braced"] or found["bare"]
        if name is None:
            raise ConfigError(
                f"{setting} is {text!r}, but {found[0]!r} names no variable: only $NAME and ${{NAME}} are filled in; "
                "write $$ for a dollar sign"
            )
        if name not in os.environ:
            raise ConfigError(
                f"{setting} is {text!r}, but the environment variable {name} is not set; set it, or write $$ for a "
                "dollar sign"
            )
        return os.environ[name]

    try:
        return Path(_DOLLAR.sub(filled_in, text)).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting} is {text!r}: {error}") from error


def is_file(path: Path) -> bool:
    """Whether this file exists. Never raises, even for an invalid path."""
    return os.path.isfile(path)


def missing_file(path: Path) -> str:
    """The message that this file does not exist, with a suggestion. The first wrong part of the path is compared with
    the names in its directory."""
    wanted = path.absolute()
    if os.path.isdir(wanted):
        return f"{wanted} is a directory, and a file is needed"
    first = next((each for each in reversed((wanted, *wanted.parents)) if not os.path.exists(each)), wanted)
    near = difflib.get_close_matches(first.name, _names_in(first.parent), n=1)
    guess = first.parent / near[0] / wanted.relative_to(first) if near else None
    found = guess is not None and os.path.exists(guess)
    return f"there is no file {wanted}" + (f"; did you mean {guess}?" if found else "")


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
