"""How long is a process away that was killed, by role, forked or not?

    python -m bench.away [--config quickstart.yaml] [--rounds 2] [--kills 3] [--out FILE.md]

A run with warm starts and one without (`nodes[].warm_start`), in turns. In each, one process of each role is killed,
again and again, one at a time, and the launcher says how long it was away: from its death until it serves again, its
backoff (0.1 s here) included. The first line of the table is the time from the start of the launcher's run until the
first step was trained on.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import conditions
from darts_async.topology.roles import ROLES
from tests.support.launched import LaunchedRun

START = "first step of a run"
VICTIMS = tuple(role.first for role in ROLES)
MODES = {"forked": True, "not forked": False}
Times = dict[str, dict[str, list[float]]]


def main() -> None:
    """Run, kill, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart.yaml", help="a file of launcher/configs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3, help="of each role, in each run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    times: Times = {mode: defaultdict(list) for mode in MODES}
    for _ in range(arguments.rounds):
        for mode, is_warm in MODES.items():
            measure(arguments.config, arguments.kills, times[mode], is_warm=is_warm)
    text = table(times, arguments.config)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def settings(*, is_warm: bool) -> dict[str, Any]:
    """A run without an end, whose processes come back at once."""
    restart = {"backoff": {"initial_s": 0.1, "max_s": 0.1}, "intensity": {"max": 1000}}
    return {
        "nodes": [{"name": "local", "warm_start": is_warm}],
        "roles": {role.name: {"restart": restart} for role in ROLES},
        "learner": {"steps": 100_000, "checkpoint_every": 1},
        "evaluation": {"samples_per_prompt": 0},
    }


def measure(config: str, num_kills: int, times: dict[str, list[float]], *, is_warm: bool) -> None:
    """One run: `times` gets a time for each kill, and that of the start."""
    with tempfile.TemporaryDirectory() as home, LaunchedRun(Path(home), config, settings(is_warm=is_warm)) as run:
        run.wait_for_steps(1)
        times[START].append(float(run.lines("metrics.jsonl")[0]["elapsed_s"]))
        for incarnation in range(2, num_kills + 2):
            for victim in VICTIMS:
                run.kill(victim)
                run.wait_for_service(victim, incarnation)
        for event in run.events("serves"):
            if event["incarnation"] > 1:
                times[event["process"]].append(float(event["away_s"]))
        stopped = run.verb("down")
        assert stopped.returncode == 0, stopped.stderr
        assert run.end() == 130, run.output
        run.assert_clean()


def table(times: Times, config: str) -> str:
    """The medians and the ranges as Markdown."""
    lines = [conditions("away"), "", f"`{config}`", "", f"| | {' | '.join(times)} | ratio |", "|---|---|---|---|"]
    for name in (START, *VICTIMS):
        ours = [of_mode[name] for of_mode in times.values()]
        lines.append(f"| {name} | {' | '.join(map(_shown, ours))} | {median(ours[1]) / median(ours[0]):.1f} |")
    lines += ["", "Median (lowest to highest), seconds. After each run `darts-launch audit` found nothing."]
    return "\n".join(lines) + "\n"


def _shown(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
