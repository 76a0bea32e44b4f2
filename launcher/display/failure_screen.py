"""The screen of a run that failed: the reason, and the last log lines of the process to blame."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from darts_async.topology.run_files import LOGS_DIR, file_stem
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.run_dir.logs import last_lines
from launcher.terminal import printable

_NUM_LINES = 15


def failure_screen(outcome: RunOutcome, run_dir: Path) -> RenderableType:
    """The reason of the failure, and the end of the culprit's log."""
    title = Text.assemble(("✗ ", "red"), ("the run failed: ", "bold"), printable(outcome.reason))
    parts: list[RenderableType] = [title]
    if outcome.culprit is not None:
        logs_dir = run_dir / LOGS_DIR
        lines = last_lines(logs_dir, outcome.culprit, _NUM_LINES)
        parts.append(Text(f"the last lines of {logs_dir / file_stem(outcome.culprit)}.*", style="dim"))
        parts.extend(Text.assemble(("│ ", "red"), line) for line in lines or ["(it printed and logged nothing)"])
    return Padding(Group(*parts), (0, 2, 1, 2))
