"""What a process reports of itself: structured logs and integrated busy time.

Busy time is the integral over intervals, never a sample: a process that is idle between two samples of its state would
otherwise look busy or idle by chance.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import structlog

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
        self._num_open = 0
        self._since_s = 0.0
        self.total_s = 0.0

    def begin(self, now_s: float) -> None:
        if self._num_open == 0:
            self._since_s = now_s
        self._num_open += 1

    def end(self, now_s: float) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self.total_s += now_s - self._since_s


class BusyClock:
    """Integrates busy intervals by stage. Stages may overlap; `idle` is the time in which none was under way."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._stages: defaultdict[str, _Intervals] = defaultdict(_Intervals)
        self._any = _Intervals()

    @contextlib.contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Count the time inside the block for `stage`."""
        begin_s = time.perf_counter()
        self._stages[stage].begin(begin_s)
        self._any.begin(begin_s)
        try:
            yield
        finally:
            end_s = time.perf_counter()
            self._stages[stage].end(end_s)
            self._any.end(end_s)

    @property
    def uptime_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started_s

    def busy_s(self) -> dict[str, float]:
        """Seconds by stage, and `idle`. Intervals under way are counted when they end."""
        busy = {name: stage.total_s for name, stage in self._stages.items()}
        return {**busy, "idle": max(0.0, self.uptime_s - self._any.total_s)}
