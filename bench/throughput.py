"""How fast is a run, and where does the time go?

    python -m bench.throughput cluster.yaml [--compare OTHER.yaml] [--steps 40] [--skip 8] [--repeats 3]
                               [--baseline FILE.json] [--ratio 0.9] [--out DIR]

Launches the cluster as `darts-launch` does, for so many steps, and measures from the end of step `skip` on: starting,
compiling and the first evaluation are left out, and so are the last steps, for which nothing is launched any more. With
`--compare` the two take turns, so that a machine that gets slower is not taken for a configuration that is. With
`--baseline`, numbers that an earlier call has written, it ends with exit code 1 where a rate is below `ratio` times
what it was.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec
import yaml

from bench.charts import draw_shares, for_plots
from bench.measured import SCHEMA, Measured, launch, measure
from bench.results import conditions, keep, kept, spread
from darts_async.errors import ConfigError
from launcher.config_file import load_config

Results = dict[str, list[Measured]]
"""By configuration, in order: one for each repeat."""
PLOT = "throughput.png"

RATES: dict[str, Callable[[Measured], float]] = {
    "tokens/s decoded": lambda m: m.num_decoded / m.window_s,
    "tokens/s trained": lambda m: m.num_trained / m.window_s,
    "steps/h": lambda m: m.num_steps / m.window_s * 3600,
}
"""More is better, and a baseline holds them."""
ROWS: dict[str, tuple[Callable[[Measured], float], str]] = {
    **{name: (rate, ",.0f") for name, rate in RATES.items()},
    "decoded / trained": (lambda m: m.num_decoded / m.num_trained, ".2f"),
    "reward of trained samples": (lambda m: m.reward, ".3f"),
    "staleness, mean": (lambda m: m.staleness_mean, ".2f"),
    "staleness, max": (lambda m: m.staleness_max, ".0f"),
    "decoding held by an update, median, ms": (lambda m: m.stalls_s[0] * 1e3, ".1f"),
    "decoding held by an update, longest, ms": (lambda m: m.stalls_s[1] * 1e3, ".1f"),
    "cancel to freed slot, median, ms": (lambda m: (m.cancels_s or (math.nan, math.nan))[0] * 1e3, ".1f"),
    "cancel to freed slot, 99th percentile, ms": (lambda m: (m.cancels_s or (math.nan, math.nan))[1] * 1e3, ".1f"),
    "generator idle": (lambda m: m.mean("generator", "idle"), ".1%"),
    "generator slots used": (lambda m: m.mean("generator", "slots"), ".0%"),
    "learner idle": (lambda m: m.mean("learner", "idle"), ".1%"),
    "learner waits for groups": (lambda m: m.wait("learner", "waits for groups"), ".1%"),
    "learner waits for publishing": (lambda m: m.wait("learner", "waits for publishing"), ".1%"),
    "reward idle": (lambda m: m.mean("reward", "idle"), ".1%"),
    "shaper busy": (lambda m: m.mean("shaper", "busy"), ".1%"),
    "event loop held, longest, ms": (lambda m: m.largest("loop_lag_max_s") * 1e3, ".0f"),
    "memory of all processes, MB": (lambda m: sum(use.memory_max_mb for use in m.processes.values()), ",.0f"),
}


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    arguments = parse_arguments()
    try:
        baseline = None if arguments.baseline is None else read_results(arguments.baseline)
        results = run(arguments)
        text = report(results, arguments)
        print(text)
        if arguments.out:
            write(arguments.out, text, results)
        ratios = [] if baseline is None else against(results, baseline)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    for ratio, words in ratios:
        print(f"{words}{f': below {arguments.ratio:g}' if ratio < arguments.ratio else ''}", file=sys.stderr)
    sys.exit(1 if any(ratio < arguments.ratio for ratio, _ in ratios) else 0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--compare", type=Path, help="another cluster.yaml, in turns with the first")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=8, help="steps at the beginning that are left out, 1 or more")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--baseline", type=Path, help="throughput.json of an earlier call")
    parser.add_argument("--ratio", type=float, default=0.9, help="of the baseline, below which a rate has regressed")
    parser.add_argument("--out", type=for_plots, help="directory for throughput.md, .json and .png")
    arguments = parser.parse_args()
    if not 1 <= arguments.skip < arguments.steps:
        parser.error(f"--skip {arguments.skip} must be at least 1 and below --steps ({arguments.steps})")
    return arguments


def run(arguments: argparse.Namespace) -> Results:
    """Every configuration in turn, again and again."""
    paths = [arguments.config, *([arguments.compare] if arguments.compare else [])]
    names = names_of(paths)
    all_settings = [settings_of(path, arguments.steps) for path in paths]
    results: Results = {name: [] for name in names}
    for repeat in range(arguments.repeats):
        for name, settings in zip(names, all_settings, strict=True):
            with tempfile.TemporaryDirectory() as home:
                results[name].append(measure(launch(settings, Path(home)), arguments.skip))
            print(f"{name}, {repeat + 1} of {arguments.repeats}", file=sys.stderr)
    return results


def names_of(paths: Sequence[Path]) -> list[str]:
    """What the configurations are called: by their files, and by their directories where these have one name."""
    names = [path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path.with_suffix("")) for path in paths]


def settings_of(path: Path, num_steps: int) -> dict[str, Any]:
    """What is in a cluster.yaml, for so many steps. Raises `ConfigError` if it cannot be run."""
    load_config(path)
    settings: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    return settings | {"learner": (settings.get("learner") or {}) | {"steps": num_steps}}


def against(results: Results, baseline: Results) -> list[tuple[float, str]]:
    """Each rate over the baseline's, lowest first, and in words. Raises `ConfigError` if the baseline has none of these
    runs."""
    if not results.keys() & baseline.keys():
        raise ConfigError(f"the baseline is of {', '.join(baseline)}, and this is of {', '.join(results)}")
    found = []
    for name in results.keys() & baseline.keys():
        for rate, of in RATES.items():
            now, before = (median(map(of, each[name])) for each in (results, baseline))
            found.append(
                (now / before, f"{name}: {rate} {now:,.0f}, {now / before:.2f} of the baseline's {before:,.0f}")
            )
    return sorted(found)


class Kept(msgspec.Struct):
    """What `write` leaves."""

    runs: Results


def read_results(path: Path) -> Results:
    """What `write` has written. Raises `ConfigError` for anything else."""
    return kept(path, Kept, SCHEMA).runs


def write(directory: Path, text: str, results: Results) -> None:
    """The table, the numbers and the picture."""
    keep(directory, "throughput", text, {"runs": msgspec.to_builtins(results)}, schema=SCHEMA)
    draw_shares(directory / PLOT, {name: shares_of(runs) for name, runs in results.items()})


def shares_of(runs: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """What each process did, in the mean of the runs."""
    return {
        name: {part: fmean(getattr(each.processes[name], part) for each in runs) for part in ("busy", "idle", "away")}
        for name in runs[-1].processes
    }


def report(results: Results, arguments: argparse.Namespace) -> str:
    """One table side by side, and one of the processes of each."""
    lines = [
        "# Throughput",
        "",
        f"{conditions('throughput')} Medians of {arguments.repeats}, with half of the range.",
        "",
        f"![what each process did]({PLOT})",
        "",
        f"| | {' | '.join(results)} |",
        "|" + "---|" * (len(results) + 1),
    ]
    for title, (of, style) in ROWS.items():
        values = [cell([of(each) for each in runs], style) for runs in results.values()]
        lines.append(f"| {title} | {' | '.join(values)} |")
    outcomes = dict.fromkeys(
        outcome for runs in results.values() for each in runs for outcome in each.tokens_by_outcome
    )
    for outcome in outcomes:
        shares = [outcome_share(runs, outcome) for runs in results.values()]
        lines.append(f"| tokens {outcome}, of the whole run | {' | '.join(shares)} |")
    for name, runs in results.items():
        lines += ["", f"## {name}: the last run, by process", "", *by_process(runs[-1].processes)]
    return "\n".join(lines) + "\n"


def cell(values: Sequence[float], style: str) -> str:
    """A dash where there was nothing to measure."""
    return "-" if any(map(math.isnan, values)) else spread(values, style)


def outcome_share(runs: Sequence[Measured], outcome: str) -> str:
    """Of all tokens of a run."""
    return spread(
        [each.tokens_by_outcome.get(outcome, 0) / sum(each.tokens_by_outcome.values()) for each in runs], ".1%"
    )


def by_process(processes: Mapping[str, Any]) -> list[str]:
    """Shares of the window."""
    lines = ["| process | busy | idle | away | by stage | memory, MB |", "|---|---|---|---|---|---|"]
    for name, use in processes.items():
        stages = " · ".join(f"{stage} {share:.1%}" for stage, share in (use.stages | use.waits).items())
        lines.append(
            f"| {name} | {use.busy:.1%} | {use.idle:.1%} | {use.away:.1%} | {stages} | {use.memory_max_mb:,.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
