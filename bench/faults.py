"""Is anything lost when processes are killed, and how long are they away? Whole runs of real processes.

    python -m bench.faults [--kills 60] [--kills-per-run 10] [--engine scripted | embedded] [--seed 0] [--out FILE.md]

Every process of a run but the launcher and the keeper is killed (SIGKILL): its first incarnation at a named point of
`darts_async.faults`, drawn at random, and then whoever it is at random times. Each run goes to its last step and is
then audited. `away` is the time from the end of a process until it reports that it does its work again, the first
back-off of 0.1 s, the start of Python and the catch-up with the weights included; of an agent, until the next one is
heard. A run that fails, or an audit that finds something, is a line in the table and exit code 1.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from darts_async.faults import POINTS
from tests.launched import ROOT, LaunchedRun

RESTART = {
    "backoff": {"initial_s": 0.1, "max_s": 1.0},
    "intensity": {"max": 1000},
    "silent_after_s": 20.0,
    "stalled_after_s": 30.0,
}
RUN_ENDS_WITHIN_S = 900.0
"""After its last kill."""
AGENT = "agent/local"
PROCESSES = ("generator/0", "generator/1", "reward/0", "reward/1", "shaper/0", "learner/0", AGENT)
PASSINGS = {"agent": 8, "shaper": 60, "reward": 60, "generator": 20, "learner": 12}
"""A point is armed for a passing from 1 to this."""
SELDOM = {
    "shaper.before_new_journal": 1,
    "learner.before_manifest": 1,
    "learner.before_place": 1,
    "learner.before_saved": 1,
}
"""Points that are passed seldom: armed for the first."""
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "scripted": (
        "scripted.yaml",
        {
            "shaping": {"rule": "survivor", "launch": 6, "keep": 4},
            "generator": {"script": {"token_latency_s": 0.004}},
        },
    ),
    "embedded": ("quickstart.yaml", {"learner": {"groups_per_step": 8}, "prompts": {"num_train": 512, "held_out": 64}}),
}
STEPS_PER_KILL = {"scripted": 25, "embedded": 8}


@dataclass
class Results:
    """What came of all runs."""

    away_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kills: Counter[str] = field(default_factory=Counter)
    """At random times, by role."""
    points: Counter[str] = field(default_factory=Counter)
    """At named points."""
    num_samples: int = 0
    num_trained: int = 0
    of_ended_early: int = 0
    rewards: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Run until there were enough kills, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="scripted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results, rng, num_runs, text = Results(), random.Random(arguments.seed), 0, ""
    while (done := results.kills.total() + results.points.total()) < arguments.kills and len(results.failures) < 3:
        num_kills = min(arguments.kills_per_run, arguments.kills - done)
        with tempfile.TemporaryDirectory() as home:
            one_run(Path(home), arguments.engine, num_kills, arguments.seed + num_runs, rng, results)
        num_runs += 1
        done = results.kills.total() + results.points.total()
        print(f"run {num_runs}: {done} kills, {len(results.failures)} failures", flush=True)
        text = table(arguments, results, num_runs)
        if arguments.out:  # after each run: what there is stands, whenever somebody stops this
            arguments.out.write_text(text)
    print(text)
    sys.exit(1 if results.failures else 0)


def one_run(home: Path, engine: str, num_kills: int, seed: int, rng: random.Random, results: Results) -> None:
    """A run with so many kills in it."""
    base, sections = ENGINES[engine]
    role = {"replicas": 2, "restart": RESTART}
    steps = STEPS_PER_KILL[engine] * num_kills
    sections = sections | {
        "seed": seed,
        "roles": {"generator": role, "reward": role, "shaper": {"restart": RESTART}, "learner": {"restart": RESTART}},
        "learner": sections.get("learner", {}) | {"steps": steps, "checkpoint_every": 20},
        "telemetry": {"status_every_s": 0.05},
    }
    armed = {name: rng.choice(points_of(name)) for name in PROCESSES}
    faults = ", ".join(f"crash {point}:{passing_of(point, rng)}@{name}" for name, point in armed.items())
    killed: set[tuple[str, int]] = set()
    with LaunchedRun(home, base, sections, faults) as run:
        run.wait_for_steps(1)
        for _ in range(num_kills):
            time.sleep(rng.uniform(0.0, 1.5))
            if run.process.poll() is not None or run.lines("metrics.jsonl")[-1].get("step", 0) >= steps - 2:
                break
            name = rng.choice(PROCESSES)
            with contextlib.suppress(ProcessLookupError):  # it has died at its point, or of the kill before
                killed.add((name, kill(run, name)))
                results.kills[name.partition("/")[0]] += 1
        judge(run, results)
        count_points(run, armed, killed, results)


def points_of(name: str) -> list[str]:
    """The named points that a process passes."""
    role = name.partition("/")[0]
    return [point for point in POINTS if point.startswith(f"{role}.")]


def passing_of(point: str, rng: random.Random) -> int:
    """At which passing it dies."""
    return rng.randint(1, SELDOM.get(point, PASSINGS[point.partition(".")[0]]))


def kill(run: LaunchedRun, name: str) -> int:
    """SIGKILL to what a process is now; which incarnation that was."""
    if name != AGENT:
        return run.kill(name)
    agent = json.loads((run.run_dir / "nodes" / "local.json").read_text())["agent"]
    os.kill(agent["pid"], signal.SIGKILL)
    return int(agent["incarnation"])


def count_points(run: LaunchedRun, armed: dict[str, str], killed: set[tuple[str, int]], results: Results) -> None:
    """Which named points were come to, and how long everybody was away."""
    ended = {(e["process"], e["incarnation"]): e for e in run.events("ended")}
    for name, point in armed.items():
        is_killed = (name, 1) in killed
        has_died = (name, 1) in ended if name != AGENT else len(run.events("node_up")) > 1
        results.points[point] += has_died and not is_killed
    for event in run.events("serves"):
        results.away_s[event["process"].partition("/")[0]].append(event["away_s"])


def judge(run: LaunchedRun, results: Results) -> None:
    """Take a run that is over into the results."""
    try:
        run.process.wait(RUN_ENDS_WITHIN_S)
        code = run.end()
        assert code == 0, f"exit code {code}: {run.output[-2000:]}"
        summary = run.assert_clean()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        results.failures.append(str(error))
        return
    results.num_samples += sum(summary["samples_by_fate"].values())
    results.num_trained += summary["samples_by_fate"]["trained"]
    results.of_ended_early += summary["tokens"]["of_ended_early"]
    results.rewards.append((summary["before"]["reward"], summary["after"]["reward"]))


def table(arguments: argparse.Namespace, results: Results, num_runs: int) -> str:
    """The results as Markdown."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    command = f"python -m bench.faults --kills {arguments.kills} --engine {arguments.engine} --seed {arguments.seed}"
    lines = [
        f"`{command}`, commit {commit.stdout.strip()}, {os.cpu_count()} cores ({platform.machine()}), no GPU.",
        "",
        "| killed (SIGKILL) | at random | at a named point | away until it serves again: median | 90 % | longest |",
        "|---|---|---|---|---|---|",
    ]
    for role, times in sorted(results.kills.items()):
        away_s = sorted(results.away_s[role]) or [float("nan")]
        at_points = sum(n for point, n in results.points.items() if point.startswith(f"{role}."))
        late_s = away_s[int(0.9 * (len(away_s) - 1))]
        lines.append(
            f"| {role} | {times} | {at_points} | {median(away_s):.1f} s | {late_s:.1f} s | {away_s[-1]:.1f} s |"
        )
    lines += [
        "",
        "Named points: " + ", ".join(f"{point} {n}" for point, n in sorted(results.points.items()) if n) + ".",
        "",
        f"{num_runs} runs, {len(results.failures)} failed; {results.num_samples:,} samples drawn, each ended once; "
        f"{results.num_trained:,} trained, none twice, none over-stale (`darts-launch audit` of each run); "
        f"{results.of_ended_early:,} tokens were streamed by processes that were then killed.",
    ]
    if arguments.engine == "embedded" and results.rewards:
        pairs = ", ".join(f"{before:.3f} to {after:.3f}" for before, after in results.rewards)
        lines.append(f"Held-out reward before and after: {pairs}.")
    return "\n".join(lines + [f"\nFailure: {failure}" for failure in results.failures]) + "\n"


if __name__ == "__main__":
    main()
