"""Files of lines, one JSON object each: `metrics.jsonl` and `events.jsonl`.

They are written line by line, so the last one may be torn by a kill. A disk may change any byte of the others: a line
that is not an object is passed over and counted, because the lines about everything else are as good as before.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Lines:
    """What a file holds."""

    objects: list[dict[str, Any]]
    num_bad: int
    """Whole lines that are not a JSON object with a `type`, or whose `elapsed_s` is not a number."""
    num_bytes: int
    """Of the whole lines: what follows is torn."""


def read_lines(path: Path) -> Lines:
    """All whole lines of a file; none if it is not there. Raises `OSError`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Lines([], 0, 0)
    end = data.rfind(b"\n") + 1
    parsed = [_parsed(line) for line in data[:end].splitlines()]
    good = [line for line in parsed if line is not None]
    return Lines(good, len(parsed) - len(good), end)


def whole_lines(path: Path) -> Lines:
    """The same; a torn last line is cut off, as if it had never been begun. Raises `OSError`."""
    lines = read_lines(path)
    if path.exists() and path.stat().st_size > lines.num_bytes:
        os.truncate(path, lines.num_bytes)
    return lines


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # bytes that are no text among them
        return None
    is_good = isinstance(value, dict) and isinstance(value.get("type"), str)
    return value if is_good and isinstance(value.get("elapsed_s", 0.0), int | float) else None
