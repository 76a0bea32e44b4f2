"""Writes `state.json`, `metrics.jsonl` and `events.jsonl` while a run is live."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darts_async.errors import NoSpaceError
from darts_async.faults import present
from darts_async.topology.run_files import EVENTS_FILE, METRICS_FILE
from darts_async.trace import Trace
from launcher.lifecycle.lifecycle import Kill, Lost, RunOutcome, Serves
from launcher.nodes.fleet import NodeCame, NodeLost, NodeSilent
from launcher.progress.evaluation import Evaluation
from launcher.progress.run_view import LENGTH_METRIC, REWARD_METRIC, STALENESS_METRIC
from launcher.progress.step_merger import StepLine
from launcher.run_dir.json_lines import JsonLines
from launcher.run_dir.place import check_place, inode_of
from launcher.run_dir.run_dir import RunRecord, RunStatus, write_record

_TRACED = {STALENESS_METRIC: "staleness", REWARD_METRIC: "reward", LENGTH_METRIC: "length"}


@dataclass(slots=True)
class Recorder:
    """Times are of the caller's monotonic clock; lines hold seconds since the start of the run.

    Nothing is written into a directory that has taken the place of the run's: `OSError` is raised.
    """

    run_dir: Path
    started_at_s: float
    trace: Trace = field(default_factory=Trace)
    _metrics_file: JsonLines = field(init=False)
    _events_file: JsonLines = field(init=False)
    _inode: int = field(init=False)

    def __post_init__(self) -> None:
        self._metrics_file = JsonLines(self.run_dir / METRICS_FILE)
        self._events_file = JsonLines(self.run_dir / EVENTS_FILE)
        self._inode = inode_of(self.run_dir)

    def settle(self) -> str:
        """Write what the disk did not take before. Returns why it still does not, or nothing."""
        check_place(self.run_dir, self._inode)
        return self._metrics_file.settle() or self._events_file.settle()

    def step(self, line: StepLine, now_s: float) -> None:
        """Metrics of an optimiser step."""
        # JSON has only finite numbers: the gradient norm of a skipped step is absent.
        finite = {name: value for name, value in line.metrics.items() if math.isfinite(value)}
        self._metrics(now_s, type="step", step=line.step, **finite)
        shown = {label: finite[name] for name, label in _TRACED.items() if name in finite}
        if shown:  # other lines of a step are about its weights
            self.trace.instant("step", step=line.step)
            self.trace.level(**shown)
        self.trace.flush()

    def evaluation(self, evaluation: Evaluation, now_s: float) -> None:
        """An evaluation: its summary, and the numbers of each sample."""
        summary = evaluation.summary()
        self._metrics(
            now_s,
            type="evaluation",
            policy_version=summary.policy_version,
            newest_version=summary.newest_version,
            num_skipped=summary.num_skipped,
            **summary.metrics(),
            prompt_ids=evaluation.prompt_ids.tolist(),
            rewards=evaluation.rewards.tolist(),
            num_tokens=evaluation.num_tokens.tolist(),
            pass_above=evaluation.pass_above,
            prompts_by_set=dict(evaluation.prompts_by_set),
        )

    def resumed(self, life: int, changes: Sequence[str], now_s: float) -> None:
        """The run is resumed, with `changes` of its settings."""
        self._event(now_s, type="resumed", life=life, changes=list(changes))
        self._metrics(now_s, type="resumed", life=life)  # what follows is of this life

    def started(self, name: str, incarnation: int, pid: int, now_s: float) -> None:
        """A process has started."""
        self._event(now_s, type="started", process=name, incarnation=incarnation, pid=pid)

    def lost(self, lost: Lost, now_s: float) -> None:
        """A process has ended while the run is running. `restart_in_s` is null if it does not restart."""
        ended, at_s = lost.ended, lost.restart_at_s
        restart_in_s = None if at_s is None else max(0.0, round(at_s - now_s, 3))
        self._event(
            now_s,
            type="ended",
            process=ended.name,
            incarnation=ended.incarnation,
            pid=ended.pid,
            code=ended.code,
            restart_in_s=restart_in_s,
        )

    def restarted(self, name: str, now_s: float) -> None:
        """A user restarts a process."""
        self._event(now_s, type="restarted", process=name)

    def killed(self, kill: Kill, now_s: float) -> None:
        """A process is killed because it hangs or is refused."""
        self._event(now_s, type=kill.kind, process=kill.name, incarnation=kill.incarnation, reason=kill.reason)

    def serves(self, serves: Serves, now_s: float) -> None:
        """A restarted process works again. `away_s` is the time since it ended."""
        away_s = round(serves.away_s, 3)
        self._event(now_s, type="serves", process=serves.name, incarnation=serves.incarnation, away_s=away_s)

    def node(self, step: NodeCame | NodeSilent | NodeLost, now_s: float) -> None:
        """A node is up, silent or lost."""
        match step:
            case NodeCame(node=node, agent_incarnation=incarnation, away_s=away_s):
                back_s = None if away_s is None else round(away_s, 3)
                self._event(now_s, type="node_up", node=node, agent_incarnation=incarnation, away_s=back_s)
            case NodeSilent(node=node, reason=reason):
                self._event(now_s, type="node_silent", node=node, reason=reason)
            case NodeLost(node=node, reason=reason):
                self._event(now_s, type="node_lost", node=node, reason=reason)

    def _metrics(self, now_s: float, **values: Any) -> None:
        check_place(self.run_dir, self._inode)
        self._metrics_file.write(values | self._elapsed(now_s) | {"unix_s": round(time.time(), 3)})

    def _event(self, now_s: float, **values: Any) -> None:
        present().reach("launcher.before_event")
        check_place(self.run_dir, self._inode)
        self._events_file.write(values | self._elapsed(now_s))
        self.trace.instant(values.pop("type"), **{name: value for name, value in values.items() if value is not None})
        self.trace.flush()

    def _elapsed(self, now_s: float) -> dict[str, float]:
        return {"elapsed_s": round(now_s - self.started_at_s, 3)}


@dataclass(slots=True)
class Ending:
    """How the run has ended."""

    outcome: RunOutcome
    unsaid: str = ""
    """Why `state.json` could not be written."""


@contextlib.contextmanager
def recorded(run_dir: Path, life: int) -> Iterator[Ending]:
    """`state.json` says `running` inside the block, and afterwards how the run ended, unless another life follows."""
    started_at_s, ending = time.time(), Ending(RunOutcome("failed", "darts-launch itself ended by an error"))
    inode = inode_of(run_dir)

    def write(status: RunStatus, reason: str, ended_at_s: float | None) -> None:
        who = os.getpid(), life, os.getcwd(), inode
        check_place(run_dir, inode)
        write_record(run_dir, RunRecord(status, reason, started_at_s, ended_at_s, *who))

    write("running", "", None)
    try:
        yield ending
    finally:
        if not ending.outcome.goes_on:
            try:
                write(ending.outcome.status, ending.outcome.reason, time.time())
            except NoSpaceError as error:
                ending.unsaid = str(error)
