"""What `bench.learning` has found, and its tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
from msgspec import Struct, field

from bench.results import conditions

BASELINE: Final = "asynchronous"
"""Our own mode without shaping, which the others are compared with."""
SYNCHRONOUS: Final = "synchronous"
MARGIN: Final = 0.02
"""How much lower a reward may be that counts as not worse."""
SCHEMA: Final = 1
RESAMPLES: Final = 10_000
FEWEST_SEEDS: Final = 5
"""With fewer nothing is said about a reward being as good."""


@dataclass(frozen=True, slots=True)
class Task:
    """What was set before the runs."""

    targets: tuple[float, float]
    """Held-out reward: on the way, and at the end."""
    steps: int
    every_steps: int
    """Held-out prompts are sampled."""
    samples: int
    """Of each held-out prompt, on the way."""
    learning_rate: float


class Probe(Struct, frozen=True):
    """Fresh samples of held-out prompts, none of which was stopped by a rule. Lengths in tokens."""

    reward: float
    pass_at: dict[int, float]
    length_mean: float
    length_std: float
    """Within a prompt."""
    length_p50: float
    length_p90: float
    length_p99: float
    length_right: float
    length_wrong: float
    at_cap: float
    all_wrong: float
    """Share of the prompts none of whose samples is right."""


class Learnt(Struct, frozen=True):
    """One run."""

    task: str
    arm: str
    seed: int
    climb: list[tuple[float, int, float, float]]
    """(seconds since training began, step, held-out reward, tokens decoded for training)"""
    before: Probe
    after: Probe
    entropy: tuple[float, float]
    """In nats: of the first and of the last steps."""
    survival_hard: float | None
    survival_easy: float | None
    """Share of the samples of hard and of easy prompts that were decoded to their end or trained."""
    budget_correlation: float | None
    zero_advantage_share: float
    staleness_max: float

    def reached(self, target: float) -> tuple[float, float, float, bool]:
        """Seconds, steps and tokens to a reward, between two evaluations by a straight line; of the whole run, and
        False, if it was not reached."""
        before = self.climb[0]
        for after in self.climb:
            if after[2] >= target:
                rise = after[2] - before[2]
                share = (target - before[2]) / rise if rise > 0 else 1.0
                seconds, steps, tokens = (before[i] + share * (after[i] - before[i]) for i in (0, 1, 3))
                return seconds, steps, tokens, True
            before = after
        return before[0], before[1], before[3], False

    def reward_at(self, seconds: float) -> float:
        """By straight lines; the last one behind the end."""
        return float(np.interp(seconds, [point[0] for point in self.climb], [point[2] for point in self.climb]))


class Timing(Struct, frozen=True):
    """Seconds per trained group with a policy that stands still."""

    task: str
    arm: str
    first_s: float
    """The model that all began with."""
    own_s: float
    """The model that the arm has made."""


class Results(Struct):
    """Everything, as it is written."""

    steps: int | None
    """Of every task; None: as many as the task has."""
    commit: str
    runs: list[Learnt]
    timings: list[Timing]
    schema: int = field(default=SCHEMA)

    def has(self, task: str, arm: str, seed: int) -> bool:
        """Whether a run is there."""
        return any((run.task, run.arm, run.seed) == (task, arm, seed) for run in self.runs)

    def has_timing(self, task: str, arm: str) -> bool:
        """Whether an arm has been timed."""
        return any((timing.task, timing.arm) == (task, arm) for timing in self.timings)

    def arms(self, task: str) -> dict[str, list[Learnt]]:
        """The runs of a task by arm, in the order of seeds; only seeds of which the baseline is there."""
        seeds = {run.seed for run in self.runs if (run.task, run.arm) == (task, BASELINE)}
        found: dict[str, list[Learnt]] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            if run.task == task and run.seed in seeds:
                found.setdefault(run.arm, []).append(run)
        return found


NOTES: Final = f"""\
Medians over the seeds; in brackets 95 % bootstrap intervals of that median ({RESAMPLES:,} resamples of the seeds). All
arms of a seed saw the same prompts, in turn on one machine. Seconds count from the end of the first evaluation to the
held-out reward, between two evaluations by a straight line; a run that did not get there counts with its whole time
(`not there`). Speed-up: seconds of `{BASELINE}` of the same seed over the arm's own. `at its time`: reward of the arm
when `{BASELINE}` of the same seed was at the target. `difference`: reward of the last model less that of
`{BASELINE}`; `not worse`: its whole interval, of {FEWEST_SEEDS} seeds at least, is above -{MARGIN:g}, which was set
before. Tokens: all that were decoded for training, cancelled ones included."""


def report(found: Results, tasks: dict[str, Task]) -> str:
    """All tables."""
    lines = [
        "# Time to a held-out reward, by how rollouts are shaped",
        "",
        conditions("learning", found.commit),
        "",
        NOTES,
        "",
    ]
    for name, task in tasks.items():
        arms = found.arms(name)
        if arms:
            num_steps = found.steps or task.steps
            lines += [f"## {name}", "", f"![{name}](learning_{name}.png)", ""]
            lines += [
                f"{num_steps} steps of 16 groups, learning rate {task.learning_rate:g}; every {task.every_steps} steps "
                f"{task.samples} fresh samples of each of 128 held-out prompts.",
                "",
            ]
            lines += [*primary(arms, task), "", *probes(arms), "", *split(found, name), ""]
    return "\n".join(lines)


def primary(arms: dict[str, list[Learnt]], task: Task) -> list[str]:
    """Times and rewards."""
    early, late = task.targets
    rows = [
        f"| arm | seeds | s to {early:g} | s to {late:g} | not there | speed-up to {early:g} | to {late:g} "
        f"| k tokens to {late:g} | steps | at its time | reward at the end | difference | not worse |",
        "|" + "---|" * 13,
    ]
    for arm, runs in arms.items():
        pairs = [(run, base) for run in runs for base in arms[BASELINE] if base.seed == run.seed]
        ends = [run.reached(late) for run in runs]
        differences = [run.after.reward - base.after.reward for run, base in pairs]
        cells = [
            arm,
            str(len(runs)),
            f"{median(run.reached(early)[0] for run in runs):.1f}",
            f"{median(end[0] for end in ends):.1f}",
            str(sum(not end[3] for end in ends)),
            *(
                interval([base.reached(of)[0] / run.reached(of)[0] for run, base in pairs], ".2f")
                for of in (early, late)
            ),
            f"{median(end[2] for end in ends) / 1e3:,.0f}",
            f"{median(end[1] for end in ends):.0f}",
            f"{median(run.reward_at(base.reached(late)[0]) for run, base in pairs):.3f}",
            f"{median(run.after.reward for run in runs):.3f}",
            interval(differences, "+.3f"),
            is_not_worse(differences),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def is_not_worse(differences: Sequence[float]) -> str:
    """In a word or two."""
    if len(differences) < FEWEST_SEEDS:
        return "too few seeds"
    return "yes" if bounds(differences)[0] > -MARGIN else "not shown"


def speed_ups(pairs: Sequence[tuple[Learnt, Learnt]], target: float) -> list[float]:
    """Of each run over the baseline's of its seed."""
    return [base.reached(target)[0] / run.reached(target)[0] for run, base in pairs]


Column = tuple[str, Callable[[Learnt], float | None], str]
OF_PROBE: Final[Sequence[Column]] = (
    ("pass@8", lambda run: run.after.pass_at[8], ".3f"),
    ("pass@16", lambda run: run.after.pass_at[16], ".3f"),
    ("length", lambda run: run.after.length_mean, ".1f"),
    ("std in prompt", lambda run: run.after.length_std, ".1f"),
    ("p50", lambda run: run.after.length_p50, ".0f"),
    ("p90", lambda run: run.after.length_p90, ".0f"),
    ("p99", lambda run: run.after.length_p99, ".0f"),
    ("right", lambda run: run.after.length_right, ".1f"),
    ("wrong", lambda run: run.after.length_wrong, ".1f"),
    ("at the cap", lambda run: run.after.at_cap, ".1%"),
    ("all wrong", lambda run: run.after.all_wrong, ".1%"),
    ("entropy", lambda run: run.entropy[1], ".3f"),
    ("no gradient", lambda run: run.zero_advantage_share, ".0%"),
    ("survive: hard", lambda run: run.survival_hard, ".0%"),
    ("easy", lambda run: run.survival_easy, ".0%"),
    ("corr(R, next R)", lambda run: run.budget_correlation, "+.2f"),
    ("staleness max", lambda run: run.staleness_max, ".0f"),
)


def probes(arms: dict[str, list[Learnt]]) -> list[str]:
    """What the last models are like, and what has gone wrong with them."""
    first = arms[BASELINE][0].before
    rows = [
        f"The model that all began with: reward {first.reward:.3f}, pass@16 {first.pass_at[16]:.3f}, length "
        f"{first.length_mean:.1f} (right {first.length_right:.1f}, wrong {first.length_wrong:.1f}), p99 "
        f"{first.length_p99:.0f}, all wrong {first.all_wrong:.1%}. The last ones:",
        "",
        f"| arm | {' | '.join(column[0] for column in OF_PROBE)} | signs of failure |",
        "|" + "---|" * (len(OF_PROBE) + 2),
    ]
    for arm, runs in arms.items():
        cells = [arm]
        for _, of, style in OF_PROBE:
            values = [value for run in runs if (value := of(run)) is not None]
            cells.append(format(median(values), style) if values else "-")
        counts = {name: sum(is_seen(run) for run in runs) for name, is_seen in SIGNS.items()}
        cells.append(", ".join(f"{name} {n} of {len(runs)}" for name, n in counts.items() if n) or "none")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


SIGNS: Final[dict[str, Callable[[Learnt], bool]]] = {
    "length collapse": lambda run: (
        run.after.length_mean < run.before.length_mean and run.after.reward < run.before.reward - MARGIN
    ),
    "short and wrong": lambda run: (
        run.after.length_wrong / run.before.length_wrong < run.after.length_right / run.before.length_right
        and run.after.all_wrong > run.before.all_wrong
    ),
    "less diverse": lambda run: run.after.pass_at[16] < run.before.pass_at[16] - MARGIN,
    "hard prompts starve": lambda run: (
        run.survival_hard is not None and run.survival_easy is not None and run.survival_hard < run.survival_easy - 0.1
    ),
    "budget oscillates": lambda run: (run.budget_correlation or 0.0) < -0.1,
    "at the cap": lambda run: run.after.at_cap > 0.01,
}
"""`short and wrong`: wrong answers shorten faster than right ones while more prompts have no right one."""


def split(found: Results, task: str) -> list[str]:
    """Where the time goes, as far as the arms have been timed."""
    timings = {timing.arm: timing for timing in found.timings if timing.task == task}
    if not {BASELINE, SYNCHRONOUS} <= timings.keys():
        return []
    synchronous, plain = timings[SYNCHRONOUS].first_s, timings[BASELINE].first_s
    rows = [
        "Seconds per trained group with a policy that stands still, on the model all began with and on the arm's own "
        "last one; S_total = S_overlap x S_mechanism x S_policy, over synchronous GRPO on the first model.",
        "",
        "| arm | first model, ms | own model, ms | S_overlap | S_mechanism | S_policy | S_total |",
        "|" + "---|" * 7,
    ]
    for arm, timing in timings.items():
        waited = synchronous if arm == SYNCHRONOUS else plain
        factors = (synchronous / waited, waited / timing.first_s, timing.first_s / timing.own_s)
        cells = (f"{value:.2f}" for value in (*factors, synchronous / timing.own_s))
        rows.append(f"| {arm} | {timing.first_s * 1e3:.0f} | {timing.own_s * 1e3:.0f} | {' | '.join(cells)} |")
    return rows


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the median, by bootstrap; the same numbers give the same interval."""
    drawn = np.random.default_rng(0).choice(np.array(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, 1), (2.5, 97.5))
    return float(low), float(high)


def interval(values: Sequence[float], style: str) -> str:
    """The median and its interval."""
    low, high = bounds(values)
    return f"{median(values):{style}} ({low:{style}} to {high:{style}})"
