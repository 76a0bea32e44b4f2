"""What is new in a run since one looked last: the messages of the event stream of the page.

Messages of a run, each a JSON object with its name as `run`:

    {"reset": true}                                 forget the run: its files were replaced, and are sent again
    {"points": {METRIC: [[step, ...], [value, ...]]}, "last_step": N}
                                                    measurements; a later value of a step replaces the earlier one
    {"evaluations": [...]}                          summaries of evaluations, without their samples
    {"events": [...]}                               lines of events.jsonl: see `processes.event_row`
    {"state": {...}}                                how the run is, with its processes: see `state.read_state`
    {"samples": {"train": [...], "held-out": [...]}}    the steps and versions that have rollouts
    {"problem": "..."}                              the run cannot be read

A long file is sent in parts, so that no message is large.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darts_async.errors import ConfigError
from darts_async.topology.run_files import EVENTS_FILE, METRICS_FILE
from launcher.analysis.rollouts import RunRollouts
from launcher.dashboard.plain import plain
from launcher.dashboard.processes import Histories, event_row
from launcher.dashboard.sample_views import numbers_of
from launcher.dashboard.state import read_state
from launcher.run_dir.json_lines import read_lines
from launcher.terminal import printable

PART_BYTES = 1 << 20
_LARGEST = 1e300


@dataclass(slots=True)
class LineTail:
    """A file of JSON lines that grows. One that was replaced or cut short is read from its beginning again."""

    path: Path
    _offset: int = 0
    _inode: int | None = None

    def is_replaced(self) -> bool:
        """Whether what was read is not the beginning of the file any longer. Raises `OSError`."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return self._offset > 0
        return self._inode not in (None, found.st_ino) or found.st_size < self._offset

    def begin(self) -> None:
        """Read from the beginning."""
        self._offset, self._inode = 0, None

    def parts(self) -> Iterator[list[dict[str, Any]]]:
        """The complete lines that are new, in parts. Raises `OSError`."""
        if self._inode is None and self.path.exists():
            self._inode = self.path.stat().st_ino
        while True:
            lines = read_lines(self.path, self._offset, PART_BYTES)
            if lines.num_bytes == self._offset:  # nothing, or a line that is longer than a part
                lines = read_lines(self.path, self._offset)
            if lines.num_bytes <= self._offset:
                return
            self._offset = lines.num_bytes
            yield lines.objects


@dataclass(slots=True)
class RunUpdates:
    """The messages about one run for one reader."""

    name: str
    run_dir: Path
    _metrics: LineTail = field(init=False)
    _events: LineTail = field(init=False)
    _histories: Histories = field(default_factory=Histories)
    _sent: dict[str, Any] = field(default_factory=dict)
    """What was sent last, of messages that replace the one before."""

    def __post_init__(self) -> None:
        self._metrics = LineTail(self.run_dir / METRICS_FILE)
        self._events = LineTail(self.run_dir / EVENTS_FILE)

    def new(self) -> Iterator[dict[str, Any]]:
        """The messages since the last call; the first call tells everything."""
        try:
            for message in self._messages():
                yield {"run": self.name} | message
        except (OSError, ConfigError) as error:
            yield from ({"run": self.name} | each for each in self._changed("problem", str(error)))

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self._metrics.is_replaced() or self._events.is_replaced():
            self._metrics.begin()
            self._events.begin()
            self._histories = Histories()
            self._sent.clear()
            yield {"reset": True}
        for lines in self._metrics.parts():
            yield from measurements(lines)
        for lines in self._events.parts():
            for line in lines:
                self._histories.take(line)
            yield {"events": [plain(event_row(line)) for line in lines]}
        yield from self._changed("state", read_state(self.run_dir) | {"histories": self._histories.rows()})
        yield from self._changed("samples", numbers_of(RunRollouts(self.run_dir)))

    def _changed(self, name: str, value: Any) -> Iterator[dict[str, Any]]:
        value = plain(value)
        if self._sent.get(name) != value:
            self._sent[name] = value
            yield {name: value}


def measurements(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages for lines of `metrics.jsonl`. Lines that are damaged are left out."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    last_step = -1
    for line in lines:
        step = line.get("step")
        if line["type"] != "step" or not isinstance(step, int):
            continue
        last_step = max(last_step, step)
        for name, value in line.items():
            if name not in ("type", "step") and _is_number(value):
                steps, values = points.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(f"{value:.6g}"))
    if points:
        yield {"points": {printable(name): series for name, series in points.items()}, "last_step": last_step}
    evaluations = [line for line in lines if line["type"] == "evaluation"]
    if evaluations:
        yield {"evaluations": [plain(_without_samples(line)) for line in evaluations]}


def _is_number(value: Any) -> bool:
    """Whether it is finite. An integer of a damaged line may be too large for a float."""
    return isinstance(value, int | float) and -_LARGEST < value < _LARGEST


def _without_samples(line: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without its lists, which have an entry for each sample."""
    return {name: value for name, value in line.items() if not isinstance(value, list)}
