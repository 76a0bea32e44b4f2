"""What a process did and when: spans, instants and levels, in files that only grow.

    trace/generator-0.1.msgpack       of the first incarnation of generator/0: MessagePack records
    trace/generator-0.1.old.msgpack   what was before them, once half of the file's bound was reached

Short spans of one stage that follow closely are merged, with the share of the time that they fill: an engine that makes
a thousand steps a second costs a few records a second. Records are written in one call per status, so a process that
dies loses the last fraction of a second. A long interval is written in pieces (`BusyClock.cut`).

Times are of `time.perf_counter`, which all processes of a Linux machine share. The head has the time since 1970 and the
machine, so processes of one machine line up exactly, and those of several as their clocks do.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgpack
import msgspec
import structlog
from msgspec import Struct

from darts_async.topology.run_files import TRACE_DIR, file_stem, older_path

SAMPLE, GROUP, GROUPS = "sample", "group", "groups"
"""The arguments of instants and spans that hold ids."""
GAP_S = 0.01
"""Spans of a stage that are this close are merged, if their arguments are the same."""
_MAX_PENDING = 2048
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Value = int | float | str | list[int]


class TraceHead(Struct, frozen=True, array_like=True, tag=0):
    """Begins a file. `began_s` is when the incarnation began; `clock_s` and `wall_s` (since 1970) are now."""

    process: str
    incarnation: int
    pid: int
    machine: str
    segment: int
    """How many files of this incarnation were before this one."""
    began_s: float
    clock_s: float
    wall_s: float


class Span(Struct, array_like=True, tag=1):
    """An interval, or several close to each other that fill `busy_s` of it. It grows until it is written."""

    stage: str
    begin_s: float
    end_s: float
    busy_s: float
    is_work: bool
    """If not, the process waits, or works on something else."""
    args: dict[str, Value]


class Instant(Struct, frozen=True, array_like=True, tag=2):
    """Something happened."""

    name: str
    at_s: float
    args: dict[str, Value]


class Level(Struct, frozen=True, array_like=True, tag=3):
    """A counter at a time, such as the tokens that this incarnation has decoded."""

    at_s: float
    values: dict[str, float]


class Tallied(Struct, frozen=True, array_like=True, tag=4):
    """How often things happened in an interval."""

    begin_s: float
    end_s: float
    counts: dict[str, int]


AnyRecord = TraceHead | Span | Instant | Level | Tallied


def trace_path(run_dir: Path, process: str, incarnation: int) -> Path:
    """Where an incarnation leaves its trace."""
    return run_dir / TRACE_DIR / f"{file_stem(process)}.{incarnation}.msgpack"


def read_records(path: Path) -> Iterator[AnyRecord]:
    """The records of a file in order, up to a torn tail or anything that is not a record. Raises `OSError` if the file
    cannot be read."""
    with path.open("rb") as file:
        try:
            for fields in msgpack.Unpacker(file, raw=False, strict_map_key=False):
                yield msgspec.convert(fields, AnyRecord)
        except (msgspec.ValidationError, msgpack.exceptions.UnpackException, ValueError):
            return


class Trace:
    """Collects what a process does, and writes it when `flush` is called. Without a path it does nothing. For one
    thread. If it cannot be written, because the disk is full, the trace ends and the process continues."""

    def __init__(
        self,
        path: Path | None = None,
        process: str = "",
        incarnation: int = 1,
        max_bytes: int = 0,
        *,
        has_samples: bool = True,
    ) -> None:
        """`max_bytes` bounds both files of the incarnation together; `has_samples`: write the events of each sample."""
        self._has_samples = has_samples
        self._path, self._process, self._incarnation, self._max_bytes = path, process, incarnation, max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._began_s = self._flushed_s = time.perf_counter()
        self._open: dict[str, Span] = {}
        self._counts: Counter[str] = Counter()
        self._pending: list[AnyRecord] = []
        self._num_segments = self._num_bytes = 0
        self._file: int | None = None
        if path is not None:
            self._begin_file(path)

    def span(
        self, stage: str, begin_s: float, end_s: float, *, is_work: bool = True, args: Mapping[str, Value] | None = None
    ) -> None:
        """An interval has ended, or a piece of it. Those of one stage come in order and do not overlap."""
        if self._file is None:
            return
        args = dict(args or {})
        last = self._open.get(stage)
        if last is not None:
            if begin_s - last.end_s <= GAP_S and last.args == args and last.is_work == is_work:
                last.end_s = end_s
                last.busy_s += end_s - begin_s
                return
            self._put(last)
        self._open[stage] = Span(stage, begin_s, end_s, end_s - begin_s, is_work, args)

    def instant(self, name: str, **args: Value) -> None:
        """Something happens now."""
        if self._file is not None:
            self._put(Instant(name, time.perf_counter(), args))

    def sample(self, name: str, sample_id: int) -> None:
        """Something happens to a sample now."""
        if self._file is not None and self._has_samples:
            self._put(Instant(name, time.perf_counter(), {SAMPLE: sample_id}))

    def count(self, name: str, number: int = 1) -> None:
        """Something happened `number` times."""
        if self._file is not None:
            self._counts[name] += number

    def level(self, **values: float) -> None:
        """The current value of a counter."""
        if self._file is not None:
            self._put(Level(time.perf_counter(), values))

    def flush(self) -> None:
        """Write everything so far: the operating system has it on return."""
        if self._file is None:
            return
        now_s = time.perf_counter()
        self._pending += self._open.values()
        self._open.clear()
        if self._counts:
            self._pending.append(Tallied(self._flushed_s, now_s, dict(self._counts)))
            self._counts.clear()
        self._flushed_s = now_s
        self._write()

    def close(self) -> None:
        """Write the rest. Idempotent."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _put(self, record: AnyRecord) -> None:
        self._pending.append(record)
        if len(self._pending) >= _MAX_PENDING:
            self._write()

    def _begin_file(self, path: Path) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._give_up(error)
            return
        head = TraceHead(
            process=self._process,
            incarnation=self._incarnation,
            pid=os.getpid(),
            machine=machine(),
            segment=self._num_segments,
            began_s=self._began_s,
            clock_s=time.perf_counter(),
            wall_s=time.time(),
        )
        self._num_segments, self._num_bytes = self._num_segments + 1, 0
        self._pending.insert(0, head)
        self._write()

    def _write(self) -> None:
        data = b"".join(map(self._encoder.encode, self._pending))
        self._pending.clear()
        self._num_bytes += len(data)
        try:
            while data and self._file is not None:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._give_up(error)
        if self._file is not None and self._path is not None and self._num_bytes > self._max_bytes // 2:
            self._turn_over(self._path)

    def _turn_over(self, path: Path) -> None:
        assert self._file is not None
        os.close(self._file)
        self._file = None
        try:
            os.replace(path, older_path(path))
        except OSError as error:
            self._give_up(error)
            return
        self._begin_file(path)

    def _give_up(self, error: OSError) -> None:
        structlog.get_logger().warning("trace_ends", path=str(self._path), error=str(error))
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._pending.clear()


def machine() -> str:
    """The boot of this machine: processes of one boot share a clock."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
