"""Reads the data of a run for `darts-launch report`: metrics, samples and the time of its processes."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from darts_async.errors import ConfigError
from darts_async.shaper.ledger import SampleEnded, read_ledger
from darts_async.topology.roles import LAUNCHER
from darts_async.topology.run_files import LEDGER_FILE, METRICS_FILE, SUMMARY_FILE
from launcher.analysis.time_use import TimeSpent
from launcher.analysis.traces import Traces
from launcher.analysis.tracing import time_of_all
from launcher.control.find_run import record_of
from launcher.display.summary import Summary
from launcher.run_dir.json_lines import read_lines
from launcher.run_dir.run_dir import RunRecord


@dataclass(frozen=True, slots=True)
class RunData:
    """One run, live or over."""

    run_dir: Path
    record: RunRecord
    summary: Summary | None
    """None unless the launcher saw the end of the run."""
    steps: list[dict[str, Any]]
    """The metrics of each step, in order; the last ones of a repeated step."""
    evaluations: list[dict[str, Any]]
    trained: list[SampleEnded]
    ended: list[SampleEnded]
    spent: list[TimeSpent]
    """Empty if the run has no trace."""
    away: list[tuple[str, float, float]]
    """(process, from, until): when a process was absent, in seconds since the start."""

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps that have a metric, and its values."""
        points = [(line["step"], line[name]) for line in self.steps if name in line]
        return [step for step, _ in points], [value for _, value in points]


def gather(run_dir: Path) -> RunData:
    """Read all data of a run. Raises `ConfigError` if this is not a run directory, or the run has no step yet."""
    record = record_of(run_dir)
    lines = read_lines(run_dir / METRICS_FILE).objects
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["type"] == "step":
            steps[line["step"]] = steps.get(line["step"], {}) | line
    if not steps:
        raise ConfigError(f"{run_dir / METRICS_FILE} has no step yet, so there is nothing to report")
    try:
        ended = [each for each in read_ledger(run_dir / LEDGER_FILE) if isinstance(each, SampleEnded)]
    except OSError as error:
        raise ConfigError(f"{run_dir / LEDGER_FILE} cannot be read: {error}") from error
    if not ended:
        raise ConfigError(f"{run_dir / LEDGER_FILE} holds no sample: `darts-launch audit {run_dir}` says what is lost")
    spent, away = _time(run_dir)
    return RunData(
        run_dir=run_dir,
        record=record,
        summary=_summary(run_dir),
        steps=[steps[step] for step in sorted(steps)],
        evaluations=[line for line in lines if line["type"] == "evaluation"],
        trained=[each for each in ended if each.outcome == "trained" and each.step is not None],
        ended=ended,
        spent=spent,
        away=away,
    )


def _summary(run_dir: Path) -> Summary | None:
    try:
        return msgspec.json.decode((run_dir / SUMMARY_FILE).read_bytes(), type=Summary)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{run_dir / SUMMARY_FILE} is not a summary of this version: {error}") from error


def _time(run_dir: Path) -> tuple[list[TimeSpent], list[tuple[str, float, float]]]:
    try:
        traces = Traces(run_dir)
    except ConfigError:
        return [], []
    away = [
        (process, before.ended_s, after.began_s)
        for process, lives in traces.by_process()
        if process != LAUNCHER
        for before, after in itertools.pairwise(lives)
    ]
    return time_of_all(traces), away
