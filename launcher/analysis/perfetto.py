"""The trace of a run as JSON that https://ui.perfetto.dev and chrome://tracing show.

Each process of the run is a group of tracks: one with its incarnations, one per stage of work, one per wait, one of its
samples, and its counters. An arrow follows each sample from the shaper to a generator, to its reward and back, and each
group from the shaper into a gradient. Times are in microseconds.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import IO, Any, cast

from darts_async.topology.roles import LAUNCHER
from darts_async.trace import GROUP, GROUPS, SAMPLE, Instant, Level, Span, Tallied, Value
from launcher.analysis.traces import Life, joined

Event = dict[str, Any]
_Shown = tuple[str, float, float, dict[str, Any]]
"""Name, begin and end in seconds, and arguments of an interval."""

_LIVES, _SAMPLES = 0, 1
_TRACKS_PER_PROCESS = 1000
_MOMENT_US = 1.0
"""Duration with which an instant is drawn, so that an arrow can begin or end there."""
_BEGINS = frozenset({"placed", "shipped"})
_GOES_ON = frozenset({"started", "finished", "cancel", "stopped", "scored"})
"""Names of instants inside an arrow; every other instant of a sample is its end."""
_COUNTERS = {"in_flight": "in flight", "policy_version": "policy version"}
"""Other counters are shown under their own names; tokens as a rate."""


def write_events(file: IO[str], events: Iterable[Event]) -> int:
    """Write the events as they come, as one JSON object. Returns their number."""
    file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
    number = 0
    for number, event in enumerate(events, 1):
        file.write((",\n" if number > 1 else "") + json.dumps(event, separators=(",", ":")))
    file.write("\n]}\n")
    return number


def events_of(number: int, process: str, lives: Sequence[Life], since_s: float, until_s: float) -> Iterator[Event]:
    """The events of one process between two times. `number` is its position on the screen."""
    yield _meta("process_name", number, _LIVES, name=process)
    yield _meta("process_sort_index", number, _LIVES, sort_index=number)
    yield _meta("thread_name", number, _LIVES, name="incarnations")
    tracks: dict[str, int] = {}
    free_s = 0.0  # of the samples' track
    for life in lives:
        lived = (f"#{life.incarnation}", life.began_s, life.ended_s, {"pid": life.pid})
        yield from _interval(number, _LIVES, lived, since_s, until_s)
        for span in joined(life.spans):
            track = tracks.setdefault(span.stage, len(tracks) + _SAMPLES + 1)
            yield from _interval(number, track, _shown(span), since_s, until_s)
            if since_s <= span.begin_s <= until_s:
                for group_id in cast(list[int], span.args.get(GROUPS, ())):
                    yield _arrow("f", GROUP, group_id, number, track, span.begin_s)
        for instant in life.instants:
            if since_s <= instant.at_s <= until_s:
                subject = next((name for name in (SAMPLE, GROUP) if name in instant.args), None)
                if subject is None:
                    yield from _instant(number, life, instant)
                    continue
                # Perfetto hides spans that overlap without nesting: each begins after the previous one.
                at_s = max(instant.at_s, free_s)
                free_s = at_s + 2 * _MOMENT_US / 1e6  # times are rounded
                yield from _moment(number, instant, subject, at_s)
        for name, at_s, value in (*_levels(life), *_rates(life.tallied)):
            if since_s <= at_s <= until_s:
                yield {"ph": "C", "pid": number, "name": name, "ts": _us(at_s), "args": {"value": round(value, 3)}}
    if free_s:
        yield _meta("thread_name", number, _SAMPLES, name="samples")
    for stage, track in tracks.items():
        yield _meta("thread_name", number, track, name=stage)


def _shown(span: Span) -> _Shown:
    length_s = span.end_s - span.begin_s
    busy = {"busy": f"{span.busy_s / length_s:.0%}"} if 0 < span.busy_s < 0.995 * length_s else {}
    version = span.args.get("policy_version", span.args.get("step"))
    name = span.stage if version is None else f"{span.stage} {version}"
    return name, span.begin_s, span.end_s, {**span.args, **busy}


def _interval(number: int, track: int, shown: _Shown, since_s: float, until_s: float) -> Iterator[Event]:
    name, begin_s, end_s, args = shown
    begin_s, end_s = max(begin_s, since_s), min(end_s, until_s)
    if begin_s <= end_s:
        length_us = round((end_s - begin_s) * 1e6, 1)
        place = {"pid": number, "tid": _tid(number, track), "ts": _us(begin_s), "dur": length_us}
        yield {"ph": "X", "name": name, **place, "args": args}


def _instant(number: int, life: Life, instant: Instant) -> Iterator[Event]:
    """An instant. Those of the launcher are drawn across all tracks, except steps."""
    is_global = life.process == LAUNCHER and instant.name != "step"
    name = f"{instant.name} {instant.args['process']}" if "process" in instant.args else instant.name
    place = {"pid": number, "tid": _tid(number, _LIVES), "ts": _us(instant.at_s), "s": "g" if is_global else "p"}
    yield {"ph": "i", "name": name, **place, "args": instant.args}


def _moment(number: int, instant: Instant, subject: str, at_s: float) -> Iterator[Event]:
    subject_id = instant.args[subject]
    place = {"pid": number, "tid": _tid(number, _SAMPLES), "ts": _us(at_s), "dur": _MOMENT_US}
    yield {"ph": "X", "name": f"{instant.name} {subject_id}", **place, "args": instant.args}
    phase = "s" if instant.name in _BEGINS else "t" if instant.name in _GOES_ON else "f"
    yield _arrow(phase, subject, subject_id, number, _SAMPLES, at_s)


def _arrow(phase: str, subject: str, subject_id: Value, number: int, track: int, at_s: float) -> Event:
    """Part of an arrow: it begins (`s`), passes (`t`) or ends (`f`) at the event that is drawn at that time."""
    place = {"pid": number, "tid": _tid(number, track), "ts": _us(at_s)}
    return {"ph": phase, "cat": subject, "name": subject, "id": subject_id, **place, "bp": "e"}


def _levels(life: Life) -> Iterator[tuple[str, float, float]]:
    """Counters keep their value until the next one, and are zero at the end of a life."""
    last: Level | None = None
    for level in life.levels:
        for name, value in level.values.items():
            if name != "tokens" and value >= 0:
                yield _COUNTERS.get(name, name), level.at_s, value
    counted = [level for level in life.levels if "tokens" in level.values]
    if not any(level.values["tokens"] for level in counted):
        counted = counted[:0]
    for before, last in pairwise(counted):
        if last.at_s > before.at_s:
            rate = (last.values["tokens"] - before.values["tokens"]) / (last.at_s - before.at_s)
            yield "tokens/s", before.at_s, rate
    if last is not None:
        yield "tokens/s", last.at_s, 0.0
        yield _COUNTERS["in_flight"], last.at_s, 0.0


def _rates(tallied: Sequence[Tallied]) -> Iterator[tuple[str, float, float]]:
    """Things that are only counted, as rates per second; zero where there are none."""
    names = sorted({name for tally in tallied for name in tally.counts})
    for name in names:
        shown_until_s = -1.0
        for tally in tallied:
            if name not in tally.counts or tally.end_s <= tally.begin_s:
                continue
            if shown_until_s >= 0 and tally.begin_s > shown_until_s:
                yield f"{name}/s", shown_until_s, 0.0
            yield f"{name}/s", tally.begin_s, tally.counts[name] / (tally.end_s - tally.begin_s)
            shown_until_s = tally.end_s
        if shown_until_s >= 0:
            yield f"{name}/s", shown_until_s, 0.0


def _meta(kind: str, number: int, track: int, **args: Any) -> Event:
    return {"ph": "M", "name": kind, "pid": number, "tid": _tid(number, track), "args": args}


def _tid(number: int, track: int) -> int:
    """Perfetto takes a thread 0, or one numbered as its process, for the main thread, and puts both on one track."""
    return _TRACKS_PER_PROCESS * number + track + 1


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
