"""The learner dies, hangs and is restarted in live runs of real processes: every step is trained once in the end."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from darts_async.learner.checkpoints import checkpoint
from darts_async.shaper.ledger import AnyRecord, LearnerRewound, StepCommitted, read_ledger
from tests.support.launched import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAST = {"backoff": {"initial_s": 0.1, "max_s": 0.5}, "intensity": {"max": 20}}


def settings(steps: int, checkpoint_every: int, ranks: int = 1) -> dict[str, Any]:
    return {
        "roles": {"learner": {"replicas": ranks, "restart": FAST}},
        "learner": {"steps": steps, "checkpoint_every": checkpoint_every, "groups_per_step": 2},
        "telemetry": {"status_every_s": 0.1},
    }


def ledger(run: LaunchedRun) -> list[AnyRecord]:
    return list(read_ledger(run.run_dir / "ledger.msgpack"))


def assert_complete(run: LaunchedRun, steps: int) -> None:
    """The audit is clean, and the model that is left is the one after the last step."""
    summary = run.assert_clean()
    assert (summary["status"], summary["num_steps"]) == ("finished", steps)
    last = run.run_dir / "checkpoints" / f"step-{steps:06d}"
    assert checkpoint.read_manifest(last).policy_version == steps
    left, saved = (load_file(path / "model.safetensors") for path in (run.run_dir / "model", last))
    assert all(tensor.equal(saved[name]) for name, tensor in left.items())


@pytest.mark.parametrize(
    ("fault", "checkpoint_every", "rewound"),
    [
        ("before_step:6", 4, {0, 4}),
        ("before_commit:3", 100, {0}),
        ("before_commit:10", 4, {4, 8}),
        ("before_publish:1", 4, set()),
        ("before_publish:8", 4, {0, 4}),
        ("before_saved:3", 4, set()),
    ],
)
def test_a_run_survives_the_death_of_its_learner_at_any_point(
    tmp_path: Path, fault: str, checkpoint_every: int, rewound: set[int]
) -> None:
    """It goes back to the last checkpoint, or to the one before if that was still being written."""
    with LaunchedRun(tmp_path, "scripted.yaml", settings(10, checkpoint_every), f"crash learner.{fault}") as run:
        assert run.end() == 0, run.output
        [ended] = run.events("ended")
        assert (ended["process"], ended["code"]) == ("learner/0", -signal.SIGKILL)
        assert_complete(run, 10)
        assert {r.policy_version for r in ledger(run) if isinstance(r, LearnerRewound)} <= rewound


def test_a_run_survives_kills_of_its_learner_at_random_times_and_generators_stay_up(tmp_path: Path) -> None:
    rng = random.Random(5)
    with LaunchedRun(tmp_path, "scripted.yaml", settings(30, checkpoint_every=6)) as run:
        for incarnation, step in enumerate(sorted(rng.sample(range(1, 26), 3)), start=1):
            run.wait_for_steps(step)
            run.wait_until(lambda n=incarnation: num_started(run, "learner/0") >= n)  # type: ignore[misc]
            run.kill("learner/0")
        assert run.end() == 0, run.output
        assert {event["process"] for event in run.events("ended")} == {"learner/0"}
        assert {event["incarnation"] for event in run.events("started") if event["process"] != "learner/0"} == {1}
        assert_complete(run, 30)
        steps = [record.step for record in ledger(run) if isinstance(record, StepCommitted)]
        assert len(steps) > 30, "some were taken again"


def num_started(run: LaunchedRun, name: str) -> int:
    return sum(event["process"] == name for event in run.events("started"))


def test_a_learner_that_hangs_is_found_killed_and_restarted(tmp_path: Path) -> None:
    sections = settings(8, checkpoint_every=3)
    sections["roles"]["learner"]["restart"] = FAST | {"silent_after_s": 5.0}
    with LaunchedRun(tmp_path, "scripted.yaml", sections, "freeze learner.before_step:6") as run:
        assert run.end() == 0, run.output
        assert "silent_after_s" in run.events("hangs")[0]["reason"]
        assert_complete(run, 8)
        assert any(isinstance(record, LearnerRewound) for record in ledger(run))


def test_all_ranks_come_back_when_one_is_killed_or_restarted_by_hand(tmp_path: Path) -> None:
    ranks = ["learner/0", "learner/1"]
    with LaunchedRun(tmp_path, "scripted.yaml", settings(40, checkpoint_every=3, ranks=2)) as run:
        run.wait_for_steps(4)
        run.kill("learner/1")
        for name in ranks:
            run.wait_for_service(name, 2)
        by_hand = run.verb("restart", "learner")
        assert by_hand.returncode == 0, by_hand.stderr
        for name in ranks:
            run.wait_for_service(name, 3)
        state = json.loads(run.verb("status", "--json").stdout)
        assert {row["name"]: row["restarts"] for row in state["processes"] if row["name"] in ranks} == dict.fromkeys(
            ranks, 2
        )
        assert run.end() == 0, run.output
        assert_complete(run, 40)


def test_the_real_model_learns_across_the_death_of_its_learner(tmp_path: Path) -> None:
    sections = settings(8, checkpoint_every=3) | {"prompts": {"num_train": 64, "held_out": 8}}
    sections["learner"] |= {"groups_per_step": 4}
    with LaunchedRun(tmp_path, "quickstart.yaml", sections, "crash learner.before_step:6") as run:
        assert run.end() == 0, run.output
        assert [event["process"] for event in run.events("ended")] == ["learner/0"]
        assert_complete(run, 8)
        assert any(isinstance(record, LearnerRewound) for record in ledger(run))
