"""The state of a run for the verb `status`, as data and as a screen; and the screen of a run that failed."""

from collections.abc import Collection
from functools import partial
from itertools import compress
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from darts_async.topology.roles import role_of
from darts_async.topology.run_files import LOGS_DIR, file_stem
from launcher.control.requests import NodeState, ProcessState, RunState
from launcher.display.view import FewerColumns, LearningTable, clock, learning_of, plain_table, state_text
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.nodes.fleet import Fleet
from launcher.progress.run_view import RunView
from launcher.run_dir.logs import last_lines
from launcher.terminal import printable

_NUM_LINES = 15
_COLUMNS = "process", "state", "pid", "version", "tokens/s", "in flight", "up", "restarts"  # 80 columns hold them
_LEAST_WANTED = "up", "version", "restarts", "in flight", "tokens/s", "pid"


def run_status(view: RunView, fleet: Fleet, now_s: float, *, ending: RunOutcome | None) -> RunState:
    """The state that `status` shows. `now_s` is read from the view's clock."""
    pids = fleet.pids
    processes = [
        ProcessState(
            name=row.name,
            state=state_text(row, now_s),
            pid=pids.get(row.name),
            policy_version=row.policy_version,
            num_in_flight=row.num_in_flight,
            tokens_per_s=round(row.tokens_per_s, 1),
            uptime_s=round(row.uptime_s, 3),
            restarts=row.restarts,
        )
        for row in view.rows.values()
    ]
    return RunState(
        name=view.name,
        run_dir=view.run_dir,
        ending=ending.reason if ending is not None else None,
        num_steps=view.num_steps,
        total_steps=view.total_steps,
        elapsed_s=round(now_s - view.started_at_s, 3),
        remaining_s=view.remaining_s(now_s),
        learning=learning_of(view),
        processes=processes,
        nodes=[
            NodeState(node.name, node.state, node.agent_incarnation, node.keeper_pid) for node in fleet.nodes.values()
        ],
        notices=list(view.notices),
    )


def status_screen(state: RunState) -> RenderableType:
    left = f", about {clock(state.remaining_s)} left" if state.remaining_s is not None else ""
    ending = f", ending: {state.ending}" if state.ending else ""
    steps = f"{state.num_steps} of {state.total_steps} steps in {clock(state.elapsed_s)}{left}{ending}"
    title = Text.assemble((state.name, "bold"), f"   {steps}")
    nodes = [Text.assemble((f"{node.name} ", "bold"), node.state) for node in state.nodes if node.state != "up"]
    notices = [Text.assemble(("• ", "yellow"), notice) for notice in state.notices]
    learning: list[RenderableType] = [LearningTable(state.learning), ""] if state.learning else []
    processes = FewerColumns(partial(_table, state), _LEAST_WANTED)
    place = Text(state.run_dir, style="dim", overflow="fold")
    return Padding(Group(title, place, "", *learning, processes, *nodes, *notices), (1, 1))


def _table(state: RunState, hidden: Collection[str]) -> Table:
    shown = [column not in hidden for column in _COLUMNS]
    table = plain_table(*compress(_COLUMNS, shown), numbers=_COLUMNS[2:])
    state_column = table.columns[1]
    state_column.min_width, state_column.max_width, state_column.no_wrap = 7, 40, False
    for process in state.processes:
        has_tokens = role_of(process.name).decodes and process.pid is not None
        cells: tuple[RenderableType, ...] = (
            process.name,
            process.state,
            str(process.pid or ""),
            str(process.policy_version) if process.policy_version >= 0 else "",
            f"{process.tokens_per_s:,.0f}" if has_tokens else "",
            f"{process.num_in_flight:,}",
            clock(process.uptime_s),
            Text(str(process.restarts), style="yellow" if process.restarts else "dim"),
        )
        table.add_row(*compress(cells, shown))
    return table


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
