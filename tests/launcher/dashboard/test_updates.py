"""What is new in a run: read from its files as far as they are whole, and again from the beginning if replaced."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.dashboard import updates
from launcher.dashboard.updates import LineTail, RunUpdates, measurements
from launcher.run_dir.run_dir import RunRecord, write_record
from tests.launcher.analysis.test_rollouts import write
from tests.test_rollouts import rollout


def line(kind: str, **values: Any) -> str:
    return json.dumps({"type": kind, "elapsed_s": 1.0, **values}) + "\n"


def step(number: int, **metrics: Any) -> str:
    return line("step", step=number, **metrics)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: made\n")
    write_record(tmp_path, RunRecord("finished", "", 5.0, 9.0, 1))
    (tmp_path / "metrics.jsonl").write_text(step(0, loss=1.0) + step(1, loss=2.0) + '{"type": "st')
    return tmp_path


def new(of: RunUpdates, name: str) -> list[Any]:
    return [message[name] for message in of.new() if name in message]


def test_the_first_look_tells_everything_and_the_next_what_is_new(run_dir: Path) -> None:
    run = RunUpdates("made", run_dir)
    first = list(run.new())
    assert {message["run"] for message in first} == {"made"}
    [points] = [message["points"] for message in first if "points" in message]
    assert points == {"elapsed_s": ([0, 1], [1.0, 1.0]), "loss": ([0, 1], [1.0, 2.0])}
    [state] = [message["state"] for message in first if "state" in message]
    assert (state["status"], state["live"], state["summary"], state["histories"]) == ("finished", None, None, [])
    assert list(run.new()) == []
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('ep"}\n' + step(1, loss=3.0))
    assert new(run, "points") == [{"elapsed_s": ([1], [1.0]), "loss": ([1], [3.0])}]
    write(run_dir, [rollout(step=4)])
    assert new(run, "samples") == [{"train": [4], "held-out": []}]


def test_a_file_that_is_replaced_or_cut_is_sent_again(run_dir: Path) -> None:
    run = RunUpdates("made", run_dir)
    assert new(run, "reset") == []
    other = run_dir / "other"
    other.write_text(step(0, loss=7.0) * 9)
    os.replace(other, run_dir / "metrics.jsonl")
    messages = list(run.new())
    assert messages[0] == {"run": "made", "reset": True}
    assert any("state" in message for message in messages), "all of it is sent again"
    os.truncate(run_dir / "metrics.jsonl", 0)
    assert new(run, "reset") == [True]
    (run_dir / "metrics.jsonl").unlink()
    assert new(run, "reset") == []


def test_a_long_file_is_sent_in_parts_and_a_long_line_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "PART_BYTES", 200)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(step(number, loss=1.0) for number in range(20)) + step(20, text="x" * 999) + step(21))
    tail = LineTail(path)
    parts = list(tail.parts())
    assert len(parts) > 5
    assert [each["step"] for part in parts for each in part] == list(range(22))
    assert list(tail.parts()) == []


def test_what_is_damaged_is_left_out_and_numbers_are_finite() -> None:
    lines = [
        {"type": "step", "step": "poem", "loss": 1.0},
        {"type": "step", "loss": 1.0},
        {"type": "step", "step": 3, "loss": float("nan"), "words": "x", "huge": 10**400, "norm": 0.123456789},
    ]
    assert list(measurements(lines)) == [{"points": {"norm": ([3], [0.123457])}, "last_step": 3}]


def test_an_evaluation_is_sent_without_its_samples(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.write(line("evaluation", policy_version=3, **{"reward/mean": 0.5}, rewards=[1.0] * 9, prompt_ids=[1]))
    assert new(RunUpdates("made", run_dir), "evaluations") == [
        [{"type": "evaluation", "elapsed_s": 1.0, "policy_version": 3, "reward/mean": 0.5}]
    ]


def test_starts_ends_and_absences_of_a_process_are_counted(run_dir: Path) -> None:
    (run_dir / "events.jsonl").write_text(
        line("node_up", node="local", agent_incarnation=1)
        + line("started", process="a/0", incarnation=1, pid=7)
        + line("hangs", process="a/0", reason="\x1b[2J")
        + line("ended", process="a/0", code=-9, restart_in_s=None)
        + line("started", process="a/0", incarnation=2, pid=8)
        + line("serves", process="a/0", away_s=2.5)
        + line("resumed", life=2, changes=["steps: 1 -> 2"])
    )
    run = RunUpdates("made", run_dir)
    messages = list(run.new())
    [state] = [message["state"] for message in messages if "state" in message]
    assert state["histories"] == [
        {"process": "a/0", "num_starts": 2, "num_ends": 1, "last_code": -9, "num_kills": 1, "away_s": 2.5}
    ]
    [events] = [message["events"] for message in messages if "events" in message]
    assert [each["text"] for each in events][1:4] == ["incarnation 1  pid 7", "reason \\u001b[2J", "code -9"]
    assert events[0]["subject"] == "local"
    assert events[-1]["text"] == "life 2  changes steps: 1 -> 2"


def test_a_run_that_cannot_be_read_is_a_message_and_is_said_once(run_dir: Path) -> None:
    (run_dir / "state.json").write_text("poem")
    run = RunUpdates("made", run_dir)
    [problem] = new(run, "problem")
    assert "state.json" in problem
    assert list(run.new()) == []


def test_the_launcher_is_asked_only_of_a_run_that_may_be_live(run_dir: Path) -> None:
    """A killed run says `running` still, but nothing answers."""
    write_record(run_dir, RunRecord("running", "", 5.0, None, 1))
    [state] = new(RunUpdates("made", run_dir), "state")
    assert (state["status"], state["live"]) == ("running", None)
