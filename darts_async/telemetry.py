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


def configure_logging(path: Path, *, process: str, level: str) -> None:
    """Send every structlog event of this process to `path`, one JSON object per line."""

    def add_process(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

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
        logger_factory=structlog.WriteLoggerFactory(file=path.open("a", buffering=1, encoding="utf-8")),
        cache_logger_on_first_use=True,
    )


class BusyClock:
    """Integrates busy intervals by stage. Stages may overlap; `idle` is the time in which none was under way."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_under_way = 0
        self._any_since_s = 0.0
        self._any_s = 0.0

    @contextlib.contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Count the time inside the block for `stage`."""
        begin_s = time.perf_counter()
        if self._num_under_way == 0:
            self._any_since_s = begin_s
        self._num_under_way += 1
        try:
            yield
        finally:
            end_s = time.perf_counter()
            self._seconds[stage] += end_s - begin_s
            self._num_under_way -= 1
            if self._num_under_way == 0:
                self._any_s += end_s - self._any_since_s

    @property
    def uptime_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started_s

    def busy_s(self) -> dict[str, float]:
        """Seconds by stage, and `idle`. Intervals under way are counted when they end."""
        return {**self._seconds, "idle": max(0.0, self.uptime_s - self._any_s)}
