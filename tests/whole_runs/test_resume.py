"""Runs that everything has left, and that go on: `darts-launch resume`."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from darts_async.shaper.ledger import AnyRecord, LearnerRewound, RunReopened, read_ledger, scan_ledger
from darts_async.topology.run_files import JOURNAL_FILE, LEDGER_FILE
from tests.support.launched import LaunchedRun

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
        assert "1 line of metrics.jsonl cannot be read and skipped" in " ".join(run.output.split())


def test_a_run_is_taken_up_from_its_newest_checkpoint_when_that_is_asked_for(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=40, checkpoint_every=8)) as run:
        run.wait_for_steps(20)
        run.kill_all()
        run.resume("--from-checkpoint")
        assert run.end() == 0, run.output
        assert run.assert_clean()["num_steps"] == 40
        assert "records are void" in run.verb("audit", str(run.run_dir)).stdout


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


def checkpoints(run: LaunchedRun) -> list[Path]:
    """Those that are there, damaged or not, the oldest first."""
    return sorted(path for path in (run.run_dir / "checkpoints").glob("step-*") if path.suffix != ".damaged")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def records(run: LaunchedRun, kind: type[AnyRecord]) -> list[AnyRecord]:
    return [record for record in read_ledger(run.run_dir / LEDGER_FILE) if isinstance(record, kind)]


def test_a_killed_run_goes_on_whatever_file_of_its_newest_checkpoint_is_damaged(tmp_path: Path) -> None:
    """One bit of each file in turn: every time the run goes on from the checkpoint before, with the same groups."""
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=120, checkpoint_every=10)) as run:
        run.wait_for_steps(1)
        names = ["model.safetensors", "trainer-00001-of-00001.safetensors", "manifest.json", "shaper.state"]
        for name in names:
            known = int(checkpoints(run)[-1].name[5:]) if checkpoints(run) else 0
            run.wait_until(lambda v=known: len(checkpoints(run)) == 2 and int(checkpoints(run)[-1].name[5:]) > v)  # type: ignore[misc]
            run.kill_all()
            older, newest = checkpoints(run)
            flip_a_bit(newest / name)
            run.resume()
            version = int(older.name[5:])
            run.wait_until(lambda v=version: LearnerRewound(v) in records(run, LearnerRewound))  # type: ignore[misc]
        assert run.end() == 0, run.output
        assert run.assert_clean()["num_steps"] == 120
        assert not scan_ledger(run.run_dir / LEDGER_FILE).counted.num_void, "no group was asked for again"


def test_a_live_learner_comes_back_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=60, checkpoint_every=10)) as run:
        run.wait_for_steps(1)
        run.wait_until(lambda: len(checkpoints(run)) == 2)
        older, newest = checkpoints(run)
        (newest / "manifest.json").unlink()
        run.kill("learner/0")
        assert run.end() == 0, run.output
        assert {event["process"] for event in run.events("ended")} == {"learner/0"}
        assert run.assert_clean()["num_steps"] == 60
        assert LearnerRewound(int(older.name[5:])) in records(run, LearnerRewound)


def test_a_run_whose_checkpoints_are_found_damaged_one_after_the_other_takes_itself_up_again(tmp_path: Path) -> None:
    """Its life has begun with a checkpoint, and no group before that is known in it."""
    sections = settings(steps=100, checkpoint_every=20)
    sections["learner"]["keep_checkpoints"] = 3
    with LaunchedRun(tmp_path, "scripted.yaml", sections) as run:
        run.wait_for_steps(1)
        run.wait_until(lambda: len(checkpoints(run)) == 2)
        run.kill_all()
        (run.run_dir / JOURNAL_FILE).unlink()
        older = checkpoints(run)[0]
        run.resume()
        wait_for_new_steps(run, 2)
        for later in checkpoints(run)[1:]:
            flip_a_bit(later / "model.safetensors")
        run.kill("learner/0")
        assert run.end() == 0, run.output
        assert run.assert_clean()["num_steps"] == 100
        assert [event["life"] for event in run.events("resumed")] == [2, 3]
        assert "all processes are ended, and the run is resumed" in " ".join(run.output.split())
        assert int(older.name[5:]) in {record.num_steps for record in records(run, RunReopened)}  # type: ignore[union-attr]


def test_a_run_without_a_whole_checkpoint_is_refused_and_starts_over_when_they_are_removed(tmp_path: Path) -> None:
    sections = settings(steps=30, checkpoint_every=8)
    sections["learner"]["keep_checkpoints"] = 1
    sections["roles"]["learner"] = {"restart": {"backoff": {"initial_s": 0.1, "max_s": 0.2}, "intensity": {"max": 1}}}
    with LaunchedRun(tmp_path, "scripted.yaml", sections) as run:
        run.wait_until(lambda: len(steps_taken(run)) > 18)
        run.kill_all()
        [only] = checkpoints(run)
        flip_a_bit(only / "model.safetensors")
        run.resume()
        assert run.end() == 1, run.output
        assert "remove them to start over" in run.output.replace("\n", " ")
        shutil.rmtree(run.run_dir / "checkpoints")
        run.resume()
        assert run.end() == 0, run.output
        assert run.assert_clean()["num_steps"] == 30
        assert scan_ledger(run.run_dir / LEDGER_FILE).counted.num_void > 0
