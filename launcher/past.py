"""What the earlier lives of a run have left behind: a *life* is one start of its launcher.

    life 1 ---- stopped, failed or killed ---- life 2: `darts-launch resume RUN_DIR` ---- ...

What was learnt is in the journal of the shaper and the checkpoints of the learner. Here is what the launcher goes on
from: whose incarnations are used up, the steps and evaluations so far, and how long the run has gone on.

Files of lines may end in a torn one, where a launcher was killed in the middle of it: it is cut off, as if it had never
been begun.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darts_async.errors import ConfigError
from darts_async.topology import RunPlan
from launcher.evaluation import Evaluation
from launcher.live import record_of
from launcher.progress import SHOWN_METRICS
from launcher.rundir import EVENTS_FILE, LOCK_FILE, METRICS_FILE, RunRecord
from launcher.steps import StepLine


@dataclass(frozen=True, slots=True)
class Past:
    """See the module."""

    life: int = 1
    """Which life begins now."""
    first_incarnations: Mapping[str, int] = field(default_factory=dict)
    """With which each process begins; 1 for those that are not there."""
    elapsed_s: float = 0.0
    lines: tuple[StepLine, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()


NO_PAST = Past()


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """This process is the one launcher of the run inside the block. Raises `ConfigError` if there is another."""
    descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = record_of(run_dir).launcher_pid
            raise ConfigError(
                f"the run in {run_dir} is live (launcher: pid {pid}): `darts-launch down {run_dir}` ends it"
            ) from None
        yield
    finally:
        os.close(descriptor)


def read_past(run_dir: Path, plan: RunPlan) -> Past:
    """What the run that is not live has left. To be called while it is `held`. Torn lines are cut off.

    Raises:
        ConfigError: it is finished, or its files are not those of a run.
    """
    record = record_of(run_dir)
    if record.status == "finished":
        raise ConfigError(f"the run in {run_dir} is finished ({record.reason}): there is nothing left to do")
    try:
        events, metrics = whole_lines(run_dir / EVENTS_FILE), whole_lines(run_dir / METRICS_FILE)
        return _past(record, plan, events, metrics)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{run_dir} cannot be resumed: {error!r} in {EVENTS_FILE} or {METRICS_FILE}") from error


def _past(record: RunRecord, plan: RunPlan, events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> Past:
    newest: dict[str, int] = {}
    for event in events:
        if event["type"] == "started":
            newest[event["process"]] = max(event["incarnation"], newest.get(event["process"], 0))
    # The one behind the newest may have been ordered, and not have been noted any more.
    first = {name: newest.get(name, 0) + 2 for spec in plan.processes for name in (spec.name,)}
    ranks = plan.names("learner")  # these count together
    first |= dict.fromkeys(ranks, max(first[name] for name in ranks))
    return Past(
        life=record.life + 1,
        first_incarnations=first,
        elapsed_s=max((line["elapsed_s"] for line in (*events, *metrics)), default=0.0),
        lines=tuple(_step(line) for line in metrics if line["type"] == "step"),
        evaluations=tuple(Evaluation.of_line(line) for line in metrics if line["type"] == "evaluation"),
    )


def _step(line: dict[str, Any]) -> StepLine:
    """What a view of the run goes on from; a long run has many."""
    return StepLine(line["step"], {name: line[name] for name in SHOWN_METRICS if name in line})


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, none if there is no file; a torn last line is cut off.

    Raises:
        OSError: it cannot be read or written.
        ValueError: a whole line is no JSON.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return [json.loads(line) for line in data[:end].splitlines()]
