"""Structured logs and the busy time of a process.

Busy time is an integral over intervals; a number of samples would depend on chance.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, TextIO, cast

import structlog

from darts_async.errors import NoSpaceError
from darts_async.machine.full_disk import append_whole
from darts_async.topology.run_files import older_path
from darts_async.trace import Trace, Value

_LEVELS = {"debug": 10, "info": 20, "warning": 30}


class LogFile:
    """A log of bounded size that never raises. When it reaches half of its bound, it replaces the older file
    (`older_path`). A line that does not fit on a full disk is omitted; before the next line that fits, the number of
    omitted lines is written."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._file: int | None = None
        self._is_closed = False
        self._num_left_out = 0

    def write(self, text: str) -> None:
        """Append complete lines. The operating system has them on return. No effect after `close`."""
        if self._is_closed:
            return
        before = json.dumps({"event": "lines_left_out", "number": self._num_left_out}) + "\n"
        try:
            self._append(((before if self._num_left_out else "") + text).encode(errors="backslashreplace"))
            self._num_left_out = 0
        except (OSError, NoSpaceError):
            self._num_left_out += 1

    def flush(self) -> None:
        """No effect: lines are not buffered."""

    def close(self) -> None:
        """Idempotent."""
        self._is_closed = True
        self._put_down()

    def _put_down(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        append_whole(self._file, data, self._path)
        if os.fstat(self._file).st_size > self._max_bytes // 2:
            self._put_down()
            os.replace(self._path, older_path(self._path))


@contextlib.contextmanager
def logging_to(path: Path, *, process: str, level: str, max_mb: float) -> Iterator[None]:
    """Send every structlog event of this process to `path`, one JSON object per line; `max_mb` bounds it."""

    def add_process(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    with contextlib.closing(LogFile(path, int(max_mb * 1e6))) as file:
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
            logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, file)),
        )
        try:
            yield
        finally:
            structlog.reset_defaults()


class _Stage:
    """Integrates the time in which at least one of several overlapping intervals is open. In the trace they are one,
    with the arguments of the first."""

    def __init__(self, name: str, trace: Trace, *, is_work: bool) -> None:
        self._name, self._trace, self._is_work = name, trace, is_work
        self._num_open = 0
        self._since_s = 0.0
        self._args: dict[str, Value] = {}
        self.total_s = 0.0

    def begin(self, now_s: float, args: dict[str, Value]) -> None:
        if self._num_open == 0:
            self._since_s, self._args = now_s, args
        self._num_open += 1

    def end(self, now_s: float) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self._count(now_s)

    def cut(self, now_s: float) -> None:
        if self._num_open:
            self._count(now_s)

    def _count(self, now_s: float) -> None:
        self.total_s += now_s - self._since_s
        self._trace.span(self._name, self._since_s, now_s, is_work=self._is_work, args=self._args)
        self._since_s = now_s


class BusyClock:
    """Integrates busy intervals by stage, and traces them. Stages may overlap; `idle` is the time without any stage."""

    def __init__(self, trace: Trace | None = None) -> None:
        self._started_s = time.perf_counter()
        self._trace = trace if trace is not None else Trace()
        self._stages: dict[str, _Stage] = {}
        self._waits: dict[str, _Stage] = {}
        self._any = _Stage("", Trace(), is_work=True)  # not traced

    @contextlib.contextmanager
    def busy(self, stage: str, **args: Value) -> Iterator[None]:
        """Count the time inside the block for `stage`. `args` go to the trace."""
        begin_s = time.perf_counter()
        self._any.begin(begin_s, {})
        intervals = self._begin(self._stages, stage, begin_s, args)
        try:
            yield
        finally:
            end_s = time.perf_counter()
            intervals.end(end_s)
            self._any.end(end_s)

    @contextlib.contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """Trace a wait inside the block, which does not count as busy time."""
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
        """Seconds by stage, and `idle`. Open intervals are counted up to the last `cut`."""
        busy = {name: stage.total_s for name, stage in self._stages.items()}
        return {**busy, "idle": max(0.0, self.uptime_s - self._any.total_s)}

    def cut(self) -> None:
        """Count and trace open intervals up to now."""
        now_s = time.perf_counter()
        for intervals in (*self._stages.values(), *self._waits.values(), self._any):
            intervals.cut(now_s)

    def _begin(self, stages: dict[str, _Stage], name: str, now_s: float, args: dict[str, Value]) -> _Stage:
        if name not in stages:
            stages[name] = _Stage(name, self._trace, is_work=stages is self._stages)
        stages[name].begin(now_s, args)
        return stages[name]
