"""What a benchmark leaves in --out: NAME.md to read, and NAME.json to compute with.

What stands in NAME.md behind the line `BY_HAND` was written by a person, who has looked at the numbers; it is kept when
the file is written anew.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import msgspec

from darts_async.errors import ConfigError

BY_HAND: Final = "<!-- What follows was written by hand, about the numbers at that time. -->"

T = TypeVar("T", bound=msgspec.Struct)


def called(name: str) -> str:
    """The command line of `bench.NAME`, of paths outside the checkout their last part alone."""
    words = [Path(word).name if word.startswith(("/", "..")) else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", f"bench.{name}", *words])


def commit() -> str:
    """The checked-out commit, marked if the tree differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() or "unknown"


def hardware() -> str:
    """In words."""
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"


def conditions(name: str, commits: str | None = None) -> str:
    """What a table means nothing without; `commits`, if the numbers are not all of the present one."""
    return f"`{called(name)}`, commit {commits or commit()}, {hardware()}."


def spread(values: Sequence[float], style: str) -> str:
    """The median, and half the range if that shows."""
    middle = format(round(median(values), 9) + 0.0, style)
    half = format((max(values) - min(values)) / 2, style.replace("+", ""))
    return f"{middle} ± {half}" if any(digit in half for digit in "123456789") else middle


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def keep(directory: Path | None, name: str, text: str, numbers: Mapping[str, Any], *, schema: int = 1) -> None:
    """Write both files, if they are wanted."""
    if directory is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    keep_text(directory / f"{name}.md", text)
    head = {"schema": schema, "command": called(name), "commit": commit(), "hardware": hardware()}
    (directory / f"{name}.json").write_text(json.dumps(head | dict(numbers), indent=1))


def keep_text(path: Path, text: str) -> None:
    """Write it anew, but for what was written by hand."""
    _, mark, by_hand = path.read_text().partition(BY_HAND) if path.exists() else ("", "", "")
    path.write_text(text.rstrip("\n") + "\n" + (f"\n{mark}{by_hand}" if mark else ""))


def kept(path: Path, kind: type[T], schema: int) -> T:
    """The numbers that `keep` has written there. Raises `ConfigError` for anything else."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or "schema" not in found:
            raise ValueError("it names no schema")
        if found["schema"] != schema:
            raise ValueError(f"it is of schema {found['schema']}")
        return msgspec.convert(found, kind, str_keys=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} has no results of schema {schema} of this benchmark: {error}; move it away and measure anew"
        ) from error


def taken_over(arguments: argparse.Namespace, name: str, kind: type[T], schema: int) -> T | None:
    """What is in --out under this name, if --resume asks for it and there is anything.

    Raises:
        ConfigError: there is no --out, or the file is not of this kind and `schema`.
    """
    if not arguments.resume:
        return None
    if arguments.out is None:
        raise ConfigError("--resume takes over what is in --out; give --out too")
    path = arguments.out / f"{name}.json"
    return kept(path, kind, schema) if path.exists() else None
