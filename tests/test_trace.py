"""Traces: what is written, what is read back of it, and the shares and the file that are made of it."""

import json
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.measured import tokens_between
from darts_async import trace
from darts_async.telemetry import BusyClock
from darts_async.topology.run_files import older_path
from darts_async.trace import Instant, Level, Span, Tallied, Trace, TraceHead, read_records, trace_path
from launcher.analysis.perfetto import events_of
from launcher.analysis.time_use import time_spent, union_s
from launcher.analysis.traces import Life, Traces, joined
from launcher.commands.cli import app


def span(stage: str, begin_s: float, end_s: float, busy_s: float | None = None, *, is_work: bool = True) -> Span:
    return Span(stage, begin_s, end_s, end_s - begin_s if busy_s is None else busy_s, is_work, {})


def life(number: int, began_s: float, ended_s: float, *spans: Span) -> Life:
    return Life("generator/0", number, 100 + number, began_s, ended_s, list(spans))


def spans_in(path: Path) -> list[Span]:
    return [record for record in read_records(path) if isinstance(record, Span)]


# --- writing -----------------------------------------------------------------------------------------------------


def test_short_spans_that_follow_closely_are_one_record_that_says_how_much_they_fill(tmp_path: Path) -> None:
    path = trace_path(tmp_path, "generator/0", 1)
    writer = Trace(path, "generator/0", 1, 1 << 20)
    for step in range(1000):
        writer.span("decode", step * 0.01, step * 0.01 + 0.004)
    writer.span("decode", 20.0, 20.5)
    writer.close()
    dense, alone = spans_in(path)
    assert (dense.begin_s, dense.end_s, dense.busy_s) == pytest.approx((0.0, 9.994, 4.0))
    assert (alone.begin_s, alone.end_s, alone.busy_s) == (20.0, 20.5, 0.5)


def test_spans_that_say_different_things_stay_apart(tmp_path: Path) -> None:
    path = trace_path(tmp_path, "learner/0", 1)
    writer = Trace(path, "learner/0", 1, 1 << 20)
    for group in range(3):
        writer.span("train", float(group), group + 1.0, args={"group": group})
    writer.close()
    assert [each.args["group"] for each in spans_in(path)] == [0, 1, 2]


def test_work_under_way_is_written_in_pieces_that_are_one_again_when_read(tmp_path: Path) -> None:
    path = trace_path(tmp_path, "learner/0", 1)
    writer = Trace(path, "learner/0", 1, 1 << 20)
    clock = BusyClock(writer)
    with clock.busy("train", group=7), clock.waiting("waits for publishing"):
        for _ in range(3):
            clock.cut()
            writer.flush()
            assert clock.busy_s()["train"] > 0
    writer.close()
    pieces = [each for each in spans_in(path) if each.stage == "train"]
    assert len(pieces) >= 3
    [whole] = joined(pieces)
    assert whole.args == {"group": 7}
    assert whole.busy_s == pytest.approx(whole.end_s - whole.begin_s)
    assert clock.busy_s()["train"] == pytest.approx(whole.busy_s)
    assert "waits for publishing" not in clock.busy_s()


def test_instants_levels_and_counts_come_back_as_they_were(tmp_path: Path) -> None:
    path = trace_path(tmp_path, "shaper/0", 3)
    writer = Trace(path, "shaper/0", 3, 1 << 20)
    writer.instant("version published", policy_version=4)
    writer.level(tokens=12.0, in_flight=3)
    writer.count("cancelled", 2)
    writer.count("cancelled")
    writer.close()
    head, instant, level, tallied = read_records(path)
    assert isinstance(head, TraceHead)
    assert (head.process, head.incarnation, head.segment) == ("shaper/0", 3, 0)
    assert isinstance(instant, Instant)
    assert (instant.name, instant.args) == ("version published", {"policy_version": 4})
    assert isinstance(level, Level)
    assert level.values == {"tokens": 12.0, "in_flight": 3}
    assert isinstance(tallied, Tallied)
    assert tallied.counts == {"cancelled": 3}


@given(cut=st.integers(min_value=0, max_value=10_000))
def test_a_torn_tail_costs_the_last_record_and_no_other(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = trace_path(tmp_path_factory.mktemp("run"), "a", 1)
    writer = Trace(path, "a", 1, 1 << 20)
    for number in range(20):
        writer.instant("it", number=number)
    writer.close()
    records, data = list(read_records(path)), path.read_bytes()
    path.write_bytes(data[: cut % len(data)])
    found = list(read_records(path))
    assert found == records[: len(found)]
    assert len(found) >= (cut % len(data)) // (len(data) // 20 + 1) - 3
    path.write_bytes(data + b"\0\0\xc1")
    assert list(read_records(path)) == records


def test_a_file_is_bounded_and_the_end_is_there(tmp_path: Path) -> None:
    path = trace_path(tmp_path, "a", 1)
    writer = Trace(path, "a", 1, 4000)
    for number in range(1000):
        writer.instant("it", number=number)
        writer.flush()
    writer.close()
    sizes = [path.stat().st_size, older_path(path).stat().st_size]
    assert sum(sizes) < 4200
    [(_, [read])] = Traces(tmp_path).by_process()
    numbers = [instant.args["number"] for instant in read.instants]
    assert numbers == list(range(int(numbers[0]), 1000))
    assert len(numbers) > 50


def test_what_cannot_be_written_ends_the_trace_and_not_the_process(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("in the way")
    writer = Trace(trace_path(tmp_path, "a", 1), "a", 1, 4000)
    assert writer._file is None
    writer.span("decode", 0.0, 1.0)
    writer.instant("it")
    writer.close()


# --- clocks ------------------------------------------------------------------------------------------------------


def test_processes_of_a_machine_line_up_although_the_time_of_day_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = []
    for process, machine, ahead_s in (("shaper/0", "a", 0.0), ("reward/0", "a", 60.0), ("generator/0", "b", 5.0)):
        monkeypatch.setattr(trace, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: 1e9 + ahead_s + time.perf_counter())
        writers.append(Trace(trace_path(tmp_path, process, 1), process, 1, 1 << 20))
    for writer in writers:
        writer.instant("now")
        writer.close()
    at_s = {process: lives[0].instants[0].at_s for process, lives in Traces(tmp_path).by_process()}
    assert at_s["reward/0"] == pytest.approx(at_s["shaper/0"], abs=1.0), "60 s later by the time of day alone"
    assert at_s["generator/0"] == pytest.approx(at_s["shaper/0"] + 5.0, abs=1.0)


# --- shares ------------------------------------------------------------------------------------------------------

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=12)


@given(INTERVALS, st.integers(0, 30), st.integers(31, 60))
def test_the_union_is_the_length_of_all_that_is_covered(intervals: list[list[int]], since: int, until: int) -> None:
    covered = {second for begin, end in intervals for second in range(begin, end) if since <= second < until}
    assert union_s([span("a", *pair) for pair in intervals], since, until) == pytest.approx(len(covered))


def test_stages_that_take_turns_add_up_and_stages_at_once_do_not() -> None:
    turns = [span("decide", 0, 10, 3.0), span("record", 0, 10, 2.0)]
    assert union_s(turns, 0, 10) == pytest.approx(5.0)
    assert union_s(turns, 0, 5) == pytest.approx(2.5)
    assert union_s([span("train", 0, 10), span("publish", 5, 15)], 0, 20) == pytest.approx(15.0)


def test_busy_idle_and_away_are_all_of_the_window() -> None:
    wait = span("waits for groups", 2.0, 4.0, is_work=False)
    lives = [
        life(1, 0.0, 10.0, span("decode", 0.0, 8.0, 6.0), wait),
        life(2, 15.0, 30.0, span("decode", 16.0, 30.0), span("swap", 15.0, 16.0)),
    ]
    spent = time_spent("generator/0", lives, 0.0, 20.0)
    assert (spent.busy_s, spent.idle_s, spent.away_s) == pytest.approx((11.0, 4.0, 5.0))
    assert spent.by_stage_s == pytest.approx({"decode": 10.0, "swap": 1.0})
    assert spent.waits_s == pytest.approx({"waits for groups": 2.0})
    assert spent.share(spent.away_s) == pytest.approx(0.25)


def test_tokens_are_counted_over_incarnations_that_each_begin_at_zero() -> None:
    first, second = life(1, 0.0, 10.0), life(2, 20.0, 30.0)
    first.levels = [Level(5.0, {"tokens": 0}), Level(10.0, {"tokens": 100})]
    second.levels = [Level(20.0, {"tokens": 0}), Level(30.0, {"tokens": 50})]
    lives = [first, second]
    assert tokens_between(lives, 0.0, 40.0) == pytest.approx(150)
    assert tokens_between(lives, 7.5, 12.0) == pytest.approx(50)
    assert tokens_between(lives, 12.0, 18.0) == 0
    assert tokens_between(lives, 8.0, 22.0) == pytest.approx(40 + 10)


# --- the file for Perfetto ---------------------------------------------------------------------------------------


def test_incarnations_stages_counters_and_restarts_are_shown() -> None:
    first, second = life(1, 1.0, 2.0, span("decode", 1.0, 2.0, 0.5)), life(2, 3.0, 4.0, span("decode", 3.0, 4.0))
    first.levels = [Level(1.0, {"tokens": 0, "policy_version": -1}), Level(2.0, {"tokens": 80, "policy_version": 6})]
    first.tallied = [Tallied(1.0, 1.5, {"cancels": 2})]
    events = list(events_of(5, "generator/0", [first, second], 0.0, 100.0))
    assert {event["pid"] for event in events} == {5}
    intervals = [(event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert intervals == [("#1", 1e6, 1e6), ("decode", 1e6, 1e6), ("#2", 3e6, 1e6), ("decode", 3e6, 1e6)]
    assert [event["args"] for event in events if event["name"] == "decode"] == [{"busy": "50%"}, {}]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"incarnations", "decode"}
    counters = [(event["name"], event["ts"], event["args"]["value"]) for event in events if event["ph"] == "C"]
    assert [each for each in counters if each[0] == "tokens/s"] == [("tokens/s", 1e6, 80), ("tokens/s", 2e6, 0)]
    assert ("cancels/s", 1e6, 4) in counters
    assert ("policy version", 2e6, 6) in counters
    assert not [each for each in counters if each[2] < 0]


def test_restarts_are_drawn_across_all_tracks_and_only_the_window_is_written() -> None:
    launcher = Life("launcher", 1, 7, 0.0, 50.0)
    launcher.instants = [Instant("step", 4.0, {"step": 1}), Instant("ended", 5.0, {"process": "generator/0"})]
    launcher.instants.append(Instant("ended", 6.0, {"process": "generator/0"}))
    events = list(events_of(1, "launcher", [launcher], 3.0, 5.5))
    shown = [(event["name"], event["s"]) for event in events if event["ph"] == "i"]
    assert shown == [("step", "p"), ("ended generator/0", "g")]
    assert [(event["ts"], event["dur"]) for event in events if event["ph"] == "X"] == [(3e6, 2.5e6)]


def test_arrows_lead_from_the_shaper_through_generator_and_reward_back_and_into_a_gradient() -> None:
    def told(name: str, at_s: float, **args: int) -> Instant:
        return Instant(name, at_s, dict(args))

    shaper, generator, reward = life(1, 0.0, 9.0), life(1, 0.0, 9.0), life(1, 0.0, 9.0)
    shaper.instants = [told("placed", 1.0, sample=7), told("trained", 5.0, sample=7), told("shipped", 5.0, group=2)]
    shaper.instants.append(told("shipped", 5.5, group=1))
    generator.instants = [told("started", 2.0, sample=7), told("finished", 3.0, sample=7)]
    reward.instants = [told("scored", 4.0, sample=7), told("scored", 8.5, sample=9)]
    learner = life(1, 0.0, 9.0, Span("train", 6.0, 7.0, 1.0, True, {"groups": [1, 2]}))
    lives = {"shaper/0": shaper, "generator/0": generator, "reward/0": reward, "learner/0": learner}
    events = [
        event
        for number, (process, each) in enumerate(lives.items())
        for event in events_of(number, process, [each], 0.0, 8.0)
    ]
    arrows = sorted((event for event in events if event["ph"] in "stf"), key=itemgetter("ts"))
    assert [(arrow["ph"], arrow["pid"]) for arrow in arrows if (arrow["cat"], arrow["id"]) == ("sample", 7)] == [
        ("s", 0), ("t", 1), ("t", 1), ("t", 2), ("f", 0),
    ]  # fmt: skip
    assert [(arrow["ph"], arrow["pid"]) for arrow in arrows if arrow["cat"] == "group"] == [
        ("s", 0), ("s", 0), ("f", 3), ("f", 3),
    ]  # fmt: skip
    assert len(arrows) == 9, "what lies outside the window is not drawn"
    drawn = {(event["pid"], event["tid"], event["ts"]) for event in events if event["ph"] == "X"}
    assert {(arrow["pid"], arrow["tid"], arrow["ts"]) for arrow in arrows} <= drawn, "an arrow needs what it ends at"


def test_tracks_are_their_own_and_what_happens_at_once_stands_behind_one_another() -> None:
    shaper = life(1, 0.0, 9.0, Span("decide", 1.0, 2.0, 1.0, True, {}))
    shaper.instants = [Instant("placed", 1.0 + number * 1e-7, {"sample": number}) for number in range(5)]
    events = [event for number in (1, 2, 3) for event in events_of(number, f"shaper/{number}", [shaper], 0.0, 9.0)]
    drawn = [event for event in events if event["ph"] == "X"]
    tracks = {(event["pid"], event["tid"]) for event in drawn}
    assert len({tid for _, tid in tracks}) == len(tracks) == 9
    assert not {tid for _, tid in tracks} & {0, 1, 2, 3}, "no track is taken for a process's main thread"
    begins = sorted(event["ts"] for event in drawn if event["pid"] == 2 and event["name"].startswith("placed"))
    assert np.diff(begins).min() > 0.999
    arrows = sorted(event["ts"] for event in events if event["pid"] == 2 and event["ph"] == "s")
    assert arrows == begins


def test_samples_are_not_told_of_where_they_are_not_wanted(tmp_path: Path) -> None:
    writer = Trace(trace_path(tmp_path, "shaper/0", 1), "shaper/0", 1, 1 << 20, has_samples=False)
    writer.sample("placed", 3)
    writer.instant("version published", policy_version=0)
    writer.close()
    records = list(read_records(trace_path(tmp_path, "shaper/0", 1)))
    assert [record.name for record in records if isinstance(record, Instant)] == ["version published"]


def run_dir_with_trace(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: a\n")
    for process in ("launcher", "shaper/0", "generator/0", "generator/10", "generator/9"):
        writer = Trace(trace_path(tmp_path, process, 1), process, 1, 1 << 20)
        writer.instant("version published", policy_version=0)
        with BusyClock(writer).busy("decode"):
            time.sleep(0.001)
        writer.close()
    with trace_path(tmp_path, "generator/0", 1).open("ab") as file:
        file.write(b"\x97\x01\xa6deco")  # torn
    return tmp_path


def test_the_verb_writes_json_and_shows_the_time_of_every_process(tmp_path: Path) -> None:
    run_dir = run_dir_with_trace(tmp_path)
    result = CliRunner().invoke(app, ["trace", str(run_dir), "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["launcher", "generator/0", "generator/9", "generator/10", "shaper/0"]
    assert all(name in result.output for name in names[1:])
    assert f"{len(events):,} events" in result.output


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--since", "5000"], "nothing happened between 5000 s"),
        (["--since", "2", "--until", "1"], "--since must be smaller"),
        (["--out", "/nowhere/out.json"], "/nowhere/out.json cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_shown_is_bad_input(tmp_path: Path, words: list[str], error: str) -> None:
    result = CliRunner().invoke(app, ["trace", str(run_dir_with_trace(tmp_path)), *words])
    assert (result.exit_code, error in " ".join(result.output.split())) == (2, True), result.output


def test_a_run_without_a_trace_says_which_setting_brings_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: a\n")
    result = CliRunner().invoke(app, ["trace", str(tmp_path)])
    assert (result.exit_code, "telemetry.trace was false" in result.output) == (2, True), result.output
