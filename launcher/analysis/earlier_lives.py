"""What the launcher of a resumed run takes from the earlier lives. A *life* is one start of all processes.

    life 1 ---- stopped, failed or killed ---- life 2: `darts-launch resume RUN_DIR` ---- ...
       `------- all processes must be replaced (`TakeUpAgain`) ---- life 2, of the same launcher ---- ...

The shaper's journal and the learner's checkpoints hold the training state. This module reads what the launcher needs:
used incarnations, steps and evaluations so far, and the elapsed time.

Any of the files may have lost its end or hold damaged bytes. A torn line is cut off, and an unreadable line is skipped
with a notice. Lost lines are only missing on the screen. The number of the life must be new, so it is read from every
file that has one.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from darts_async.errors import ConfigError
from darts_async.machine.full_disk import is_no_space
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import LEARNER
from darts_async.topology.run_files import EVENTS_FILE, LOCK_FILE, METRICS_FILE, STATE_FILE, TRACE_DIR, file_stem
from launcher.control.find_run import known_record
from launcher.progress.evaluation import Evaluation
from launcher.progress.run_view import SHOWN_METRICS
from launcher.progress.step_merger import StepLine
from launcher.run_dir.json_lines import Lines, whole_lines
from launcher.run_dir.run_dir import RunRecord

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of the earlier lives."""

    life: int = 1
    """The number of the life that begins now."""
    first_incarnations: Mapping[str, int] = field(default_factory=dict)
    """The first incarnation of each process in this life. Default: 1."""
    elapsed_s: float = 0.0
    lines: tuple[StepLine, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    notices: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    """Settings that differ from those of the previous life."""

    @property
    def num_steps(self) -> int:
        """Steps that were completed, according to the metrics."""
        return 1 + max((line.step for line in self.lines), default=-1)


NO_PAST = Past()


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """This process is the only launcher of the run inside the block. Raises `ConfigError` if there is another."""
    try:
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if is_no_space(error):
            raise
        raise ConfigError(f"{error}: resume a run as a user who may write its files") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            record = known_record(run_dir)
            who = "a launcher" if record is None else f"launcher: pid {record.launcher_pid}"
            raise ConfigError(f"the run in {run_dir} is live ({who}): `darts-launch down {run_dir}` ends it") from None
        yield
    finally:
        os.close(descriptor)


def read_past(run_dir: Path, plan: RunPlan, *, steps: int | None = None) -> Past:
    """Read the files of a run that is `held`. Cuts off torn lines. `steps` is the number that it now has to reach.

    Raises:
        ConfigError: the run is finished and has no further steps, or a file is unreadable.
    """
    record = known_record(run_dir)
    try:
        past = _past(run_dir, record, plan)
    except OSError as error:
        raise ConfigError(
            f"{run_dir} cannot be resumed: {error}; check that you may read and write its files, and call "
            f"`darts-launch resume {run_dir}` again"
        ) from error
    if record is not None and record.status == "finished" and (steps is None or steps <= past.num_steps):
        if steps is not None and steps < past.num_steps:
            raise ConfigError(
                f"learner.steps is {steps}, and the run in {run_dir} has taken {past.num_steps}; give more"
            )
        more = f"`darts-launch resume {run_dir} learner.steps={2 * max(past.num_steps, 1)}`"
        raise ConfigError(
            f"the run in {run_dir} is finished ({record.reason}, {past.num_steps} steps): {more} trains further; "
            f"`darts-launch audit {run_dir}` and `darts-launch report {run_dir}` show its results"
        )
    return past


def _past(run_dir: Path, record: RunRecord | None, plan: RunPlan) -> Past:
    events, metrics = whole_lines(run_dir / EVENTS_FILE), whole_lines(run_dir / METRICS_FILE)
    starts, num_bad_starts = _made(lambda line: (str(line["process"]), int(line["incarnation"])), events, "started")
    lives, num_bad_lives = _made(lambda line: int(line["life"]), events, "resumed")
    steps, num_bad_steps = _made(_step, metrics, "step")
    evaluations, num_bad_evaluations = _made(Evaluation.of_line, metrics, "evaluation")
    notices = [] if record is not None else [f"{STATE_FILE} cannot be read: the run was probably killed"]
    for name, num_bad in (
        (EVENTS_FILE, events.num_bad + num_bad_starts + num_bad_lives),
        (METRICS_FILE, metrics.num_bad + num_bad_steps + num_bad_evaluations),
    ):
        if num_bad:
            notices.append(f"{num_bad} line{'s' if num_bad > 1 else ''} of {name} cannot be read and skipped")
    return Past(
        life=max([plan.life, record.life if record is not None else 1, *lives]) + 1,
        first_incarnations=_first_incarnations(run_dir, plan, starts),
        elapsed_s=max((line.get("elapsed_s", 0.0) for line in (*events.objects, *metrics.objects)), default=0.0),
        lines=tuple(steps),
        evaluations=tuple(evaluations),
        notices=tuple(notices),
    )


def _made(make: Callable[[dict[str, Any]], T], lines: Lines, kind: str) -> tuple[list[T], int]:
    """The contents of the lines of a kind, and how many of these lines are invalid."""
    made, num_bad = [], 0
    for line in lines.objects:
        if line["type"] == kind:
            try:
                made.append(make(line))
            except (KeyError, TypeError, ValueError):
                num_bad += 1
    return made, num_bad


def _first_incarnations(run_dir: Path, plan: RunPlan, starts: Iterable[tuple[str, int]]) -> dict[str, int]:
    newest: dict[str, int] = {}
    for name, incarnation in (*starts, *_traced(run_dir, plan)):
        newest[name] = max(incarnation, newest.get(name, 0))
    # One more incarnation may have been ordered without a record of it.
    first = {spec.name: newest.get(spec.name, 0) + 2 for spec in plan.processes}
    ranks = plan.names(LEARNER.name)  # these count together
    return first | dict.fromkeys(ranks, max(first[name] for name in ranks))


def _traced(run_dir: Path, plan: RunPlan) -> Iterator[tuple[str, int]]:
    """Incarnations that have left a trace. They may be more than in the events, if these have lost their end."""
    names = {file_stem(spec.name): spec.name for spec in plan.processes}
    for path in (run_dir / TRACE_DIR).glob("*.msgpack"):
        stem, _, incarnation = path.name.removesuffix(".msgpack").removesuffix(".old").rpartition(".")
        if stem in names and incarnation.isdigit():
            yield names[stem], int(incarnation)


def _step(line: dict[str, Any]) -> StepLine:
    """The few metrics of a step that the live view needs; a long run has many steps."""
    values = {name: line[name] for name in SHOWN_METRICS if name in line}
    if not all(isinstance(value, int | float) for value in (line["step"], *values.values())):
        raise TypeError(f"a metric is not a number: {line}")
    return StepLine(int(line["step"]), values)
