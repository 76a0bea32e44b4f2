"""Is anything lost when processes are killed, and how long are they away? Whole runs of real processes.

    python -m bench.faults [--kills 200] [--kills-per-run 20] [--engine scripted | embedded]
        [--hardships all | none | NAME ...] [--seed 0] [--out FILE.md]

Every process of a run is killed (SIGKILL): its first incarnation at a named point of `darts_async.faults`, where the
points that were seen least come first, and then whoever it is at random times. Every second run has a learner of two
ranks. A run whose launcher dies is resumed. Each goes to its last step and is then audited. `away` is the time from
the end of a process until it reports that it does its work again, the first back-off of 0.1 s, the start of Python
and the catch-up with the weights included; of an agent and a keeper, until the next one is heard; of the launcher,
until the resumed run takes a step. A run that fails, or an audit that finds something, is a line in the table and
exit code 1.

Between the kills come hardships, of which each run gets some in turn: see `bench.hardships`. What must hold after them
is what holds without: the run goes to its last step, its audit finds nothing, and every token that an engine has
decoded and that the shaper still knows of has one outcome. Tokens whose records went with the ends of files are neither
among those decoded nor among those accounted for. The lines of steps of such files may be gone from `metrics.jsonl`.

With the embedded engine a run of the same seed without kills goes before each, and their models are compared.
"""

import argparse
import contextlib
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.hardships import HARDSHIPS, rotated, rows
from bench.ordeal import AGENT, KEEPER, LAUNCHER, RUN_ENDS_WITHIN_S, Ordeal, Results, is_finished, prepared
from bench.results import conditions
from darts_async.faults import POINTS, VARIABLE
from tests.support.launched import LaunchedRun
from tests.support.small_disk import why_not

RESTART = {
    "backoff": {"initial_s": 0.1, "max_s": 1.0},
    "intensity": {"max": 1000},
    "silent_after_s": 20.0,
    "stalled_after_s": 30.0,
}
WORKERS = ("generator/0", "generator/1", "reward/0", "reward/1", "shaper/0", "learner/0")
PASSINGS = {
    "agent": (1, 8),
    "shaper": (1, 60),
    "reward": (1, 60),
    "generator": (1, 20),
    "learner": (1, 12),
    "rank": (1, 12),
    "keeper": (8, 12),
    "launcher": (14, 30),
}
"""A point is armed for a passing in this range: a keeper and a launcher are to see the run begin."""
SELDOM = {
    "shaper.before_new_journal": (1, 1),
    "learner.before_manifest": (1, 1),
    "learner.before_place": (1, 1),
    "learner.before_saved": (1, 1),
    "rank.before_part": (1, 1),
    "keeper.before_left": (2, 4),
}
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "scripted": (
        "scripted.yaml",
        {
            "shaping": {"rule": "survivor", "launch": 6, "keep": 4},
            "generator": {"script": {"token_latency_s": 0.004}},
        },
    ),
    "embedded": ("quickstart.yaml", {"learner": {"groups_per_step": 8}, "prompts": {"num_train": 512}}),
}
STEPS_PER_KILL = {"scripted": 12, "embedded": 6}
STEPS_PER_HARDSHIP = 40


def main() -> None:
    """Run until there were enough kills, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--kills-per-run", type=int, default=20, help="at random, 0 for none; those at named points come on top"
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="scripted")
    parser.add_argument(
        "--hardships", nargs="*", choices=("all", "none", *HARDSHIPS), default=[], help="all with the scripted engine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results, rng, text = Results(), random.Random(arguments.seed), ""
    hardships, missing = chosen(arguments.hardships, arguments.engine)
    while results.num_kills < arguments.kills and len(results.failures) < 3:
        present = rotated(hardships, results.num_runs)
        one_run(arguments.engine, arguments.kills_per_run, present, arguments.seed + results.num_runs, rng, results)
        results.num_runs += 1
        print(f"run {results.num_runs}: {results.num_kills} kills, {len(results.failures)} failures", flush=True)
        text = table(results, missing)
        if arguments.out:  # after each run: what there is stands, whenever somebody stops this
            arguments.out.write_text(text)
    print(text)
    sys.exit(1 if results.failures else 0)


def one_run(
    engine: str, num_kills: int, hardships: tuple[str, ...], seed: int, rng: random.Random, results: Results
) -> None:
    """A run with so many kills and these hardships in it, and one without where models are compared."""
    base, sections = ENGINES[engine]
    num_ranks = 1 + results.num_runs % 2
    num_steps = STEPS_PER_KILL[engine] * max(num_kills, 2) + STEPS_PER_HARDSHIP * len(hardships)
    role = {"replicas": 2, "restart": RESTART}
    learner = {"replicas": num_ranks, "restart": RESTART}
    sections = sections | {
        "seed": seed,
        "roles": {"generator": role, "reward": role, "shaper": {"restart": RESTART}, "learner": learner},
        "learner": sections.get("learner", {}) | {"steps": num_steps, "checkpoint_every": 20},
        "telemetry": {"status_every_s": 0.05},
    }
    undisturbed = plain_run(base, sections) if engine == "embedded" else None
    victims, faults = armed(num_ranks, rng, results)
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        setting = stack.enter_context(prepared(home, hardships, num_steps - 1))
        run = stack.enter_context(LaunchedRun(home, base, sections | setting.sections, faults, setting.prefix))
        ordeal = Ordeal(run, setting, results, rng)
        try:
            ordeal.endure(victims, num_kills, hardships)
            summary = finished(run, results)
        except (AssertionError, subprocess.SubprocessError, psutil.Error) as error:
            blamed = [ordeal.present] if ordeal.present else ordeal.past
            for name in blamed:
                results.tolls[name].failed += 1
            results.failures.append(f"{', '.join(blamed)}: {faults}: {error}")
            print(f"  failed: {results.failures[-1]}", flush=True)
            return
        finally:
            for name in {each for each in (*ordeal.past, ordeal.present) if each is not None}:
                results.tolls[name].runs += 1
    before, after = summary["before"]["reward"], summary["after"]["reward"]
    if undisturbed is not None:
        results.rewards.append((before, undisturbed, after))


def armed(num_ranks: int, rng: random.Random, results: Results) -> tuple[tuple[str, ...], str]:
    """Who is killed, and the named points at which the first incarnations die."""
    ranks = ("learner/1",) if num_ranks > 1 else ()
    victims = (*WORKERS, *ranks, AGENT)
    with_all = (rng.choice((LAUNCHER, KEEPER)),) if results.num_runs % 3 == 0 else ()  # all others go down with these
    points = {name: least_seen(name, results, rng) for name in (*victims, *with_all)}
    return victims, ", ".join(f"crash {point}:{passing_of(point, rng)}@{name}" for name, point in points.items())


def chosen(words: Sequence[str], engine: str) -> tuple[tuple[str, ...], str]:
    """The hardships that are asked for and can be had, and in words what cannot."""
    if "none" in words or (not words and engine != "scripted"):
        return (), ""
    names = HARDSHIPS if not words or "all" in words else tuple(name for name in HARDSHIPS if name in words)
    if "full-disk" in names and (reason := why_not()) is not None:
        return tuple(name for name in names if name != "full-disk"), f"Without a full disk: {reason}."
    return names, ""


def plain_run(base: str, sections: dict[str, Any]) -> float:
    """The held-out reward after a run in which nobody is killed."""
    with tempfile.TemporaryDirectory() as home, LaunchedRun(Path(home), base, sections) as run:
        run.process.wait(RUN_ENDS_WITHIN_S)
        assert run.end() == 0, run.output
        return float(run.assert_clean()["after"]["reward"])


def least_seen(name: str, results: Results, rng: random.Random) -> str:
    """The named point of a process at which fewest have died, any of these."""
    role = "rank" if name == "learner/1" else name.partition("/")[0]
    points = [point for point in POINTS if point.startswith(f"{role}.")]
    return min(points, key=lambda point: (results.points[point], rng.random()))


def passing_of(point: str, rng: random.Random) -> int:
    """At which passing it dies."""
    return rng.randint(*SELDOM.get(point, PASSINGS[point.partition(".")[0]]))


def finished(run: LaunchedRun, results: Results) -> dict[str, Any]:
    """Take a run that is over into the results. Raises `AssertionError` if something is wrong with it."""
    logs = [run.output, *(path.read_text() for path in (run.run_dir / "logs").glob("*.out"))]
    lines = itertools.chain.from_iterable(log.splitlines() for log in logs)
    results.points.update(line.split()[3].partition(":")[0] for line in lines if line.startswith(f"{VARIABLE}: crash"))
    code = run.end()
    assert code == 0 or is_finished(run), f"exit code {code}: {run.output[-2000:]}"
    summary = run.assert_clean()
    results.num_samples += sum(summary["samples_by_outcome"].values())
    results.num_trained += summary["samples_by_outcome"]["trained"]
    results.of_ended_early += summary["tokens"]["of_ended_early"]
    return summary


def table(results: Results, missing: str = "") -> str:
    """The results as Markdown."""
    lines = [
        conditions("faults"),
        "",
        "| killed (SIGKILL) | at random | at a named point | away until it serves again: median | 90 % | longest |",
        "|---|---|---|---|---|---|",
    ]
    at_points: Counter[str] = Counter()
    for point, times in results.points.items():
        at_points["learner" if point.startswith("rank.") else point.partition(".")[0]] += times
    for role in sorted(results.kills | at_points):
        lines.append(f"| {role} | {results.kills[role]} | {at_points[role]} | {' | '.join(away(results, role))} |")
    lines += [
        "",
        "Named points: " + ", ".join(f"{point} {n}" for point, n in sorted(results.points.items())) + ".",
        "Not come to: " + (", ".join(point for point in POINTS if not results.points[point]) or "none") + ".",
        "",
        f"{results.num_kills} kills in {results.num_runs} runs, {len(results.failures)} failed, {results.num_resumed} "
        f"times resumed; {results.num_samples:,} samples drawn, each ended once; "
        f"{results.num_trained:,} trained, none twice, none over-stale (`darts-launch audit` of each run); "
        f"{results.of_ended_early:,} tokens were decoded by processes that were then killed.",
    ]
    lines += rows(results.tolls)
    if missing:
        lines += ["", missing]
    if results.rewards:
        lines += ["", *compared(results.rewards)]
    return "\n".join(lines + [f"\nFailure: {failure}" for failure in results.failures]) + "\n"


def away(results: Results, role: str) -> list[str]:
    """How long a role was away: median, 90 %, longest."""
    away_s = sorted(results.away_s[role])
    if len(away_s) < 2:
        return [f"{value:.1f} s" for value in away_s] + ["-"] * (3 - len(away_s))
    late_s = statistics.quantiles(away_s, n=10, method="inclusive")[-1]
    return [f"{value:.1f} s" for value in (statistics.median(away_s), late_s, away_s[-1])]


def compared(rewards: list[tuple[float, float, float]]) -> list[str]:
    """The models of runs with and without kills, held-out reward."""
    lines = ["| seed | before | after, nobody killed | after, with kills |", "|---|---|---|---|"]
    lines += [
        f"| {index} | {before:.3f} | {plain:.3f} | {killed:.3f} |"
        for index, (before, plain, killed) in enumerate(rewards)
    ]
    differences = [killed - plain for _, plain, killed in rewards]
    mean = f"Difference: {statistics.fmean(differences):+.3f} in the mean"
    if len(differences) > 1:
        mean += f", standard error {statistics.stdev(differences) / len(differences) ** 0.5:.3f}"
    return [*lines, "", mean + "."]


if __name__ == "__main__":
    main()
