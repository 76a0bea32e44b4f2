"""The plots of `bench.learning`: held-out reward over time and over decoded tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.charts import drawn
from bench.learning_report import BASELINE, Learnt, Results, Task


def draw(found: Results, tasks: Mapping[str, Task], directory: Path) -> None:
    """One figure for each task that has runs: `learning_TASK.png`."""
    for name, task in tasks.items():
        arms = found.arms(name)
        if not arms:
            continue
        with drawn(directory / f"learning_{name}.png", 2) as (figure, (over_time, over_tokens)):
            for index, (arm, runs) in enumerate(arms.items()):
                style = {
                    "color": "0.15" if arm == BASELINE else f"C{index}",
                    "label": f"{arm} ({len(runs)})",
                    "linewidth": 1.6,
                }
                _climb(over_time, runs, 0, 1.0, style)
                _climb(over_tokens, runs, 3, 1e3, style)
            for axis, label in ((over_time, "seconds of training"), (over_tokens, "thousand tokens decoded")):
                for target in task.targets:
                    axis.axhline(target, color="0.6", linewidth=0.8, linestyle=":")
                axis.set_xlabel(label)
            over_time.set_ylabel("held-out reward")
            over_tokens.sharey(over_time)
            over_tokens.legend(fontsize=8, frameon=False, loc="lower right")
            figure.suptitle(f"{name}: means; in brackets of how many seeds", fontsize=10)
            figure.tight_layout()


def _climb(axis: Any, runs: list[Learnt], column: int, unit: float, style: Mapping[str, Any]) -> None:
    """The mean of the runs, at places that all of them have come to."""
    climbs = [np.array(run.climb) for run in runs]
    places = np.linspace(0.0, min(climb[-1, column] for climb in climbs), 60)
    rewards = [np.interp(places, climb[:, column], climb[:, 2]) for climb in climbs]
    axis.plot(places / unit, np.mean(rewards, 0), **style)
