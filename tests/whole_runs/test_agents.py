"""The agent of a node, its keeper and the launcher die in live runs of real processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.launched import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RESTART = {"backoff": {"initial_s": 0.1, "max_s": 1.0}, "intensity": {"max": 50}}
ROLES = ("generator", "reward", "shaper", "learner")


def settings(steps: int) -> dict[str, Any]:
    return {
        "roles": {role: {"restart": RESTART} for role in ROLES},
        "learner": {"steps": steps, "checkpoint_every": 3},
        "telemetry": {"status_every_s": 0.1},
    }


def node_of(run: LaunchedRun) -> dict[str, Any]:
    node: dict[str, Any] = json.loads((run.run_dir / "nodes" / "local.json").read_text())
    return node


def agents_of(run: LaunchedRun) -> list[int]:
    """The incarnations that were heard of. On a busy machine one may fall silent, and be heard of again."""
    return sorted({event["agent_incarnation"] for event in run.events("node_up")})


def test_nothing_in_a_run_notices_that_an_agent_dies_and_is_followed_by_another(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=10_000)) as run:
        for number in (1, 2):
            run.wait_for_steps(3 * number)
            os.kill(node_of(run)["agent"]["pid"], signal.SIGKILL)
            run.wait_until(lambda number=number: agents_of(run) == list(range(1, number + 2)))  # type: ignore[misc]
        assert json.loads(run.verb("status", "--json").stdout)["nodes"] == [
            {"name": "local", "state": "up", "agent_incarnation": 3, "keeper_pid": node_of(run)["keeper"]["pid"]}
        ]
        restarted = run.verb("restart", "agent/local")
        assert restarted.returncode == 0, restarted.stderr
        run.wait_until(lambda: agents_of(run) == [1, 2, 3, 4])
        reward = run.kill("reward/0")  # the last agent reports it and starts the next one
        run.wait_for_service("reward/0", reward + 1)
        assert run.verb("down").returncode == 0
        assert run.end() == 130, run.output
        assert [event["process"] for event in run.events("ended")] == ["reward/0"]
        assert agents_of(run) == [1, 2, 3, 4]
        run.assert_clean()


def test_a_run_survives_the_death_of_a_keeper_with_everything_on_its_node(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=30)) as run:
        run.wait_for_steps(7)
        os.kill(node_of(run)["keeper"]["pid"], signal.SIGKILL)
        assert run.end() == 0, run.output
        everyone = {"shaper/0", "learner/0", "reward/0", "generator/0", "generator/1"}
        assert {event["process"] for event in run.events("ended")} >= everyone
        [lost] = run.events("node_lost")
        assert lost["reason"] == "its keeper has ended by SIGKILL"
        run.assert_clean()


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=10_000)) as run:
        run.wait_for_steps(2)
        node = node_of(run)
        pids = [node["keeper"]["pid"], node["agent"]["pid"], *(event["pid"] for event in run.events("started"))]
        processes = [psutil.Process(pid) for pid in pids]
        run.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
