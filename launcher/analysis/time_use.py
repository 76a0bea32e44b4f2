"""How a process spent its time, as shares of a time window. Pure; the shares are integrals over intervals.

A span may represent many short intervals that fill part of it. Overlapping spans fill the sum of their parts, and at
most all of the time. This is exact for stages that take turns and for stages that always run.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from darts_async.trace import Span
from launcher.analysis.traces import Life


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """The time of one process in a window. busy + idle + away = window."""

    process: str
    window_s: float
    busy_s: float
    """Union of all work."""
    idle_s: float
    """It was alive, and did not work."""
    away_s: float
    """It was not alive: before its first start, or between two starts."""
    by_stage_s: dict[str, float]
    """The time of each stage of work. Stages may overlap."""
    waits_s: dict[str, float]
    """The time of each wait. The process may have worked meanwhile."""

    def share(self, seconds: float) -> float:
        return seconds / self.window_s


def time_spent(process: str, lives: Sequence[Life], since_s: float, until_s: float) -> TimeSpent:
    """How a process spent the time from `since_s` to `until_s`."""
    spans = [span for life in lives for span in life.spans]
    work = [span for span in spans if span.is_work]
    lived = [Span("", life.began_s, life.ended_s, life.ended_s - life.began_s, True, {}) for life in lives]
    window_s = until_s - since_s
    lived_s, busy_s = union_s(lived, since_s, until_s), union_s(work, since_s, until_s)
    return TimeSpent(
        process=process,
        window_s=window_s,
        busy_s=busy_s,
        idle_s=max(0.0, lived_s - busy_s),
        away_s=max(0.0, window_s - lived_s),
        by_stage_s=_by_stage(work, since_s, until_s),
        waits_s=_by_stage((span for span in spans if not span.is_work), since_s, until_s),
    )


def union_s(spans: Iterable[Span], since_s: float, until_s: float) -> float:
    """Seconds between `since_s` and `until_s` that the spans fill together."""
    edges = sorted(edge for span in spans for edge in _edges(span, since_s, until_s))
    total_s, density, before_s = 0.0, 0.0, since_s
    for at_s, change in edges:
        total_s += (at_s - before_s) * min(1.0, max(0.0, density))
        density, before_s = density + change, at_s
    return total_s


def _edges(span: Span, since_s: float, until_s: float) -> list[tuple[float, float]]:
    begin_s, end_s = max(span.begin_s, since_s), min(span.end_s, until_s)
    if end_s <= begin_s:
        return []
    density = min(1.0, span.busy_s / (span.end_s - span.begin_s))
    return [(begin_s, density), (end_s, -density)]


def _by_stage(spans: Iterable[Span], since_s: float, until_s: float) -> dict[str, float]:
    stages: defaultdict[str, list[Span]] = defaultdict(list)
    for span in spans:
        stages[span.stage].append(span)
    seconds = {stage: union_s(spans, since_s, until_s) for stage, spans in stages.items()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
