"""Which shaping makes a step sooner, at which price in tokens and in what the gradient sees?

    python -m bench.shaping [--trace PATH] [--workloads NAME ...] [--arms NAME ...] [--launch 8 10 12 16]
                            [--groups N] [--prompts N] [--seeds S ...] [--out DIR]

Simulated: the real shaper against modelled generators and learner (see `darts_async.simulation`), every arm on the
same prompts and samples, once for each seed. The policy does not change, so this is the effect of the schedule alone.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.charts import for_plots
from bench.results import conditions, keep_text, spread
from bench.shaping_plots import PLOTS, draw
from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.simulation.demand import LONG_THOUGHT, FixedWorkload, LognormalWorkload, TraceWorkload, Workload
from darts_async.simulation.models import EngineModel, LearnerModel, Models
from darts_async.simulation.report import SimulationResult
from darts_async.simulation.run import simulate

KEEP = 8
GROUPS_PER_STEP = 32
GENERATORS, SLOTS = 4, 128
STALENESS = 2
MAX_NEW_TOKENS = 1 << 15
BASELINE = "synchronous"
ENGINE = {"token_latency_s": 0.01, "batch_for_double_latency": 64.0, "update_stall_s": 0.5}
LEARNER = LearnerModel(step_s=1.0, token_s=4e-5, broadcast_s=1.0)
REWARD_S = 0.05


@dataclass(frozen=True)
class Arm:
    """One way to run: a baseline launches exactly what it says, a shaping arm every number asked for."""

    shaping: dict[str, object]
    max_staleness: int = STALENESS
    drain: bool = False
    launch: int | None = None
    """None: as asked on the command line."""
    flush_every_s: float | None = None

    def config(self, launch: int, max_new_tokens: int, num_groups: int, seed: int) -> RunConfig:
        """The run, with `launch` samples per prompt."""
        return RunConfig.model_validate(
            {
                "seed": seed,
                "shaping": {"keep": KEEP, "launch": launch, **self.shaping},
                "staleness": {"max_staleness": self.max_staleness},
                "learner": {"steps": max(num_groups // GROUPS_PER_STEP, 1), "groups_per_step": GROUPS_PER_STEP},
                "generator": {"num_slots": SLOTS, "max_context_tokens": 1 << 16},
                "sampling": {"max_new_tokens": max_new_tokens},
                "evaluation": {"samples_per_prompt": 0},
                "roles": {"generator": {"replicas": GENERATORS}},
            }
        )

    def models(self) -> Models:
        """The cluster."""
        return Models(
            EngineModel(**ENGINE, drain_before_update=self.drain, flush_every_s=self.flush_every_s), REWARD_S, LEARNER
        )


DUAL_END = {"rule": "dual_end", "shortest": 7, "longest": 1}
SURVIVOR = {"rule": "survivor", "shortest": 7, "longest": 1}
TAIL_BATCHING = {"rule": "shortest", "early_stop": True, "overcommit": 1.25}
HAZARD = {"pruning": {"mode": "hazard"}}
WATCHED_S = 2.0
"""Rules that watch running samples get their tokens this often."""


def darts(split: str) -> dict[str, object]:
    """The method as published: adaptive split, saturated prompts keep the shortest and stop early."""
    return DUAL_END | {"redundancy": {"total": "fixed", "split": split}, "pruning": {"mode": "saturation"}}


ARMS = {
    BASELINE: Arm({"rule": "none"}, max_staleness=0, launch=KEEP),
    "synchronous, tail batching": Arm(TAIL_BATCHING, max_staleness=0, launch=math.ceil(1.25 * KEEP)),
    "synchronous, dual_end": Arm(DUAL_END, max_staleness=0),
    "synchronous, survivor": Arm(SURVIVOR, max_staleness=0),
    "asynchronous": Arm({"rule": "none"}, launch=KEEP),
    "asynchronous, staleness 8": Arm({"rule": "none"}, max_staleness=8, launch=KEEP),
    "asynchronous, drained": Arm({"rule": "none"}, drain=True, launch=KEEP),
    "asynchronous, tail batching": Arm(TAIL_BATCHING, launch=math.ceil(1.25 * KEEP)),
    "random": Arm({"rule": "random"}),
    "shortest": Arm({"rule": "shortest", "early_stop": True}),
    "dual_end": Arm(DUAL_END),
    "dual_end + guard": Arm(DUAL_END | {"guard": True}),
    "dual_end + hazard": Arm(DUAL_END | HAZARD, launch=12, flush_every_s=WATCHED_S),
    "darts": Arm(darts("paper")),
    "darts, shuffled split": Arm(darts("shuffled"), launch=12),
    "darts, reward_aware split": Arm(darts("reward_aware"), launch=12),
    "survivor": Arm(SURVIVOR),
    "survivor, staleness 8": Arm(SURVIVOR, max_staleness=8),
    "survivor, utility": Arm(SURVIVOR | {"redundancy": {"total": "utility"}}, launch=12, flush_every_s=WATCHED_S),
    "qlpo": Arm({"rule": "qlpo"}),
}
Make = Callable[[int, int], Workload]
"""A workload from a seed and the number of prompts."""
SYNTHETIC: dict[str, tuple[Make, int]] = {
    "math": (lambda seed, _: LognormalWorkload(seed=seed), 4096),
    "heavy": (lambda seed, _: LognormalWorkload(LONG_THOUGHT, seed=seed), MAX_NEW_TOKENS),
    "fixed": (lambda *_: FixedWorkload(800), MAX_NEW_TOKENS),
}
"""With the cap on the response length."""


def s_per_group(result: SimulationResult) -> float:
    """Makespan over the number of groups that were trained."""
    return result.makespan_s / result.num_trained_groups


def mean_launched(result: SimulationResult) -> float:
    """Samples per group that was opened."""
    return sum(size * num for size, num in result.launched.items()) / sum(result.launched.values())


COLUMNS: dict[str, tuple[str, Callable[[SimulationResult, SimulationResult], float]]] = {
    "mean R": (".1f", lambda r, _: mean_launched(r)),
    "s / step": (".1f", lambda r, _: s_per_group(r) * GROUPS_PER_STEP),
    "s / 1,000 groups": (",.0f", lambda r, _: s_per_group(r) * 1000),
    "speed-up": (".2f", lambda r, baseline: baseline.makespan_s / r.makespan_s),
    "decoded / trained": (".2f", lambda r, _: r.generated_per_trained),
    "slots used": (".0%", lambda r, _: r.slot_use),
    "generator idle": (".0%", lambda r, _: r.generator_idle_share),
    "learner idle": (".0%", lambda r, _: r.learner_idle_share),
    "group p50, s": (".0f", lambda r, _: r.group_percentile_s(50)),
    "group p99, s": (".0f", lambda r, _: r.group_percentile_s(99)),
    "staleness mean": (".2f", lambda r, _: r.staleness_mean),
    "max": (".0f", lambda r, _: r.staleness_max),
    "drift": ("+.4f", lambda r, _: r.length_drift),
    "zero advantage": (".0%", lambda r, _: r.zero_advantage_share),
}
"""How to show it, and what it is of a run and the baseline's run with the same seed."""


NOTES = """\
Medians over the seeds, with half of the range between the lowest and the highest. Each seed has prompts of its own, and
arms are compared seed by seed. Speed-up: makespan of the synchronous baseline over the arm's. Decoded / trained:
tokens. Drift: first-order change of the mean length per unit step, negative shortens. Group: from its opening to its
last reward. Drained: generators finish what runs before they take new weights; the other asynchronous arms take them in
flight (partial rollout). Tail batching opens 1.25 times the groups and 1.25 times the samples; what completes first is
trained, cut prompts are asked again. `shortest` stops a group at its 8th finish. `darts`: dual_end with R samples on
average, split by spread, and saturated prompts (R_i = 16) keep their shortest. `utility`: R on average as the utility
rule has it, with the elasticity measured. With R = 8 every rule gives the very same run as plain sampling, so
it is only plotted."""


@dataclass
class Table:
    """The results of one workload, by arm and number of launched samples: one for each seed."""

    workload: str
    cells: dict[tuple[str, int], list[SimulationResult]] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table with its heading."""
        rows = [f"| {' | '.join(('arm', 'R', *COLUMNS))} |", "|" + "---|" * (len(COLUMNS) + 2)]
        shown = [(arm, launch) for arm, launch in self.cells if ARMS[arm].launch or launch != KEEP]
        rows += [f"| {' | '.join(self._row(arm, launch))} |" for arm, launch in shown]
        return "\n".join([f"## {self.workload}", "", *rows, ""])

    def _row(self, arm: str, launch: int) -> list[str]:
        pairs = list(zip(self.cells[arm, launch], self.cells[BASELINE, KEEP], strict=True))
        values = {name: [measure(r, baseline) for r, baseline in pairs] for name, (_, measure) in COLUMNS.items()}
        return [arm, str(launch), *(spread(values[name], style) for name, (style, _) in COLUMNS.items())]


def plain(arm: str) -> str:
    """The baseline that the arm is the very same run as where no more samples are launched than kept."""
    return {0: BASELINE, STALENESS: "asynchronous"}.get(ARMS[arm].max_staleness, "asynchronous, staleness 8")


def from_trace(path: Path, seed: int, num_prompts: int) -> TraceWorkload:
    """Other prompts of the trace for another seed, as long as there are any."""
    return TraceWorkload(path, first=seed * num_prompts)


def cells(arms: list[str], launches: list[int]) -> Iterator[tuple[str, int]]:
    """The baseline first, then every arm with every number of samples that makes sense for it."""
    for arm in [BASELINE, *(arm for arm in arms if arm != BASELINE)]:
        fixed = ARMS[arm].launch
        yield from ((arm, launch) for launch in ([fixed] if fixed else launches))


def measure(name: str, make: Make, max_new_tokens: int, arguments: argparse.Namespace) -> Table:
    """Every cell of one workload."""
    table = Table(name)
    workloads = {seed: make(seed, arguments.prompts) for seed in arguments.seeds}
    for arm, launch in cells(arguments.arms, arguments.launch):
        same = plain(arm), KEEP
        if launch == KEEP and not ARMS[arm].launch and same in table.cells:
            table.cells[arm, launch] = table.cells[same]
            continue
        for seed, workload in workloads.items():
            config = ARMS[arm].config(launch, max_new_tokens, arguments.groups, seed)
            result = simulate(config, workload, ARMS[arm].models(), num_prompts=arguments.prompts)
            table.cells.setdefault((arm, launch), []).append(result)
        print(f"{name}, {arm}, {launch}", end="          \r", file=sys.stderr)
    return table


def report(tables: list[Table], elapsed_s: float, *, plotted: bool) -> str:
    """All tables, with how they came about."""
    num_samples = sum(r.num_samples for table in tables for cell in table.cells.values() for r in cell)
    return "\n".join(
        [
            "# Shaping, simulated",
            "",
            f"{conditions('shaping')} {num_samples:,} samples in {elapsed_s:.0f} s of processor time, "
            f"{elapsed_s / num_samples * 1e6:.0f} us each, {num_samples / elapsed_s * 60 / 1e6:.2f} million a minute.",
            "",
            f"{GENERATORS} generators of {SLOTS} slots, a decode step of b samples takes 10 ms * (1 + b / 64), weights "
            f"stall it {ENGINE['update_stall_s']} s; the learner takes {LEARNER.token_s * 1e6:.0f} us per token, "
            f"{LEARNER.step_s} s per step, {LEARNER.broadcast_s} s per broadcast; {GROUPS_PER_STEP} groups of {KEEP} "
            f"per step; max_staleness {STALENESS} unless synchronous. Caps: 4,096 tokens (`math`), "
            f"{MAX_NEW_TOKENS:,} (the others). Times are virtual. The policy is frozen: this is "
            "the schedule alone, without what shorter responses would save later.",
            "",
            NOTES,
            "",
            *(f"![{plot}]({plot})\n" for plot in PLOTS if plotted),
            *(table.markdown() for table in tables),
        ]
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help=".npz file with lengths and rewards [num_prompts, samples]")
    parser.add_argument("--workloads", nargs="*", choices=SYNTHETIC, default=list(SYNTHETIC))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--launch", nargs="+", type=int, default=[8, 10, 12, 16])
    parser.add_argument("--groups", type=int, default=1024, help="trained groups per cell")
    parser.add_argument("--prompts", type=int, default=512, help="prompts that are visited in turn")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=for_plots, help="directory for shaping.md and its plots")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    workloads = {name: SYNTHETIC[name] for name in arguments.workloads}
    if arguments.trace:
        workloads = {arguments.trace.stem: (partial(from_trace, arguments.trace), MAX_NEW_TOKENS)} | workloads
    start_s = time.process_time()
    tables = [measure(name, *workload, arguments) for name, workload in workloads.items()]
    text = report(tables, time.process_time() - start_s, plotted=bool(arguments.out))
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        keep_text(arguments.out / "shaping.md", text)
        draw({table.workload: table.cells for table in tables}, BASELINE, arguments.out)


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    try:
        run(parse_arguments())
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
