"""The data of the live view: updated by messages, rendered by `view`, read by `summary`.

Its size does not grow with the number of steps. It keeps a `Trend` of each metric that is shown, the summary of each
evaluation, and the samples of only the first and the last evaluation. `metrics.jsonl` has all measurements.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from darts_async.protocol import EvaluationCompleted, ProcessStatus, RunFinished
from darts_async.rollouts import Rollout
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import role_of
from launcher.progress.evaluation import Evaluation, EvaluationSummary
from launcher.progress.step_merger import StepLine
from launcher.terminal import printable

REWARD_METRIC = "reward/pool_mean"
LENGTH_METRIC = "length/pool_mean"
STALENESS_METRIC = "staleness/mean"
"""The metrics of `StepCompleted.metrics` that are shown. Reward and length are of all samples, before selection."""

IDLE_STAGE = "idle"
"""Key of `busy_s` for the time without any stage. Without it, idle time is the uptime minus the stages."""

SHOWN_METRICS = (REWARD_METRIC, LENGTH_METRIC)
_MAX_NOTICES = 4
MAX_POINTS = 80
MAX_LATEST = 1000
"""Most metrics whose newest value is kept."""
_RATE_WINDOW_S = 5.0


@dataclass(slots=True)
class Trend:
    """The history of a metric in a bounded number of points. Each point is a mean over the same number of steps, which
    doubles when there are too many points. A repeated step counts again."""

    first: float | None = None
    last: float | None = None
    _steps_per_point: int = 1
    _points: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Sum and number of values, by point."""

    def add(self, step: int, value: float) -> None:
        """The metric of a step."""
        self.first = value if self.first is None else self.first
        self.last = value
        self._put(step // self._steps_per_point, value, 1)
        if len(self._points) > MAX_POINTS:
            points, self._points = self._points, {}
            self._steps_per_point *= 2
            for point, (total, number) in points.items():
                self._put(point // 2, total, number)

    def values(self) -> list[float]:
        """The points, from the first step to the last."""
        return [total / number for _, (total, number) in sorted(self._points.items())]

    def _put(self, point: int, total: float, number: int) -> None:
        before = self._points.get(point, (0.0, 0))
        self._points[point] = before[0] + total, before[1] + number


@dataclass(slots=True)
class ProcessRow:
    name: str
    state: str = "starting"
    policy_version: int = -1
    num_tokens: int = 0
    num_in_flight: int = 0
    uptime_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    loop_lag_max_s: float = 0.0
    incarnation: int = 1
    first_incarnation: int = 1
    """The first incarnation of this life of the run."""
    restart_at_s: float | None = None
    """When it restarts, while it is absent."""
    away_since_s: float | None = None
    """Since when it has not done its work."""
    ended: bool = False
    left_cleanly: bool = False
    """It left in order, so its count of tokens is complete."""
    _window: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=64))
    """Uptime, tokens and idle seconds of recent statuses."""

    @property
    def tokens_per_s(self) -> float:
        elapsed_s, num_tokens, _ = self._window_change()
        return num_tokens / elapsed_s if elapsed_s > 0 else 0.0

    @property
    def busy_share(self) -> float:
        """Share of the last few seconds in which the process worked."""
        elapsed_s, _, idle_s = self._window_change()
        return min(1.0, max(0.0, 1.0 - idle_s / elapsed_s)) if elapsed_s > 0 else 0.0

    @property
    def idle_s(self) -> float:
        """Time since the start in which the process did not work."""
        return _idle_s(self.uptime_s, self.busy_s)

    @property
    def restarts(self) -> int:
        return self.incarnation - self.first_incarnation

    def begin(self, incarnation: int) -> None:
        """The process was restarted and counts from zero."""
        self.incarnation, self.state = incarnation, "starting"
        self.restart_at_s, self.ended, self.left_cleanly = None, False, False
        self.policy_version, self.num_tokens, self.num_in_flight = -1, 0, 0
        self.uptime_s, self.busy_s = 0.0, {}
        self._window.clear()

    def update(self, status: ProcessStatus) -> None:
        self.state, self.policy_version = printable(status.state), status.policy_version
        self.num_tokens, self.num_in_flight = status.num_tokens, status.num_in_flight
        self.uptime_s, self.busy_s = status.uptime_s, status.busy_s
        self.loop_lag_max_s = max(self.loop_lag_max_s, status.loop_lag_s)
        self._window.append((status.uptime_s, status.num_tokens, self.idle_s))
        while len(self._window) > 2 and status.uptime_s - self._window[0][0] > _RATE_WINDOW_S:
            self._window.popleft()

    def _window_change(self) -> tuple[float, int, float]:
        if len(self._window) < 2:
            return 0.0, 0, 0.0
        first, last = self._window[0], self._window[-1]
        return last[0] - first[0], last[1] - first[1], last[2] - first[2]


class RunView:
    """All that is known about a live run. Times are of the caller's monotonic clock."""

    def __init__(self, plan: RunPlan, *, name: str, run_dir: str, total_steps: int, now_s: float) -> None:
        self.name, self.run_dir, self.total_steps = name, run_dir, total_steps
        self.rows = {spec.name: ProcessRow(spec.name) for spec in plan.processes}
        self.started_at_s = now_s
        self.num_steps = 0
        self._num_steps_before = 0
        self.first_step_at_s: float | None = None
        self.last_step_at_s: float | None = None
        self.trends = {metric: Trend() for metric in SHOWN_METRICS}
        self.latest: dict[str, float] = {}
        """The newest value of each metric, whatever step it is of."""
        self.evaluations: dict[int, EvaluationSummary] = {}  # by version, ascending
        self.first_evaluation: Evaluation | None = None
        self.last_evaluation: Evaluation | None = None
        self.finished: RunFinished | None = None
        self.notices: deque[str] = deque(maxlen=_MAX_NOTICES)
        self.rollouts: Sequence[Rollout] = ()
        """Two of a recent step."""

    def recall(
        self, first_incarnations: Mapping[str, int], lines: Iterable[StepLine], evaluations: Iterable[Evaluation]
    ) -> None:
        """Take over what is known of the earlier lives of the run."""
        for name in self.rows.keys() & first_incarnations.keys():  # another life may have other processes
            self.rows[name].first_incarnation = first_incarnations[name]
        for line in lines:
            self._remember(line)
        self._num_steps_before = self.num_steps
        for evaluation in evaluations:
            self._keep_evaluation(evaluation)

    def take_start(self, name: str, incarnation: int) -> None:
        self.rows[name].begin(incarnation)

    def take_status(self, name: str, status: ProcessStatus) -> None:
        self.rows[name].update(status)

    def take_step(self, line: StepLine, now_s: float) -> bool:
        """The metrics of an optimiser step; steps count from 0. Returns whether the step is new."""
        is_new = line.step >= self.num_steps
        self._remember(line)
        if not is_new:
            return False
        self.first_step_at_s = now_s if self.first_step_at_s is None else self.first_step_at_s
        self.last_step_at_s = now_s
        return True

    def take_evaluation(self, message: EvaluationCompleted) -> Evaluation:
        """An evaluation; a later one of the same version replaces it."""
        evaluation = Evaluation.of(message)
        self._keep_evaluation(evaluation)
        return evaluation

    def take_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Two samples of a step, to be shown until there are later ones."""
        self.rollouts = rollouts

    def _remember(self, line: StepLine) -> None:
        self.num_steps = max(self.num_steps, line.step + 1)
        for name, value in line.metrics.items():
            if name in self.latest or len(self.latest) < MAX_LATEST:
                self.latest[name] = value
        for metric, trend in self.trends.items():
            if metric in line.metrics:
                trend.add(line.step, line.metrics[metric])

    def _keep_evaluation(self, evaluation: Evaluation) -> None:
        version = evaluation.policy_version
        self.evaluations = dict(sorted((self.evaluations | {version: evaluation.summary()}).items()))
        if self.first_evaluation is None or version <= self.first_evaluation.policy_version:
            self.first_evaluation = evaluation
        if self.last_evaluation is None or version >= self.last_evaluation.policy_version:
            self.last_evaluation = evaluation

    def take_exit(self, name: str, text: str, *, left_cleanly: bool) -> None:
        row = self.rows[name]
        row.state, row.ended, row.num_in_flight, row.left_cleanly = printable(text), True, 0, left_cleanly

    def take_restart(self, name: str, at_s: float | None, now_s: float, *, needs_room: bool = False) -> None:
        """A process that has ended restarts at `at_s`, or once the disk has space, or never."""
        row = self.rows[name]
        row.restart_at_s = None if needs_room else at_s
        if needs_room:
            row.state = "waits for space"
        if at_s is None:
            row.away_since_s = None
        elif row.away_since_s is None:
            row.away_since_s = now_s

    def take_service(self, name: str) -> None:
        self.rows[name].away_since_s = None

    @property
    def tokens_decoded(self) -> int:
        """The own count of the generators that left in order."""
        return sum(row.num_tokens for row in self.generators if row.left_cleanly)

    def tokens_received(self, tokens_by_generator: Mapping[str, Mapping[int, int]]) -> int:
        """Those of the shaper's count {name: {incarnation: tokens}} whose generators ended before they counted."""
        counted = {(row.name, row.incarnation) for row in self.generators if row.left_cleanly}
        return sum(
            num_tokens
            for name, counts in tokens_by_generator.items()
            for incarnation, num_tokens in counts.items()
            if (name, incarnation) not in counted
        )

    @property
    def tokens_per_s(self) -> float:
        return sum(row.tokens_per_s for row in self.generators if not row.ended)

    @property
    def num_away(self) -> int:
        return sum(row.ended or row.away_since_s is not None for row in self.generators)

    @property
    def generators(self) -> list[ProcessRow]:
        return [row for row in self.rows.values() if role_of(row.name).decodes]

    def note(self, text: str) -> None:
        """Show a notice; repeated ones are shown once."""
        text = printable(text)
        if text not in self.notices:
            self.notices.append(text)

    def remaining_s(self, now_s: float) -> float | None:
        """Time to the last step, from the mean time of the steps after the first. None before that, and at the end."""
        num_timed = self.num_steps - self._num_steps_before
        if self.first_step_at_s is None or self.last_step_at_s is None or num_timed < 2:
            return None
        if self.num_steps >= self.total_steps:
            return None
        per_step_s = (self.last_step_at_s - self.first_step_at_s) / (num_timed - 1)
        left_s = per_step_s * (self.total_steps - self.num_steps) - (now_s - self.last_step_at_s)
        return max(0.0, left_s)


def _idle_s(uptime_s: float, busy_s: dict[str, float]) -> float:
    return busy_s[IDLE_STAGE] if IDLE_STAGE in busy_s else max(0.0, uptime_s - sum(busy_s.values()))
