"""The shaper dies or is restarted in live runs of real processes: nothing that was admitted is lost."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.launched import LaunchedRun
from tests.whole_runs.test_component_restarts import FAST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def settings(steps: int, **restart: Any) -> dict[str, Any]:
    role = {"restart": FAST | restart}
    return {
        "roles": {"generator": role | {"replicas": 2}, "reward": role | {"replicas": 2}, "shaper": role},
        "learner": {"steps": steps, "checkpoint_every": 1000},
        "shaping": {"rule": "survivor", "launch": 6, "keep": 4, "shortest": 3, "longest": 1},
        "telemetry": {"status_every_s": 0.1},
    }


def assert_whole(run: LaunchedRun, steps: int) -> None:
    """The audit is clean, the tokens add up, and every step and evaluation was reported."""
    summary = run.assert_clean()
    lines = run.lines("metrics.jsonl")
    assert {line["step"] for line in lines if line["type"] == "step" and "reward/mean" in line} == set(range(steps))
    assert {line["policy_version"] for line in lines if line["type"] == "evaluation"} == {0, steps}
    assert summary["num_steps"] == steps


@pytest.mark.parametrize(
    ("fault", "steps"),
    [("before_record:30", 20), ("before_ledger:30", 20), ("before_send:60", 20), ("before_new_journal:2", 60)],
)
def test_a_run_survives_the_death_of_its_shaper_at_any_point(tmp_path: Path, fault: str, steps: int) -> None:
    """A journal is renewed by its size, and has fewer inputs where the machine is slow."""
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=steps), f"crash shaper.{fault}") as run:
        assert run.end() == 0, run.output
        [ended] = run.events("ended")
        assert (ended["process"], ended["code"]) == ("shaper/0", -signal.SIGKILL), "the fault has happened"
        assert_whole(run, steps)


def test_a_run_survives_deaths_of_the_shaper_and_the_others_at_random_times(tmp_path: Path) -> None:
    rng = random.Random(5)
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=40)) as run:
        incarnation = 1
        for step in sorted(rng.sample(range(1, 30), 4)):
            run.wait_for_steps(step)
            if rng.random() < 0.5:
                run.kill(rng.choice(["generator/0", "reward/1"]))
            run.kill("shaper/0")
            incarnation += 1
            run.wait_for_service("shaper/0", incarnation)
        assert run.end() == 0, run.output
        assert sum(event["process"] == "shaper/0" for event in run.events("ended")) == 4
        assert_whole(run, 40)


def test_the_shaper_is_restarted_by_hand_and_the_run_goes_on(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=10_000)) as run:
        run.wait_for_steps(3)
        restarted = run.verb("restart", "shaper")
        assert restarted.returncode == 0, restarted.stderr
        run.wait_for_service("shaper/0", 2)
        [ended] = run.events("ended")
        assert (ended["process"], ended["code"]) == ("shaper/0", 0), "it was asked, not killed"
        run.wait_for_steps(len(run.lines("metrics.jsonl")) + 3)
        assert run.verb("down").returncode == 0
        assert run.end() == 130, run.output
        run.assert_clean()
