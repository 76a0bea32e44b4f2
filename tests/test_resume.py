"""Runs that everything has left, and that go on: `darts-launch resume`."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from darts_async.shaper.journal import JOURNAL_FILE
from darts_async.shaper.ledger import LEDGER_FILE, LearnerRewound, read_ledger
from tests.launched import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def settings(steps: int, checkpoint_every: int) -> dict[str, Any]:
    return {
        "roles": {"generator": {"replicas": 2}},
        "learner": {"steps": steps, "checkpoint_every": checkpoint_every},
        "telemetry": {"status_every_s": 0.1},
        "evaluation": {"every_steps": 40},
    }


def steps_taken(run: LaunchedRun) -> list[int]:
    return [line["step"] for line in run.lines("metrics.jsonl") if line["type"] == "step"]


def wait_for_new_steps(run: LaunchedRun, number: int) -> None:
    known = len(steps_taken(run))
    run.wait_until(lambda: len(steps_taken(run)) >= known + number)


def test_a_run_goes_on_after_everything_has_died_twice(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=160, checkpoint_every=20)) as run:
        run.wait_for_steps(11)
        live = run.verb("resume", str(run.run_dir))
        assert (live.returncode, "is live" in live.stderr) == (2, True), live.stderr
        run.kill_all()
        with (run.run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"type": "step", "step": 3')  # torn by the kill
        run.resume()
        wait_for_new_steps(run, 3)
        run.kill_all()
        run.resume()
        assert run.end() == 0, run.output
        summary = run.assert_clean()
        assert summary["num_steps"] == 160
        assert set(steps_taken(run)) == set(range(160))
        assert [event["life"] for event in run.events("resumed")] == [2, 3]
        assert json.loads((run.run_dir / "state.json").read_text())["life"] == 3
        starts = [(e["process"], e["incarnation"]) for e in run.events("started")]
        assert len(set(starts)) == len(starts), "no incarnation comes twice"
        assert summary["before"]["policy_version"] == 0, "it is remembered"
        over = run.verb("resume", str(run.run_dir))
        assert (over.returncode, "is finished" in over.stderr) == (2, True), over.stderr
        nowhere = run.verb("resume", str(tmp_path))
        assert (nowhere.returncode, "is not a run directory" in nowhere.stderr) == (2, True), nowhere.stderr


def cut(run: LaunchedRun, name: str, num_bytes: int) -> None:
    """A file has lost its end with the power."""
    path = run.run_dir / name
    os.truncate(path, max(0, path.stat().st_size - num_bytes))


LOSSES: dict[str, dict[str, int]] = {
    "the journal": {JOURNAL_FILE: 3000},
    "the ledger": {LEDGER_FILE: 3000},
    "each its own": {
        JOURNAL_FILE: 20_001,
        LEDGER_FILE: 5000,
        "metrics.jsonl": 700,
        "events.jsonl": 90,
        "state.json": 9,
    },
    "everything": dict.fromkeys([JOURNAL_FILE, LEDGER_FILE, "metrics.jsonl", "events.jsonl", "state.json"], 1 << 40),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_goes_on_whatever_its_files_have_lost_with_the_power(tmp_path: Path, loss: str) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=40, checkpoint_every=8)) as run:
        run.wait_for_steps(20)
        run.kill_all()
        for name, num_bytes in LOSSES[loss].items():
            cut(run, name, num_bytes)
        with (run.run_dir / "metrics.jsonl").open("ab") as file:
            file.write(b"\xff\n")
        audit = run.verb("audit", str(run.run_dir))
        assert audit.returncode in (0, 1), audit.stderr
        assert audit.returncode == 1 or loss != "everything", audit.stdout
        run.resume()
        assert run.end() == 0, run.output
        assert run.assert_clean()["num_steps"] == 40
        assert "1 line of metrics.jsonl cannot be read and passed over" in " ".join(run.output.split())


def test_a_run_is_taken_up_from_its_newest_checkpoint_when_that_is_asked_for(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=40, checkpoint_every=8)) as run:
        run.wait_for_steps(20)
        run.kill_all()
        run.resume("--from-checkpoint")
        assert run.end() == 0, run.output
        assert run.assert_clean()["num_steps"] == 40
        assert "records were taken back" in run.verb("audit", str(run.run_dir)).stdout


def test_a_run_that_ended_and_whose_end_was_not_noted_ends_again(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=12, checkpoint_every=8)) as run:
        assert run.end() == 0, run.output
        (run.run_dir / "summary.json").unlink()
        state = json.loads((run.run_dir / "state.json").read_text())
        (run.run_dir / "state.json").write_text(json.dumps(state | {"status": "running", "ended_at_s": None}))
        run.resume()
        assert run.end() == 0, run.output
        assert run.assert_clean()["num_steps"] == 12


def test_a_run_that_was_stopped_goes_on_where_it_stood(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=30, checkpoint_every=1000)) as run:
        run.wait_for_steps(9)
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130, run.output
        stopped = run.assert_clean()
        assert stopped["num_steps"] >= 9
        run.resume()
        assert run.end() == 0, run.output
        summary = run.assert_clean()
        assert summary["num_steps"] == 30
        assert summary["duration_s"] > stopped["duration_s"]
        assert set(steps_taken(run)) == set(range(30))
        rewound = [r for r in read_ledger(run.run_dir / LEDGER_FILE) if isinstance(r, LearnerRewound)]
        assert not rewound, "no step is taken again: the stop has left a checkpoint"
