"""Busy time is integrated, not sampled."""

import json
from pathlib import Path

import pytest
import structlog

from darts_async import telemetry
from darts_async.telemetry import BusyClock, logging_to


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


def test_overlapping_stages_are_each_counted_and_idle_is_when_none_runs(clock: Clock) -> None:
    busy = BusyClock()
    clock.now_s += 1.0
    with busy.busy("train"):
        clock.now_s += 2.0
        with busy.busy("publish"):
            clock.now_s += 3.0
    clock.now_s += 4.0
    assert busy.busy_s() == {"train": 5.0, "publish": 3.0, "idle": 5.0}
    assert busy.uptime_s == 10.0


def test_two_items_of_one_stage_at_once_count_once(clock: Clock) -> None:
    busy = BusyClock()
    with busy.busy("score"), busy.busy("score"):
        clock.now_s += 2.0
    assert busy.busy_s() == {"score": 2.0, "idle": 0.0}


def test_an_interval_counts_also_when_it_ends_with_an_error(clock: Clock) -> None:
    busy = BusyClock()

    def fail() -> None:
        with busy.busy("train"):
            clock.now_s += 2.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert busy.busy_s()["train"] == 2.0


def test_logs_are_one_json_object_per_line_with_the_process_name(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    try:
        with logging_to(path, process="shaper/0", level="info", max_mb=1.0):
            log = structlog.get_logger()
            log.debug("not this")
            log.info("group_dropped", group_id=3, path=tmp_path)
    finally:
        structlog.reset_defaults()
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["process"], record["group_id"]) == ("group_dropped", "shaper/0", 3)
