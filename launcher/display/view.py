"""Shows a run: a live view on a terminal, plain lines elsewhere. Rendering is a function of `RunView` and the time."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from darts_async.topology.roles import role_of
from launcher.display.rollouts import Facts, FirstLines
from launcher.progress.run_view import LENGTH_METRIC, REWARD_METRIC, STALENESS_METRIC, ProcessRow, RunView
from launcher.progress.step_merger import StepLine
from launcher.terminal import printable

_SPARKS = "▁▂▃▄▅▆▇█"
_TREND_WIDTH = 40
_BAR_WIDTH = 8
_ROLLOUT_LINES = 2
_COLUMNS = "process", "state", "version", "tokens/s", "in flight", "busy", "restarts"  # 80 columns hold them
_LEAST_WANTED = "restarts", "version", "in flight", "busy", "tokens/s"
"""Columns that a narrow terminal leaves out, in this order."""


class Display:
    """Shows a run to the user. By itself it shows nothing."""

    def refresh(self, view: RunView, now_s: float) -> None:
        """Show the present state."""

    def step(self, view: RunView, line: StepLine, now_s: float) -> None:
        """Show a completed step."""

    def note(self, text: str) -> None:
        """Show a notice."""

    def close(self) -> None:
        """Leave the screen as it is. Idempotent."""


class LiveDisplay(Display):
    """Redraws in place, whenever the caller refreshes it."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def refresh(self, view: RunView, now_s: float) -> None:
        self._live.update(run_screen(view, now_s), refresh=True)

    def close(self) -> None:
        self._live.stop()


class PlainDisplay(Display):
    """One line per step, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, view: RunView, line: StepLine, now_s: float) -> None:
        self.note(step_text(view, line, now_s))

    def note(self, text: str) -> None:
        self._console.file.write(printable(text) + "\n")
        self._console.file.flush()


def make_display(console: Console) -> Display:
    """The live view if the terminal can show it, otherwise plain lines."""
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay(console)


def step_text(view: RunView, line: StepLine, now_s: float) -> str:
    parts = [f"step {line.step + 1:>{len(str(view.total_steps))}}/{view.total_steps}"]
    for label, metric, form in (
        ("reward", REWARD_METRIC, "{:.3f}"),
        ("length", LENGTH_METRIC, "{:.1f}"),
        ("staleness", STALENESS_METRIC, "{:.2f}"),
    ):
        if metric in line.metrics:
            parts.append(f"{label} {form.format(line.metrics[metric])}")
    parts.append(f"elapsed {clock(now_s - view.started_at_s)}")
    return "  ".join(parts)


def run_screen(view: RunView, now_s: float) -> RenderableType:
    parts: list[RenderableType] = [
        Text.assemble((view.name, "bold"), "   ", (view.run_dir, "dim"), no_wrap=True, overflow="ellipsis"),
        _progress(view, now_s),
        "",
        *_trends(view),
        _Processes(view, now_s),
    ]
    if view.notices:
        parts.append("")
        parts.extend(Text.assemble(("• ", "yellow"), notice) for notice in view.notices)
    parts.extend(_rollouts(view))  # last: a low terminal cuts them off first
    return Padding(Group(*parts), (1, 2, 0, 2))


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as bars of eight heights. More values than `width` are averaged in equal runs."""
    points = [sum(values[start:end]) / (end - start) for start, end in _runs(len(values), width)]
    finite = [point for point in points if math.isfinite(point)]
    if not finite:
        return ""
    return "".join(_spark(point, min(finite), max(finite)) for point in points)


def _spark(value: float, low: float, high: float) -> str:
    top = len(_SPARKS) - 1
    if not math.isfinite(value):
        return " "
    half_span = high / 2 - low / 2  # halves: the difference itself may overflow
    return _SPARKS[round((value / 2 - low / 2) / half_span * top) if half_span > 0 else top // 2]


def plain_table(*columns: str, gap: int = 2, numbers: Collection[str] = ()) -> Table:
    """A table without lines. Its columns are so many cells apart, and those of `numbers` are aligned to the right."""
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def clock(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar(share: float, width: int) -> Text:
    """A share as a bar, in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, part = divmod(eighths, 8)
    filled = "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
    return Text(filled.ljust(width), style="cyan")


def _progress(view: RunView, now_s: float) -> RenderableType:
    grid = Table.grid(padding=(0, 3, 0, 0), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    left_s = view.remaining_s(now_s)
    left = f"about {clock(left_s)} left" if left_s is not None else ""
    if not view.total_steps:
        grid.add_row(Text("evaluating, without steps", style="bold"), clock(now_s - view.started_at_s))
        return grid
    grid.add_row(
        ProgressBar(total=view.total_steps, completed=view.num_steps, complete_style="cyan", finished_style="green"),
        Text.assemble(
            (f"{view.num_steps}/{view.total_steps}", "bold"),
            f" steps   {clock(now_s - view.started_at_s)}",
            (f"   {left}" if left else "", "dim"),
        ),
    )
    return grid


def _trends(view: RunView) -> Iterator[RenderableType]:
    evaluations = list(view.evaluations.values())
    held_out = [evaluation.reward for evaluation in evaluations]
    at_version = f", at version {evaluations[-1].policy_version}" if evaluations else ""
    reward, length = view.trends[REWARD_METRIC], view.trends[LENGTH_METRIC]
    ends = (held_out[0], held_out[-1]) if held_out else (None, None)
    rows = [
        ("reward", reward.values(), reward.first, reward.last, "{:.3f}", ""),
        ("length", length.values(), length.first, length.last, "{:.0f}", ""),
        ("held-out", held_out, *ends, "{:.3f}", at_version),
    ]
    if not any(values for _, values, *_ in rows):
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim")
    grid.add_column(justify="right", min_width=6)
    grid.add_column(no_wrap=True)
    grid.add_column(style="dim", no_wrap=True)
    for label, values, first, last, form, place in rows:
        if values:
            trend = Text(sparkline(values, _TREND_WIDTH), style="cyan")
            grid.add_row(label, form.format(last), trend, f"from {form.format(first)}{place}")
    yield grid
    yield ""


@dataclass(frozen=True, slots=True)
class _Processes:
    """The table of the processes. A narrow terminal shows fewer columns, and cuts no name."""

    view: RunView
    now_s: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=1000)
        for num_hidden in range(len(_LEAST_WANTED) + 1):
            table = _process_table(self.view, self.now_s, _LEAST_WANTED[:num_hidden])
            if Measurement.get(console, unbounded, table).maximum <= options.max_width:
                break
        yield table


def _process_table(view: RunView, now_s: float, hidden: Collection[str]) -> Table:
    shown = [column not in hidden for column in _COLUMNS]
    numbers = "version", "tokens/s", "in flight", "restarts"
    table = plain_table(*compress(_COLUMNS, shown), numbers=numbers)
    table.columns[1].min_width, table.columns[1].max_width = 8, 32
    for row in view.rows.values():
        table.add_row(*compress(_cells(row, now_s), shown), style="dim" if row.ended or row.state == "starting" else "")
    if len(generators := view.generators) > 1:
        at_work = f"{len(generators) - view.num_away} of {len(generators)}"
        in_flight = sum(row.num_in_flight for row in generators)
        cells = "generators", at_work, "", f"{view.tokens_per_s:,.0f}", f"{in_flight:,}", "", ""
        table.add_row(*compress(cells, shown), style="bold")
    return table


def _rollouts(view: RunView) -> Iterator[RenderableType]:
    for rollout in view.rollouts:
        yield ""
        yield Facts(rollout)
        yield FirstLines(rollout.prompt, 1, style="dim")
        yield FirstLines(rollout.text, _ROLLOUT_LINES)


def state_text(row: ProcessRow, now_s: float) -> str:
    """The state of a process, when it restarts, and for how long it has been away."""
    if row.restart_at_s is not None:
        return f"restarting in {max(0.0, row.restart_at_s - now_s):.1f} s"
    if row.away_since_s is not None:
        return f"{row.state}, away {max(0.0, now_s - row.away_since_s):.0f} s"
    return row.state


def _cells(row: ProcessRow, now_s: float) -> tuple[RenderableType, ...]:
    has_tokens = role_of(row.name).decodes and not row.ended
    busy = Text.assemble(bar(row.busy_share, _BAR_WIDTH), f" {row.busy_share:4.0%}") if row.uptime_s else Text("")
    return (
        row.name,
        state_text(row, now_s),
        str(row.policy_version) if row.policy_version >= 0 else "",
        f"{row.tokens_per_s:,.0f}" if has_tokens else "",
        f"{row.num_in_flight:,}" if row.uptime_s else "",
        Text("") if row.ended else busy,
        Text(str(row.restarts), style="yellow" if row.restarts else "dim"),
    )


def _runs(count: int, width: int) -> Iterator[tuple[int, int]]:
    num_runs = min(count, width)
    for index in range(num_runs):
        yield index * count // num_runs, (index + 1) * count // num_runs
