"""Problems with a user's input: all of them are collected and shown as one screen."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from darts_async.errors import ConfigError

_MAX_VALUE_CHARS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: its place, the value there, and how to fix it."""

    place: str
    """Dotted path of the setting; empty for the complete file."""
    message: str
    """What is wrong, or what was expected."""
    value: str | None = None
    """The value that was found, as text."""
    fix: str | None = None
    line: int | None = None
    """Line in the file, counted from 1."""
    here: bool = False
    """This machine is the problem and not the file, so verbs that only check or show the file do not fail."""
    is_hint: bool = False
    """Only a hint, with which a run can start."""
    source: str | None = None
    """Where the value was written, if not in the run's own file: another file, or the command line."""

    @property
    def origin(self) -> str:
        """`line 7`, `line 7 of more.yaml`, or `from the command line`."""
        if self.line is None:
            return "" if self.source is None else f"from {self.source}"
        return f"line {self.line}" if self.source is None else f"line {self.line} of {self.source}"


class InputError(ConfigError):
    """A file that cannot be run. Holds every problem that was found."""

    def __init__(self, file: Path, problems: tuple[Problem, ...]) -> None:
        assert problems
        self.file = file
        self.problems = problems
        super().__init__("\n".join(_plain(file, problem) for problem in problems))


def shown(value: object) -> str:
    """A value as a short text on one line."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."


def problem_screen(error: InputError) -> Group:
    """All problems of a file, each with place, value and fix."""
    count = len(error.problems)
    verdict = f"cannot be run: {count} problem{'s' if count > 1 else ''}"
    return _screen(("✗ ", "red"), error.file, verdict, error.problems)


def missing_screen(file: Path, problems: tuple[Problem, ...]) -> Group:
    """Why this machine cannot run a valid file."""
    return _screen(("! ", "yellow"), file, "is valid, but cannot be run on this machine:", problems)


def hint_screen(file: Path, problems: tuple[Problem, ...]) -> Group:
    """Hints about a file that can be run."""
    return _screen(("! ", "yellow"), file, "can be run, but:", problems)


def _screen(mark: tuple[str, str], file: Path, verdict: str, problems: tuple[Problem, ...]) -> Group:
    title = Text.assemble(mark, (str(file), "bold"), f" {verdict}")
    return Group(title, *(Padding(_problem_text(problem), (1, 0, 0, 2)) for problem in problems), "")


def _problem_text(problem: Problem) -> Text:
    head = Text(problem.place or "the file", style="bold")
    if problem.value is not None:
        head.append(": ", style="not bold").append(problem.value, style="not bold yellow")
    if problem.origin:
        head.append(f"  {problem.origin}", style="not bold dim")
    head.append(f"\n  {problem.message}", style="not bold")
    if problem.fix is not None:
        head.append("\n  → ", style="not bold green").append(problem.fix, style="not bold")
    return head


def _plain(file: Path, problem: Problem) -> str:
    where = problem.source or str(file)
    place = f"{where}:{problem.line}" if problem.line is not None else where
    parts = [place, problem.place, problem.value, problem.message, problem.fix]
    return ": ".join(part for part in parts if part)
