"""Reads the traces of a run: the lives of its processes, and what each process did.

Times are seconds since the first process of the run began. See `darts_async.trace` for the clocks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from darts_async.errors import ConfigError
from darts_async.topology.roles import LAUNCHER
from darts_async.topology.run_files import TRACE_DIR, older_path
from darts_async.trace import GAP_S, Instant, Level, Span, Tallied, TraceHead, read_records

_OLD = ".old.msgpack"


@dataclass(slots=True)
class Life:
    """One incarnation of a process. Lists are in order of time; spans only within each stage."""

    process: str
    incarnation: int
    pid: int
    began_s: float
    ended_s: float
    """Time of the last record."""
    spans: list[Span] = field(default_factory=list)
    instants: list[Instant] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    tallied: list[Tallied] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    head: TraceHead


class Traces:
    """What the processes of a run have written so far.

    Raises `ConfigError` if they have written nothing.
    """

    def __init__(self, run_dir: Path) -> None:
        self._files = sorted(_files_of(run_dir / TRACE_DIR), key=_order)
        if not self._files:
            raise ConfigError(
                f"{run_dir} has no trace: either telemetry.trace was false, or no process has started yet"
            )
        self._offset_s = _offsets(file.head for file in self._files)
        self._start_s = min(file.head.began_s + self._offset_s[file.head.machine] for file in self._files)

    @property
    def started_at_s(self) -> float:
        """When the first process began, in seconds since 1970."""
        return self._start_s

    def by_process(self) -> Iterator[tuple[str, list[Life]]]:
        """Each process with its lives. They are read lazily, because traces may be large."""
        for process, files in groupby(self._files, key=lambda file: file.head.process):
            yield process, [self._read(file) for file in files]

    def _read(self, file: _File) -> Life:
        head, shift_s = file.head, self._offset_s[file.head.machine] - self._start_s
        life = Life(head.process, head.incarnation, head.pid, head.began_s + shift_s, head.clock_s + shift_s)
        for path in _in_order(file):
            for record in read_records(path):
                _take(life, record, shift_s)
        life.instants.sort(key=attrgetter("at_s"))
        return life


def joined(spans: Iterable[Span]) -> Iterator[Span]:
    """The spans of each stage in order. Spans that were cut, or that follow each other closely, are joined."""
    open_spans: dict[str, Span] = {}
    for span in spans:
        last = open_spans.get(span.stage)
        if last is None:
            open_spans[span.stage] = span
        elif span.begin_s - last.end_s <= GAP_S and (span.args, span.is_work) == (last.args, last.is_work):
            busy_s = last.busy_s + span.busy_s
            open_spans[span.stage] = Span(span.stage, last.begin_s, span.end_s, busy_s, span.is_work, span.args)
        else:
            yield last
            open_spans[span.stage] = span
    yield from open_spans.values()


def _files_of(directory: Path) -> Iterator[_File]:
    for path in directory.glob("*.msgpack"):
        if path.name.endswith(_OLD):
            continue
        head = next(iter(read_records(path)), None)
        if isinstance(head, TraceHead):
            yield _File(path, head)


def _order(file: _File) -> tuple[bool, str, int, int]:
    """The launcher first; the tenth generator after the ninth."""
    role, _, index = file.head.process.partition("/")
    return file.head.process != LAUNCHER, role, int(index or 0), file.head.incarnation


def _offsets(heads: Iterable[TraceHead]) -> dict[str, float]:
    """What to add to the clock of each machine. It is taken from the machine's first head, so that a change of the time
    of day does not shift its processes against each other."""
    first: dict[str, TraceHead] = {}
    for head in heads:
        if head.machine not in first or head.clock_s < first[head.machine].clock_s:
            first[head.machine] = head
    return {name: head.wall_s - head.clock_s for name, head in first.items()}


def _in_order(file: _File) -> Iterator[Path]:
    """The files of an incarnation: the older one first, if it belongs to this incarnation."""
    old = older_path(file.path)
    if file.head.segment and old.exists():
        yield old
    yield file.path


def _take(life: Life, record: TraceHead | Span | Instant | Level | Tallied, shift_s: float) -> None:
    match record:
        case Span(stage, begin_s, end_s, busy_s, is_work, args):
            life.spans.append(Span(stage, begin_s + shift_s, end_s + shift_s, busy_s, is_work, args))
            last_s = end_s
        case Instant(name, at_s, args):
            life.instants.append(Instant(name, at_s + shift_s, args))
            last_s = at_s
        case Level(at_s, values):
            life.levels.append(Level(at_s + shift_s, values))
            last_s = at_s
        case Tallied(begin_s, end_s, counts):
            life.tallied.append(Tallied(begin_s + shift_s, end_s + shift_s, counts))
            last_s = end_s
        case TraceHead(clock_s=clock_s):
            last_s = clock_s
    life.ended_s = max(life.ended_s, last_s + shift_s)
