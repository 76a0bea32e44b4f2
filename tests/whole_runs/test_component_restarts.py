"""Generators and reward processes die, hang and are restarted in live runs of real processes: nothing is lost."""

import contextlib
import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.launched import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAST = {
    "backoff": {"initial_s": 0.1, "max_s": 1.0},
    "intensity": {"max": 50},
    "silent_after_s": 2.5,
    "stalled_after_s": 4.0,
}


def settings(steps: int, replicas: int = 2, **restart: Any) -> dict[str, Any]:
    role = {"replicas": replicas, "restart": FAST | restart}
    return {
        "roles": {"generator": role, "reward": role},
        "learner": {"steps": steps, "checkpoint_every": 1000},
        "shaping": {"rule": "survivor", "launch": 6, "keep": 4, "shortest": 3, "longest": 1},
        "telemetry": {"status_every_s": 0.1},
    }


def victims(run: LaunchedRun) -> set[str]:
    return {event["process"] for event in run.events("ended")}


def traced_events(run: LaunchedRun) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads((run.run_dir / "trace.json").read_text())["traceEvents"]
    return events


def traced_lives(run: LaunchedRun, process: str) -> list[str]:
    events = traced_events(run)
    [number] = [e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == process]
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name" and e["pid"] == number}
    return [e["name"] for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (number, tracks["incarnations"])]


def traced_instants(run: LaunchedRun) -> set[str]:
    return {event["name"] for event in traced_events(run) if event["ph"] == "i"}


def traced_ways(run: LaunchedRun) -> set[tuple[str, ...]]:
    """The roles that the arrows of whole samples go through."""
    events = traced_events(run)
    roles = {e["pid"]: e["args"]["name"].partition("/")[0] for e in events if e["name"] == "process_name"}
    arrows: dict[int, list[tuple[float, str, str]]] = {}
    for event in events:
        if event.get("cat") == "sample":
            arrows.setdefault(event["id"], []).append((event["ts"], event["ph"], roles[event["pid"]]))
    ways = (sorted(arrow) for arrow in arrows.values())
    return {tuple(role for _, _, role in way) for way in ways if way[0][1] == "s" and way[-1][1] == "f"}


@pytest.mark.parametrize(
    "faults",
    [
        "crash generator.before_flush:10@generator/0, crash generator.before_swap:3@generator/1, "
        "crash reward.before_reply:20@reward/0, crash reward.before_score:30@reward/1",
        "crash generator.before_start:3@generator/0, crash generator.after_swap:2@generator/1, "
        "crash reward.before_reply:1@reward/1, crash reward.before_score:15@reward/0",
        "crash generator.after_swap:1@generator/0, crash generator.before_swap:1@generator/1, "
        "crash reward.before_score:1@reward/0, crash reward.before_reply:40@reward/1",
    ],
    ids=["in the middle", "about new work", "at the first chance"],
)
def test_a_run_survives_kills_at_any_point(tmp_path: Path, faults: str) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=25), faults) as run:
        assert run.end() == 0, run.output
        assert victims(run) == {"generator/0", "generator/1", "reward/0", "reward/1"}, "every fault has happened"
        assert all(event["code"] == -signal.SIGKILL for event in run.events("ended"))
        run.assert_clean()


def test_a_run_survives_kills_at_random_times(tmp_path: Path) -> None:
    rng = random.Random(11)
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=40)) as run:
        for step in sorted(rng.sample(range(1, 30), 5)):
            run.wait_for_steps(step)
            with contextlib.suppress(ProcessLookupError):  # dead still from the kill before
                run.kill(rng.choice(["generator/0", "generator/1", "reward/0", "reward/1"]))
        assert run.end() == 0, run.output
        assert len(run.events("ended")) >= 3, "some may have been hit twice before it was noticed"
        run.assert_clean()


def test_processes_that_hang_are_found_killed_and_restarted(tmp_path: Path) -> None:
    faults = "freeze generator.before_flush:20@generator/0, stall generator.step:80@generator/1"
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=60), faults) as run:
        assert run.end() == 0, run.output
        reasons = {event["process"]: event["reason"] for event in run.events("hangs")}
        assert "silent_after_s" in reasons["generator/0"]
        assert "stalled_after_s" in reasons["generator/1"]
        run.assert_clean()


def test_a_run_waits_for_the_return_of_its_only_generator_and_its_only_reward_process(tmp_path: Path) -> None:
    """Longer than a weight update waits for an answer of somebody who is there."""
    sections = settings(steps=12, replicas=1, backoff={"initial_s": 2.0, "max_s": 2.0})
    with LaunchedRun(tmp_path, "scripted.yaml", sections | {"weights": {"deadline_s": 1.0}}) as run:
        run.wait_for_steps(3)
        run.kill("generator/0")
        run.wait_for_service("generator/0", 2)
        run.kill("reward/0")
        run.wait_for_service("reward/0", 2)
        assert run.end() == 0, run.output
        summary = run.assert_clean()
        assert summary["tokens"]["of_ended_early"] > 0
        assert {row["name"]: row["restarts"] for row in summary["processes"]}["generator/0"] == 1


def test_samples_of_a_dead_generator_go_on_from_the_tokens_that_were_streamed(tmp_path: Path) -> None:
    """The scripted lengths are the same wherever a sample is decoded: so are the tokens, if none is decoded twice."""
    sections = settings(steps=4) | {"shaping": {"rule": "none", "launch": 4, "keep": 4}}
    totals = []
    for name, faults in (("calm", ""), ("hit", "crash generator.step:50@generator/0")):
        home = tmp_path / name
        home.mkdir()
        with LaunchedRun(home, "scripted.yaml", sections, faults) as run:
            assert run.end() == 0, run.output
            totals.append(run.assert_clean()["tokens"]["by_outcome"] | {"abandoned": 0})
            assert len(run.events("ended")) == (name == "hit")
    assert totals[0] == totals[1]


def test_a_run_goes_on_degraded_and_fails_below_min_healthy(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=10_000, when="never")) as run:
        run.wait_for_steps(3)
        run.kill("generator/1")
        run.wait_until(lambda: "the run continues without it" in run.output)
        run.wait_for_steps(len(run.lines("metrics.jsonl")) + 3)
        run.kill("generator/0")
        assert run.end() == 1, run.output
        assert "generator/0 was ended by SIGKILL" in run.output
        assert "min_healthy is 1" in run.output
        run.assert_clean()


def test_the_verbs_work_from_another_terminal(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", settings(steps=10_000)) as run:
        run.wait_for_steps(3)
        restarted = run.verb("restart", "generator/0")
        assert restarted.returncode == 0, restarted.stderr
        run.wait_for_service("generator/0", 2)
        [ended] = run.events("ended")
        assert (ended["process"], ended["code"]) == ("generator/0", 0), "it was asked, not killed"

        state = json.loads(run.verb("status", "--json").stdout)
        rows = {row["name"]: row for row in state["processes"]}
        assert (rows["generator/0"]["restarts"], rows["generator/1"]["restarts"]) == (1, 0)
        assert state["num_steps"] >= 3
        assert re.search(r"generator/0 .* 1\b", run.verb("status").stdout)

        refused = run.verb("restart", "generator/9")
        assert (refused.returncode, "there is no 'generator/9'" in refused.stderr) == (2, True), refused.stderr

        lines = run.verb("logs", "-n", "5", "generator").stdout.splitlines()
        assert any(re.match(r"generator/0  info ended uptime_s=", line) for line in lines), lines
        assert run.verb("logs", "cook").returncode == 2

        traced = run.verb("trace", str(run.run_dir), "--since", "0")
        assert re.search(r"generator/0 .* decode [1-9]", traced.stdout), traced.stdout + traced.stderr
        assert traced_lives(run, "generator/0") == ["#1", "#2"]
        assert {"restarted generator/0", "serves generator/0"} <= traced_instants(run)
        assert ("shaper", "generator", "generator", "reward", "shaper") in traced_ways(run)

        down = run.verb("down")
        assert (down.returncode, "stopped by darts-launch down" in down.stdout) == (0, True), down.stderr
        assert run.end() == 130, run.output
        run.assert_clean()

        for words in (["restart", "generator/0"], ["down"]):
            nobody = run.verb(*words)
            assert (nobody.returncode, "no run is live" in nobody.stderr) == (2, True), nobody.stderr
        over = run.verb("restart", "generator/0", str(run.run_dir))
        assert (over.returncode, "is not live: it stopped" in over.stderr) == (2, True), over.stderr
        assert "stopped by darts-launch down" in run.verb("status", str(run.run_dir)).stdout
        assert "generator/1" in run.verb("logs", "-f", "-n", "1", "generator/1", str(run.run_dir)).stdout


def test_the_real_engine_and_model_survive_too(tmp_path: Path) -> None:
    role = {"replicas": 2, "restart": FAST | {"silent_after_s": 20.0, "stalled_after_s": 30.0}}
    sections = {
        "roles": {"generator": role, "reward": role | {"replicas": 1}},
        "learner": {"steps": 10, "groups_per_step": 4, "checkpoint_every": 1000},
        "prompts": {"num_train": 64, "held_out": 8},
        "telemetry": {"status_every_s": 0.1},
    }
    with LaunchedRun(tmp_path, "quickstart.yaml", sections) as run:
        run.wait_for_steps(2)
        run.kill("generator/0")
        run.kill("reward/0")
        assert run.end() == 0, run.output
        assert {"generator/0", "reward/0"} <= victims(run)
        run.assert_clean()
