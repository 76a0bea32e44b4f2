"""Is anything lost when processes are killed, and how long are they away? Whole runs of real processes.

    python -m bench.faults [--kills 60] [--kills-per-run 10] [--engine scripted | embedded] [--seed 0] [--out FILE.md]

Generators, reward processes and the shaper are killed (SIGKILL) one at a time, at random, while all serve; each run
goes to its last step and is then audited. `away` is the time from the kill until the process reports that it does its
work again, the first back-off of 0.1 s, the start of Python and the catch-up with the weights included. A run that
fails, or an audit that finds something, is a line in the table and exit code 1.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.launched import ROOT, LaunchedRun

RESTART = {
    "backoff": {"initial_s": 0.1, "max_s": 1.0},
    "intensity": {"max": 1000},
    "silent_after_s": 20.0,
    "stalled_after_s": 30.0,
}
PROCESSES = ("generator/0", "generator/1", "reward/0", "reward/1", "shaper/0")
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
STEPS_PER_KILL = {"scripted": 50, "embedded": 8}


@dataclass
class Results:
    """What came of all runs."""

    away_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kills: Counter[str] = field(default_factory=Counter)
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
    while results.kills.total() < arguments.kills and len(results.failures) < 3:
        num_kills = min(arguments.kills_per_run, arguments.kills - results.kills.total())
        with tempfile.TemporaryDirectory() as home:
            one_run(Path(home), arguments.engine, num_kills, arguments.seed + num_runs, rng, results)
        num_runs += 1
        print(f"run {num_runs}: {results.kills.total()} kills, {len(results.failures)} failures", flush=True)
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
        "roles": {"generator": role, "reward": role, "shaper": {"restart": RESTART}},
        "learner": sections.get("learner", {}) | {"steps": steps, "checkpoint_every": 1000},
        "telemetry": {"status_every_s": 0.05},
    }
    with LaunchedRun(home, base, sections) as run:
        run.wait_for_steps(1)
        for _ in range(num_kills):
            time.sleep(rng.uniform(0.0, 1.0))
            if run.process.poll() is not None or run.lines("metrics.jsonl")[-1].get("step", 0) >= steps - 2:
                break
            name = rng.choice(PROCESSES)
            killed_s = time.monotonic()
            incarnation = run.kill(name)
            results.kills[name.partition("/")[0]] += 1
            try:
                run.wait_for_service(name, incarnation + 1)
            except AssertionError:
                break  # the run was over before it was back, or has failed: its end says which
            results.away_s[name.partition("/")[0]].append(time.monotonic() - killed_s)
        judge(run, results)


def judge(run: LaunchedRun, results: Results) -> None:
    """Take a run that is over into the results."""
    try:
        code = run.end()
        assert code == 0, f"exit code {code}: {run.output[-2000:]}"
        summary = run.assert_clean()
    except AssertionError as error:
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
        "| killed (SIGKILL) | times | away until it serves again: median | longest |",
        "|---|---|---|---|",
    ]
    for role, times in sorted(results.kills.items()):
        away_s = results.away_s[role] or [float("nan")]
        lines.append(f"| {role} | {times} | {median(away_s):.1f} s | {max(away_s):.1f} s |")
    lines += [
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
