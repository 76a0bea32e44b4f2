"""What a process reports of itself: structured logs, and busy time, integrated and traced.

Busy time is the integral over intervals, never a sample: a process that is idle between two samples of its state would
otherwise look busy or idle by chance.
"""

import contextlib
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import structlog

from darts_async.trace import Trace, Value

_LEVELS = {"debug": 10, "info": 20, "warning": 30}


@contextlib.contextmanager
def logging_to(path: Path, *, process: str, level: str) -> Iterator[None]:
    """Send every structlog event of this process to `path`, one JSON object per line."""

    def add_process(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    with path.open("a", buffering=1, encoding="utf-8") as file:
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                add_process,
                structlog.processors.dict_tracebacks,
                structlog.processors.JSONRenderer(default=str),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
            logger_factory=structlog.WriteLoggerFactory(file=file),
        )
        yield


class _Intervals:
    """Integrates the time in which at least one of several overlapping intervals is open."""

    def __init__(self) -> None:
        self.num_open = 0
        self.since_s = 0.0
        self.total_s = 0.0

    def begin(self, now_s: float) -> None:
        if self.num_open == 0:
            self.since_s = now_s
        self.num_open += 1

    def end(self, now_s: float) -> None:
        self.num_open -= 1
        if self.num_open == 0:
            self.total_s += now_s - self.since_s

    def cut(self, now_s: float) -> None:
        if self.num_open:
            self.total_s += now_s - self.since_s
            self.since_s = now_s


class _Stage(_Intervals):
    """Of one name, as it is traced too. Intervals that overlap are one there, under the name of the first."""

    def __init__(self, name: str, trace: Trace, *, is_work: bool) -> None:
        super().__init__()
        self._name, self._trace, self._is_work = name, trace, is_work
        self.args: dict[str, Value] = {}

    def end(self, now_s: float) -> None:
        super().end(now_s)
        if self.num_open == 0:
            self._trace.span(self._name, self.since_s, now_s, is_work=self._is_work, args=self.args)

    def cut(self, now_s: float) -> None:
        if self.num_open:
            self._trace.span(self._name, self.since_s, now_s, is_work=self._is_work, args=self.args)
        super().cut(now_s)


class BusyClock:
    """Integrates busy intervals by stage, and traces them. Stages may overlap; `idle` is the time in which none was
    under way."""

    def __init__(self, trace: Trace | None = None) -> None:
        self._started_s = time.perf_counter()
        self._trace = trace if trace is not None else Trace()
        self._stages: dict[str, _Stage] = {}
        self._waits: dict[str, _Stage] = {}
        self._any = _Intervals()

    @contextlib.contextmanager
    def busy(self, stage: str, **args: Value) -> Iterator[None]:
        """Count the time inside the block for `stage`. The trace says `args` of it."""
        begin_s = time.perf_counter()
        self._any.begin(begin_s)
        intervals = self._begin(self._stages, stage, begin_s, args)
        try:
            yield
        finally:
            end_s = time.perf_counter()
            intervals.end(end_s)
            self._any.end(end_s)

    @contextlib.contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """Trace what the process waits for inside the block; that is no work."""
        intervals = self._begin(self._waits, stage, time.perf_counter(), {})
        try:
            yield
        finally:
            intervals.end(time.perf_counter())

    @property
    def uptime_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started_s

    def busy_s(self) -> dict[str, float]:
        """Seconds by stage, and `idle`. Intervals under way are counted up to the last `cut`."""
        busy = {name: stage.total_s for name, stage in self._stages.items()}
        return {**busy, "idle": max(0.0, self.uptime_s - self._any.total_s)}

    def cut(self) -> None:
        """Count, and trace, what is under way up to now."""
        now_s = time.perf_counter()
        for intervals in (*self._stages.values(), *self._waits.values(), self._any):
            intervals.cut(now_s)

    def _begin(self, stages: dict[str, _Stage], name: str, now_s: float, args: dict[str, Value]) -> _Stage:
        stage = stages.get(name)
        if stage is None:
            stage = stages[name] = _Stage(name, self._trace, is_work=stages is self._stages)
        if stage.num_open == 0:
            stage.args = args
        stage.begin(now_s)
        return stage
