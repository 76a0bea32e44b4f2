"""What `bench.peers` found: the tables and the pictures."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from msgspec import Struct

from bench.charts import Panel, draw_curves
from bench.results import conditions, table

TRL: Final = "TRL"
SCHEMA: Final = 3
"""Of the file that holds `Results`."""


class Race(Struct, frozen=True):
    """What was set for a task before the runs."""

    target: float
    """Held-out reward."""
    steps: int
    every_steps: int
    """The held-out reward is looked at."""


RACES: Final = {
    "chain": Race(target=0.9, steps=100, every_steps=10),
    "search": Race(target=0.845, steps=64, every_steps=8),  # the target of `bench.learning`
}


class Climb(Struct, frozen=True):
    """The held-out reward of one run over time."""

    task: str
    max_new_tokens: int
    name: str
    seed: int
    rewards: list[tuple[float, int, float]]
    """(seconds since training began, steps, held-out reward)"""

    def reached(self) -> tuple[float, int, bool]:
        """Seconds and steps to the target of the task, or of the whole run, and whether it is there."""
        for seconds, steps, reward in self.rewards:
            if reward >= RACES[self.task].target:
                return seconds, steps, True
        seconds, steps, _ = self.rewards[-1]
        return seconds, steps, False


class Results(Struct):
    """All runs, and what they are of."""

    commits: list[str]
    runs: list[Climb]
    schema: int = SCHEMA

    def has(self, task: str, max_new_tokens: int, name: str, seed: int) -> bool:
        """Whether there is such a run already."""
        asked = (task, max_new_tokens, name, seed)
        return any((run.task, run.max_new_tokens, run.name, run.seed) == asked for run in self.runs)

    def parts(self) -> dict[tuple[str, int], list[Climb]]:
        """The runs by task and cap."""
        found: dict[tuple[str, int], list[Climb]] = {}
        for run in self.runs:
            found.setdefault((run.task, run.max_new_tokens), []).append(run)
        return dict(sorted(found.items()))


def report(found: Results) -> str:
    """A table for each task and cap."""
    lines = [
        "# Time to a held-out reward, beside TRL",
        "",
        f"{conditions('peers', ', '.join(found.commits))} Medians over the seeds, and the range.",
    ]
    for (task, max_new_tokens), climbs in found.parts().items():
        lines += [
            "",
            f"## {task}, at most {max_new_tokens} new tokens",
            "",
            f"![held-out reward over time]({plot_of(task, max_new_tokens)})",
            "",
            *rows(climbs),
        ]
    return "\n".join(lines) + "\n"


def rows(climbs: Sequence[Climb]) -> list[str]:
    """The table of one task with one cap; of the seeds that all have run."""
    theirs = {climb.seed: climb.reached()[0] for climb in climbs if climb.name == TRL}
    cells = []
    for name in dict.fromkeys(climb.name for climb in climbs):
        runs = [climb for climb in climbs if climb.name == name and climb.seed in theirs]
        ends = [climb.reached() for climb in runs]
        if not ends:
            continue
        cells.append(
            [
                name,
                str(len(ends)),
                ranged([seconds for seconds, _, _ in ends], ".0f"),
                ranged([float(steps) for _, steps, _ in ends], ".0f"),
                ranged([seconds / max(steps, 1) for seconds, steps, _ in ends], ".2f"),
                ranged([theirs[run.seed] / end[0] for run, end in zip(runs, ends, strict=True)], ".2f"),
                str(sum(not is_there for _, _, is_there in ends)),
            ]
        )
    target = RACES[climbs[0].task].target
    titles = ["trainer", "seeds", f"seconds to {target:g}", "steps", "seconds a step", "TRL's time over its own"]
    return table([*titles, "not there"], cells)


def ranged(values: Sequence[float], style: str) -> str:
    """The median, and the range where there is one."""
    text = format(median(values), style)
    return text if len(values) == 1 else f"{text} ({min(values):{style}} to {max(values):{style}})"


def plot_of(task: str, max_new_tokens: int) -> str:
    """The file of a picture."""
    return f"peers_{task}_{max_new_tokens}.png"


def draw(found: Results, directory: Path) -> None:
    """A picture for each task and cap, with a panel for each seed."""
    for (task, max_new_tokens), climbs in found.parts().items():
        panels = [
            Panel(
                "seconds of training",
                "held-out reward",
                {
                    climb.name: [(seconds, reward) for seconds, _, reward in climb.rewards]
                    for climb in climbs
                    if climb.seed == seed
                },
                title=f"{task}, at most {max_new_tokens} new tokens, seed {seed}",
                levels={"target": RACES[task].target},
            )
            for seed in dict.fromkeys(climb.seed for climb in climbs)
        ]
        draw_curves(directory / plot_of(task, max_new_tokens), panels)
