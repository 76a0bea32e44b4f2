"""Which shaping arm helps on the quickstart's task? Whole runs of the real processes, from YAML alone.

    python -m bench.arms [--seeds 0 1 2] [--steps 60] [--arms none qlpo ...] [--out bench/results/arms.md]

Every arm runs the same file but for `shaping`; seeds are the outer loop, so arms are interleaved and a slow hour of the
machine hits all of them. Lengths and rewards are of fresh, un-aborted samples of the held-out prompts. Each number is
the median over the seeds, with the smallest and the largest behind it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from bench.measured import ROOT, launch
from bench.results import conditions
from darts_async.errors import ConfigError

QUICKSTART = ROOT / "launcher" / "configs" / "quickstart.yaml"

ARMS: dict[str, dict[str, Any]] = {
    "none": {"rule": "none", "launch": 8},
    "random 8 of 12": {"rule": "random", "launch": 12},
    "shortest 8 of 12": {"rule": "shortest", "launch": 12},
    "dual_end 7+1 of 12": {"rule": "dual_end", "launch": 12, "shortest": 7, "longest": 1},
    "survivor 6+2 of 12": {"rule": "survivor", "launch": 12, "shortest": 6, "longest": 2},
    "survivor 6+2, utility": {
        "rule": "survivor",
        "launch": 12,
        "shortest": 6,
        "longest": 2,
        "redundancy": {"total": "utility", "split": "paper"},
    },
    "qlpo 8 of 12": {"rule": "qlpo", "launch": 12},
}

COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float], str]] = {
    "reward before": (lambda s: s["before"]["reward"], ".3f"),
    "reward after": (lambda s: s["after"]["reward"], ".3f"),
    "length mean": (lambda s: s["after"]["length_mean"], ".1f"),
    "std in prompt": (lambda s: s["after"]["length_std_within_prompt"], ".1f"),
    "p99": (lambda s: s["after"]["length_p99"], ".0f"),
    "seconds": (lambda s: s["duration_s"], ".0f"),
    "decoded, k tokens": (lambda s: s["tokens"]["decoded"] / 1000, ".0f"),
    "trained": (lambda s: s["tokens"]["by_outcome"]["trained"] / s["tokens"]["decoded"], ".0%"),
    "cancelled": (lambda s: s["tokens"]["by_outcome"]["cancelled"] / s["tokens"]["decoded"], ".0%"),
    "filtered": (lambda s: s["tokens"]["by_outcome"]["filtered"] / s["tokens"]["decoded"], ".0%"),
}


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arguments.arms}
    try:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                results[arm].append(one_run(arm, seed, arguments.steps))
                print(f"seed {seed}  {arm}: {row(arm, results[arm][-1:])}", flush=True)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    text = report(results, arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """The summary of one run. Raises `ConfigError` with its last words if it failed."""
    settings: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
    settings |= {"seed": seed, "shaping": {"keep": 8} | ARMS[arm]}
    settings["learner"] |= {"steps": steps}
    with tempfile.TemporaryDirectory() as home:
        summary: dict[str, Any] = json.loads((launch(settings, Path(home)) / "summary.json").read_text())
        return summary


def row(arm: str, summaries: Sequence[dict[str, Any]]) -> str:
    """One line of the table."""
    cells = []
    for read, style in COLUMNS.values():
        values = [read(summary) for summary in summaries]
        spread = f" ({min(values):{style}}..{max(values):{style}})" if len(values) > 1 else ""
        cells.append(f"{median(values):{style}}{spread}")
    return f"| {arm} | " + " | ".join(cells) + " |"


def report(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    """The table with what it takes to read it."""
    lines = [
        "# Shaping arms on the quickstart's task",
        "",
        f"{conditions('arms')} {arguments.steps} steps of 16 groups; medians over "
        f"{len(arguments.seeds)} seeds, smallest and largest in brackets; arms interleaved within each seed.",
        "",
        "| arm | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(row(arm, summaries) for arm, summaries in results.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
