"""What a run that is resumed knows of its earlier lives."""

import json
from pathlib import Path

import pytest
from msgspec import structs

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.topology.plan import RunPlan
from darts_async.topology.run_files import EVENTS_FILE, METRICS_FILE, STATE_FILE
from launcher.analysis.earlier_lives import held, read_past
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.lifecycle.restarts import Restarts
from launcher.plan.plan import link_addresses, plan_run
from launcher.run_dir.json_lines import Lines, whole_lines
from launcher.run_dir.run_dir import RunRecord, RunStatus, read_record, write_record
from launcher.sinks.recorder import recorded

ADDRESSES = link_addresses("127.0.0.1", range(7000, 7007))
CONFIG = RunConfig.model_validate({"roles": {"generator": {"replicas": 2}, "learner": {"replicas": 2}}})

LINE = {"type": "x", "elapsed_s": 1.0}


def plan() -> RunPlan:
    return plan_run(CONFIG, Path("/runs/a"), ADDRESSES)


def write_lines(path: Path, *lines: dict, torn: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def leave(run_dir: Path, status: RunStatus = "running") -> None:
    write_record(run_dir, RunRecord(status, "why", 0.0, None, 1, life=3))


def test_nothing_of_the_last_line_is_read_that_was_torn_and_the_next_one_stands_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    write_lines(path, LINE | {"a": 1}, LINE | {"a": 2}, torn='{"a": ')
    assert whole_lines(path).objects == [LINE | {"a": 1}, LINE | {"a": 2}]
    with path.open("a") as file:
        file.write(json.dumps(LINE | {"a": 3}) + "\n")
    assert [line["a"] for line in whole_lines(path).objects] == [1, 2, 3]
    assert whole_lines(tmp_path / "none.jsonl") == Lines([], 0, 0)


@pytest.mark.parametrize("bad", [b"\xff", b"no JSON", b"[1]", b"{}", b'{"type": "a", "elapsed_s": "b"}', b"[" * 9999])
def test_a_line_that_cannot_be_read_is_passed_over_and_counted(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    good = json.dumps(LINE).encode() + b"\n"
    path.write_bytes(good + bad + b"\n" + good)
    assert whole_lines(path) == Lines([LINE, LINE], 1, len(good) * 2 + len(bad) + 1)


def test_whatever_byte_of_any_file_is_lost_or_changed_the_run_is_taken_up(tmp_path: Path) -> None:
    leave(tmp_path)
    write_lines(tmp_path / EVENTS_FILE, {"type": "started", "process": "generator/0", "incarnation": 4, "elapsed_s": 1})
    write_lines(tmp_path / METRICS_FILE, {"type": "step", "step": 0, "reward/mean": 0.5, "elapsed_s": 7.5})
    whole = {name: (tmp_path / name).read_bytes() for name in (EVENTS_FILE, METRICS_FILE, STATE_FILE)}
    for name, data in whole.items():
        for place in range(len(data)):
            for damaged in (data[:place], data[:place] + bytes([data[place] ^ 0x81]) + data[place + 1 :]):
                (tmp_path / name).write_bytes(damaged)
                if name == STATE_FILE and b"finished" in damaged:
                    continue
                past = read_past(tmp_path, plan())
                assert past.life >= 2
                assert past.first_incarnations["generator/0"] >= 2
        (tmp_path / name).write_bytes(data)
    assert read_past(tmp_path, plan()).notices == ()


def test_a_life_is_new_whichever_file_still_tells_of_the_others(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"")
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "generator-1.7.old.msgpack").touch()
    past = read_past(tmp_path, structs.replace(plan(), life=4))
    assert past.life == 5
    assert past.first_incarnations["generator/1"] == 9
    assert past.notices == ("state.json cannot be read: the run was probably killed",)
    write_lines(tmp_path / EVENTS_FILE, {"type": "resumed", "life": 6, "elapsed_s": 1.0})
    assert read_past(tmp_path, plan()).life == 7


def test_incarnations_go_on_behind_those_that_may_have_been_started(tmp_path: Path) -> None:
    leave(tmp_path)
    started = [("generator/0", 1), ("generator/0", 4), ("learner/0", 2), ("learner/1", 1)]
    events = [{"type": "started", "process": n, "incarnation": i, "elapsed_s": 1.0} for n, i in started]
    write_lines(tmp_path / EVENTS_FILE, *events)
    past = read_past(tmp_path, plan())
    assert past.life == 4
    assert past.first_incarnations["generator/0"] == 6
    assert past.first_incarnations["generator/1"] == 2
    assert past.first_incarnations["learner/0"] == past.first_incarnations["learner/1"] == 4, "they count together"
    restarts = Restarts(plan(), CONFIG.roles, 0, past.first_incarnations)
    assert restarts.is_first("generator/0")
    restarts.ended("generator/0", -9, 0.0)
    restarts.take_due(1e6)
    assert (restarts.incarnation("generator/0"), restarts.is_first("generator/0")) == (7, False)


def test_steps_evaluations_and_the_time_so_far_are_remembered(tmp_path: Path) -> None:
    leave(tmp_path, "stopped")
    evaluation = {
        "type": "evaluation",
        "policy_version": 0,
        "newest_version": 1,
        "num_skipped": 0,
        "prompt_ids": [3, 3],
        "rewards": [0.0, 1.0],
        "num_tokens": [5, 7],
        "elapsed_s": 2.0,
    }
    step = {"type": "step", "step": 0, "reward/pool_mean": 0.5, "learner/loss": 0.1, "elapsed_s": 7.5}
    write_lines(tmp_path / METRICS_FILE, evaluation, step)
    past = read_past(tmp_path, plan())
    assert past.elapsed_s == 7.5
    assert [(line.step, line.metrics) for line in past.lines] == [(0, {"reward/pool_mean": 0.5})], "what is shown"
    assert past.evaluations[0].summary().reward == 0.5


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    leave(tmp_path, "finished")
    write_lines(tmp_path / METRICS_FILE, {"type": "step", "step": 19, "elapsed_s": 7.5})
    for steps in (None, 20):
        with pytest.raises(ConfigError, match=r"is finished \(why, 20 steps\): `.* learner\.steps=40` trains further"):
            read_past(tmp_path, plan(), steps=steps)
    with pytest.raises(ConfigError, match=r"learner\.steps is 19, and the run in .* has taken 20; give more"):
        read_past(tmp_path, plan(), steps=19)
    assert read_past(tmp_path, plan(), steps=21).num_steps == 20
    leave(tmp_path)
    (tmp_path / EVENTS_FILE).mkdir()
    with pytest.raises(ConfigError, match=rf"cannot be resumed: .*`darts-launch resume {tmp_path}` again"):
        read_past(tmp_path, plan())
    with held(tmp_path), pytest.raises(ConfigError, match=r"is live \(launcher: pid 1\)"), held(tmp_path):
        pass


@pytest.mark.parametrize(("goes_on", "status"), [(True, "running"), (False, "failed")])
def test_a_run_that_goes_on_in_another_life_is_not_said_to_have_ended(
    tmp_path: Path, goes_on: bool, status: str
) -> None:
    with recorded(tmp_path, 1) as ending:
        ending.outcome = RunOutcome("failed", "no group is known", goes_on=goes_on)
    assert read_record(tmp_path).status == status
