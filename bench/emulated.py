"""How much sooner is a step on accelerators that are not there? The real processes, sockets and broadcasts.

    python -m bench.emulated [--trace PATH] [--workloads NAME ...] [--arms NAME ...] [--accelerators 8 16 64]
                             [--steps 16] [--seeds S ...] [--out DIR] [--resume]

Engines and the learner wait for as long as the accelerators of `bench.profiles` would take; everything else is what
runs in production. To make it short, one emulated token stands for K real ones, and a run goes K times faster than
real time (a large cluster slower than that: `slowed`): a decode step takes its real time, a run of hours takes minutes,
and what our own processes cost weighs K times what it would. So this is a lower bound of what is left of a speed-up.

Of a run the steps are measured in which the pipeline is full: those before, and the last, for which nothing is launched
any more, are taken beside the --steps. All arms of a seed run one after another on the same prompts and lengths, seeds
in turn. The policy is frozen: this is the schedule alone. Each run is simulated too, with the same settings and lengths
and processes that take no time: what the real ones take beyond that is theirs. Times and rates in the tables are of
real tokens on the real accelerators. Each run is written to --out as it ends; --resume takes over those that are there,
of other workloads and arms too.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.charts import draw_bars, for_plots
from bench.ideal import Ideal, simulated
from bench.measured import SCHEMA, Measured, draining, launch, measure
from bench.profiles import PROFILES, Profile
from bench.results import commit, conditions, keep, spread, taken_over
from bench.shaping import ARMS, BASELINE, KEEP, SYNTHETIC, from_trace
from darts_async.errors import ConfigError
from darts_async.simulation.demand import Workload

NAME = "emulated"
PLAIN = "asynchronous"
CHOSEN = (
    BASELINE,
    "synchronous, tail batching",
    PLAIN,
    "asynchronous, tail batching",
    "darts",
    "shortest",
    "survivor",
)
LAUNCH = 12
TOKENS_PER_TOKEN = {"heavy": 32}
"""K of a workload, if not this:"""
FEW_TOKENS = 16
NUM_PROMPTS = 512
COLUMNS = 16
PROMPT_TOKENS = 64
CAP = 1024 - PROMPT_TOKENS
"""The longest response in emulated tokens: prompts and vocabulary are those of a model made for 1,024 tokens."""
FILLING = 4
"""Steps at the beginning in which the pipeline fills, beside as many as there may be versions in flight."""
PLOT = "emulated.png"


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    arguments = parse_arguments()
    try:
        run(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help=".npz file with lengths and rewards [num_prompts, samples]")
    parser.add_argument("--workloads", nargs="*", choices=SYNTHETIC, default=["math", "heavy"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(CHOSEN))
    parser.add_argument("--accelerators", nargs="+", type=int, choices=PROFILES, default=[8])
    parser.add_argument("--steps", type=int, default=16, help="per run that are measured: others come before and after")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=for_plots, help="directory for emulated.md, .json and the plot")
    parser.add_argument("--resume", action="store_true", help="go on from the emulated.json that is in --out")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: give 1 or more")
    return arguments


class Run(msgspec.Struct, frozen=True):
    """One run of the real processes, and the same simulated."""

    found: Measured
    ideal: Ideal


class Cell(msgspec.Struct):
    """The runs of one arm, one for each seed."""

    accelerators: int
    workload: str
    arm: str
    runs: list[Run]


class Kept(msgspec.Struct):
    """What `write` leaves."""

    commits: Sequence[str]
    steps: int
    seeds: list[int]
    cells: list[Cell]


Cells = dict[tuple[int, str, str], list[Run]]
"""By accelerators, workload and arm: one for each seed."""


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    workloads = {name: SYNTHETIC[name] for name in arguments.workloads}
    if arguments.trace:
        workloads = {arguments.trace.stem: (partial(from_trace, arguments.trace), 1 << 15)} | workloads
    arms = [BASELINE, *(arm for arm in arguments.arms if arm != BASELINE)]
    cells, commits = resumed(arguments)
    commits = sorted({*commits, commit()})
    began_s = time.monotonic()
    for number in arguments.accelerators:
        for name, (make, cap) in workloads.items():
            for place, seed in enumerate(arguments.seeds):
                lengths = lengths_of(make(seed, NUM_PROMPTS))
                for arm in arms:
                    runs = cells.setdefault((number, name, arm), [])
                    if len(runs) > place:
                        continue
                    runs.append(one_run(PROFILES[number], name, lengths, cap, arm, arguments.steps, seed))
                    print(f"{number}, {name}, {arm}, seed {seed}: {runs[-1].found.window_s:.0f} s", file=sys.stderr)
                    write(arguments, report(cells, commits, time.monotonic() - began_s), cells, commits)
    text = report(cells, commits, time.monotonic() - began_s)
    write(arguments, text, cells, commits)  # also if all was there already
    print(text)


def resumed(arguments: argparse.Namespace) -> tuple[Cells, Sequence[str]]:
    """What is there already, and of which commits; seeds may be added at the end.

    Raises:
        ConfigError: it is of other seeds or steps.
    """
    found = taken_over(arguments, NAME, Kept, SCHEMA)
    if found is None:
        return {}, []
    if (found.steps, found.seeds) != (arguments.steps, arguments.seeds[: len(found.seeds)]):
        raise ConfigError(
            f"{arguments.out / NAME}.json holds runs of --steps {found.steps} --seeds {found.seeds}; give the same, or "
            "another --out"
        )
    return {(cell.accelerators, cell.workload, cell.arm): cell.runs for cell in found.cells}, found.commits


def lengths_of(workload: Workload) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[NUM_PROMPTS, COLUMNS] in real tokens."""
    draws = [[workload.draw(prompt, index, 0)[0] for index in range(COLUMNS)] for prompt in range(NUM_PROMPTS)]
    return np.array(draws, np.int64)


def tokens_per_token(workload: str) -> int:
    """How many real ones an emulated one stands for."""
    return TOKENS_PER_TOKEN.get(workload, FEW_TOKENS)


def one_run(
    profile: Profile,
    workload: str,
    lengths: np.ndarray[Any, np.dtype[np.int64]],
    cap: int,
    arm: str,
    num_steps: int,
    seed: int,
) -> Run:
    """Launch it and measure it."""
    ratio = tokens_per_token(workload)
    with tempfile.TemporaryDirectory() as home:
        trace = Path(home) / "lengths.npz"
        np.savez(trace, lengths=-(-lengths // ratio))
        staleness = ARMS[arm].max_staleness
        filling = FILLING + staleness
        total = filling + num_steps + draining(staleness)
        settings = settings_of(profile, ratio, str(trace), min(CAP, -(-cap // ratio)), arm, total, seed)
        return Run(measure(launch(settings, Path(home)), filling), simulated(settings, filling, num_steps))


def settings_of(
    profile: Profile, ratio: int, trace: str, cap: int, arm: str, num_steps: int, seed: int
) -> dict[str, Any]:
    """The cluster.yaml of a run, in emulated tokens and seconds."""
    chosen, faster = ARMS[arm], ratio / profile.slowed
    return {
        "name": "emulated",
        "seed": seed,
        "roles": {"generator": {"replicas": profile.num_generators, "start_timeout_s": 300.0}},
        "prompts": {"num_train": NUM_PROMPTS, "held_out": 1, "max_prompt_tokens": PROMPT_TOKENS},
        "sampling": {"max_new_tokens": cap},
        "shaping": {"keep": KEEP, "launch": chosen.launch or LAUNCH, **chosen.shaping},
        "staleness": {"max_staleness": chosen.max_staleness},
        "generator": {
            "engine": "scripted",
            "num_slots": profile.num_slots,
            "max_context_tokens": cap + PROMPT_TOKENS,
            "flush_every_steps": 1,
            "script": {
                "trace_path": trace,
                "token_latency_s": profile.token_latency_s * ratio / faster,
                "batch_for_double_latency": profile.batch_for_double_latency,
                "update_stall_s": profile.update_stall_s / faster,
            },
        },
        "learner": {
            "steps": num_steps,
            "groups_per_step": profile.groups_per_step,
            "checkpoint_every": num_steps,
            "script": {
                "token_s": profile.token_s * ratio / faster,
                "step_s": profile.step_s / faster,
                "broadcast_s": profile.broadcast_s / faster,
            },
        },
        "evaluation": {"samples_per_prompt": 0},
        "telemetry": {"status_every_s": 0.1},
    }


# --- what is shown ---------------------------------------------------------------------------------------------


def columns(profile: Profile, workload: str, run: Run, plain: Measured) -> dict[str, tuple[float, str]]:
    """The numbers of one run, with how to show them; `plain` is the synchronous run of the same seed."""
    found, ratio = run.found, tokens_per_token(workload)
    faster = ratio / profile.slowed
    real_s, trained = found.window_s * faster, found.num_trained * ratio
    trained_per_s = found.num_trained / found.window_s
    learning_s = trained * profile.token_s + found.num_steps * profile.step_s
    return {
        "s / step": (real_s / found.num_steps, ".1f"),
        "simulated": (run.ideal.step_s * faster, ".1f"),
        "speed-up per group": (plain.window_s / plain.num_groups / (found.window_s / found.num_groups), ".2f"),
        "per trained token": (trained_per_s / (plain.num_trained / plain.window_s), ".2f"),
        "decoded, tokens/s": (found.num_decoded * ratio / real_s, ",.0f"),
        "of what the profile can": (found.num_decoded * ratio / real_s / profile.decoded_per_s, ".0%"),
        "decoded / trained": (found.num_decoded / found.num_trained, ".2f"),
        "generator idle": (found.mean("generator", "idle"), ".1%"),
        "when simulated": (run.ideal.generator_idle, ".1%"),
        "slots used": (found.mean("generator", "slots"), ".0%"),
        "learner idle": (1 - found.processes["learner/0"].busy, ".1%"),
        "by the profile": (max(0.0, 1 - learning_s / real_s), ".1%"),
        "shaper busy": (found.mean("shaper", "busy"), ".0%"),
        "loop lag max, ms": (found.largest("loop_lag_max_s") * 1e3, ".0f"),
        "staleness": (found.staleness_mean, ".2f"),
        "max": (found.staleness_max, ".0f"),
    }


NOTES = """\
Medians over the seeds, with half of the range between the lowest and the highest. Speed-up: of the synchronous run of
the same seed, by groups trained and by tokens trained. `simulated`: the schedule of the same run, with processes and
links that take no time. `of what the profile can`: decoded, over all slots of all generators in use all the time. `by
the profile`: how long the learner would be idle if it cost nothing to feed it.
In `asynchronous` weights are taken in flight and samples go on under the new ones (partial rollout). Tail batching
opens 1.25 times the groups and samples. `darts` is the method as published; `shortest` stops a group at its 8th finish;
`survivor` keeps the first 7 and one of the rest by lot. Shaping launches 12 for 8. `shaper busy`, `loop lag`: on the
emulating machine, where a run goes K times faster than it would."""


def report(cells: Cells, commits: Sequence[str], elapsed_s: float) -> str:
    """All tables; `elapsed_s` is of this call."""
    lines = [
        "# The whole system on emulated accelerators",
        "",
        f"{conditions('emulated', ', '.join(commits))} {elapsed_s / 60:.0f} min.",
        "",
        NOTES,
        "",
        f"![{PLOT}]({PLOT})",
        "",
    ]
    for number, workload in dict.fromkeys((number, workload) for number, workload, _ in cells):
        lines += table(cells, number, workload)
    return "\n".join(lines)


def table(cells: Cells, number: int, workload: str) -> list[str]:
    """Of one cluster and workload, as far as it has come."""
    profile, ratio = PROFILES[number], tokens_per_token(workload)
    rows: list[str] = []
    titles: list[str] = []
    for (_, _, arm), runs in ((key, runs) for key, runs in cells.items() if key[:2] == (number, workload)):
        plain = cells[number, workload, BASELINE]
        shown = [columns(profile, workload, run, base.found) for run, base in zip(runs, plain, strict=False)]
        titles = list(shown[0])
        values = [spread([each[title][0] for each in shown], shown[0][title][1]) for title in titles]
        rows.append(f"| {' | '.join((arm, str(len(shown)), *values))} |")
    return [
        f"## {workload}, {number} accelerators",
        "",
        f"{profile.num_generators} generators of {profile.num_slots} slots, {profile.num_training} that train; "
        f"{profile.groups_per_step} groups of {KEEP} per step; K = {ratio}, {ratio / profile.slowed:g} times faster "
        "than real time.",
        "",
        f"| {' | '.join(('arm', 'seeds', *titles))} |",
        "|" + "---|" * (len(titles) + 2),
        *rows,
        "",
    ]


def write(arguments: argparse.Namespace, text: str, cells: Cells, commits: Sequence[str]) -> None:
    """The tables, the numbers and the plot, if they are wanted."""
    if arguments.out is None:
        return
    seeds = arguments.seeds[: max(map(len, cells.values()))]  # those of later ones are not there yet
    numbers = Kept(commits, arguments.steps, seeds, [Cell(*key, runs) for key, runs in cells.items()])
    keep(arguments.out, NAME, text, msgspec.to_builtins(numbers), schema=SCHEMA)
    groups = {f"{name} accelerators": found for name, found in speed_ups(cells).items()}
    draw_bars(arguments.out / PLOT, groups, "groups trained per hour, over synchronous", level=1.0)


def speed_ups(cells: Cells) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """Per group, by cluster and workload, and by arm."""
    found: dict[str, dict[str, list[float]]] = {}
    for (number, workload, arm), runs in cells.items():
        plain = cells[number, workload, BASELINE]
        ratios = [base.found.window_s / run.found.window_s for run, base in zip(runs, plain, strict=False)]
        found.setdefault(f"{workload}, {number}", {})[arm] = ratios
    return found


if __name__ == "__main__":
    main()
