"""Merges the metrics of one optimiser step, which come from several processes, into one line.

A step is complete when every process has sent its expected number of reports. Lines leave in the order of the steps. A
late or lost report delays a line by at most `MAX_OPEN_STEPS` steps. A report after that leaves at once, as a further
line of the same step. So readers merge the lines of a step, and later values win; a restarted learner repeats steps.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MAX_OPEN_STEPS = 4


@dataclass(frozen=True, slots=True)
class StepLine:
    """What is known about one optimiser step."""

    step: int
    metrics: dict[str, float]


@dataclass(slots=True)
class _Open:
    metrics: dict[str, float] = field(default_factory=dict)
    reports: Counter[str] = field(default_factory=Counter)


class StepMerger:
    """Merges the reports of a step. `expected` is the number of reports of each process about a step."""

    def __init__(self, expected: Mapping[str, int]) -> None:
        self._expected = Counter(expected)
        self._open: dict[int, _Open] = {}
        self._last = -1
        """The latest step whose line has left."""

    def add(self, reporter: str, step: int, metrics: dict[str, float]) -> list[StepLine]:
        """Take one report; returns the lines that are ready."""
        if step <= self._last and step not in self._open:
            return [StepLine(step, metrics)]
        entry = self._open.setdefault(step, _Open())
        entry.metrics.update(metrics)
        entry.reports[reporter] += 1
        return list(self._take_ready())

    def flush(self) -> list[StepLine]:
        """All lines that still wait, complete or not."""
        return [self._take(step) for step in sorted(self._open)]

    def _take_ready(self) -> Iterator[StepLine]:
        for step in sorted(self._open):
            if len(self._open) <= MAX_OPEN_STEPS and not self._open[step].reports >= self._expected:
                return
            yield self._take(step)

    def _take(self, step: int) -> StepLine:
        self._last = max(self._last, step)
        return StepLine(step, self._open.pop(step).metrics)
