"""What does it cost to keep rollouts?

    python -m bench.rollouts [--steps N] [--pairs N] [--groups N] [--out DIR]

Whole runs of the quickstart in turn, with and without `telemetry.sample_groups`, so that what else the machine does
meanwhile falls on both alike. Samples per second are of the window in which the pipeline is full. Beside them the
processor time of the shaper for each sample, its thread included, and the bytes of the files for each sample that is
kept: these depend on the machine's other work much less.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench.measured import launch, measure, quickstart
from bench.results import conditions, keep, spread, table
from darts_async.errors import ConfigError
from darts_async.rollouts import read_rollouts
from darts_async.topology.roles import SHAPER
from darts_async.topology.run_files import LOGS_DIR, SAMPLES_DIR, log_path

SKIPPED_STEPS = 4


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    samples_per_s: float
    shaper_us: float
    """Processor time of the shaper for each sample of the run."""
    num_kept: int
    bytes_per_sample: float
    """Of those that were kept; 0 without any."""


def cost(num_groups: int, steps: int, seed: int) -> Cost:
    """One run. Raises `ConfigError` if it does not finish."""
    settings = quickstart()
    settings["seed"] = seed
    settings["learner"] |= {"steps": steps}
    settings["telemetry"] = {"sample_groups": num_groups}
    with tempfile.TemporaryDirectory() as home:
        run_dir = launch(settings, Path(home))
        measured = measure(run_dir, SKIPPED_STEPS)
        summary = json.loads((run_dir / "summary.json").read_text())
        files = list((run_dir / SAMPLES_DIR).glob("*"))
        num_kept = sum(len(read_rollouts(path)) for path in files)
        num_bytes = sum(path.stat().st_size for path in files)
        return Cost(
            samples_per_s=measured.num_groups * settings["shaping"]["launch"] / measured.window_s,
            shaper_us=_processor_s(run_dir) * 1e6 / sum(summary["samples_by_outcome"].values()),
            num_kept=num_kept,
            bytes_per_sample=num_bytes / num_kept if num_kept else 0.0,
        )


def _processor_s(run_dir: Path) -> float:
    """What the shaper says of itself at its end."""
    lines = [json.loads(line) for line in log_path(run_dir / LOGS_DIR, SHAPER.first).read_text().splitlines()]
    return float(next(line["cpu_s"] for line in reversed(lines) if line["event"] == "ended"))


def report(costs: dict[int, list[Cost]]) -> str:
    """A table with a row for each number of groups, and what it comes to."""
    rows = [
        [
            f"{num_groups}" if num_groups else "none",
            spread([each.samples_per_s for each in some], ".1f"),
            spread([each.shaper_us for each in some], ".0f"),
            f"{median(each.num_kept for each in some):,.0f}",
            spread([each.bytes_per_sample for each in some], ".0f"),
        ]
        for num_groups, some in costs.items()
    ]
    without, kept = costs[0], next(some for num_groups, some in costs.items() if num_groups)
    ratios = [one.samples_per_s / other.samples_per_s for one, other in zip(kept, without, strict=True)]
    titles = ["groups kept of a step", "samples/s", "shaper, us of processor per sample", "kept", "bytes per kept one"]
    lines = table(titles, rows)
    return "\n".join([*lines, "", f"With over without, pair by pair: {spread(ratios, '.3f')}", ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without, in turn")
    parser.add_argument("--groups", type=int, default=4, help="that are kept of each step, of 16")
    parser.add_argument("--out", type=Path, default=None, help="directory for the table and the numbers")
    arguments = parser.parse_args()
    costs: dict[int, list[Cost]] = {0: [], arguments.groups: []}
    try:
        for seed in range(arguments.pairs):
            for num_groups, some in sorted(costs.items(), reverse=bool(seed % 2)):
                some.append(cost(num_groups, arguments.steps, seed))
                sys.stderr.write(f"{num_groups} groups: {some[-1]}\n")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    text = f"# What keeping rollouts costs\n\n{conditions('rollouts')}\n\n{report(costs)}"
    sys.stdout.write(text)
    keep(arguments.out, "rollouts", text, {"costs": {n: [asdict(each) for each in some] for n, some in costs.items()}})


if __name__ == "__main__":
    main()
