"""`darts-launch trace`: the file for Perfetto, and a table of how each process spent its time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from darts_async.errors import ConfigError
from darts_async.topology.roles import LAUNCHER, SHAPER
from launcher.analysis.perfetto import Event, events_of, write_events
from launcher.analysis.time_use import TimeSpent, time_spent
from launcher.analysis.traces import Traces
from launcher.display.view import plain_table

_STAGES = {"swap": "paused for weights", "update": "(update under way)"}
"""Stages that have another name in the table."""
_MIN_SHARE = 0.0005


@dataclass(slots=True)
class Report:
    """The file that was written, and the time of each process."""

    out: Path
    since_s: float
    until_s: float
    num_events: int = 0
    spent: list[TimeSpent] = field(default_factory=list)


def export(run_dir: Path, out: Path, since_s: float | None, until_s: float | None) -> Report:
    """Write the trace of a run, live or over, between two times in seconds since its start.

    The table uses the same window. Its default is from the first version of the weights to the last record of the
    shaper, without start-up and shutdown. Raises `ConfigError` if there is no trace, the window is empty, or the file
    cannot be written."""
    traces = Traces(run_dir)
    begin_s, end_s = 0.0 if since_s is None else since_s, math.inf if until_s is None else until_s
    window_s = _window(traces, since_s, until_s)
    if not window_s[0] < window_s[1]:
        raise ConfigError(
            f"{run_dir}: nothing happened between {window_s[0]:g} s and {window_s[1]:g} s; --since and --until are "
            "seconds since the start of the run, and --since must be smaller"
        )
    report = Report(out, *window_s)

    def events() -> Iterator[Event]:
        for number, (process, lives) in enumerate(traces.by_process(), 1):
            if process != LAUNCHER:
                report.spent.append(time_spent(process, lives, *window_s))
            yield from events_of(number, process, lives, begin_s, end_s)

    try:
        with out.open("w", encoding="utf-8") as file:
            report.num_events = write_events(file, events())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; --out names another file") from error
    return report


def time_of_all(traces: Traces) -> list[TimeSpent]:
    """How each process except the launcher spent its time between start-up and shutdown; empty before that."""
    window_s = _window(traces, None, None)
    if not window_s[0] < window_s[1]:
        return []
    return [time_spent(process, lives, *window_s) for process, lives in traces.by_process() if process != LAUNCHER]


def _window(traces: Traces, since_s: float | None, until_s: float | None) -> tuple[float, float]:
    last_s, published_s = 0.0, 0.0
    for process, lives in traces.by_process():
        if process == SHAPER.first:
            last_s = max(life.ended_s for life in lives)
            seen = (each.at_s for life in lives for each in life.instants if each.name == "version published")
            published_s = min(seen, default=0.0)
    begin_s = published_s if since_s is None else since_s
    return begin_s, last_s if until_s is None else min(until_s, last_s)


def report_screen(report: Report) -> RenderableType:
    table = plain_table("process", *(numbers := ("busy", "idle", "away")), numbers=numbers)
    table.add_column("of that time")
    for spent in report.spent:
        shares = (f"{spent.share(seconds):.1%}" for seconds in (spent.busy_s, spent.idle_s, spent.away_s))
        table.add_row(spent.process, *shares, _stages(spent))
    title = f"from {report.since_s:.1f} s to {report.until_s:.1f} s of the run"
    written = Text.assemble(("✓ ", "green"), f"{report.num_events:,} events in {report.out}")
    return Padding(Group(Text(title, style="bold"), table, "", written, "  open it in https://ui.perfetto.dev"), (1, 1))


def _stages(spent: TimeSpent) -> str:
    stages = {_STAGES.get(name, name): seconds for name, seconds in (spent.by_stage_s | spent.waits_s).items()}
    shares = {name: spent.share(seconds) for name, seconds in stages.items()}
    return " · ".join(f"{name} {share:.1%}" for name, share in shares.items() if share >= _MIN_SHARE)
