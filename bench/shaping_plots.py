"""The plots of `bench.shaping`."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from bench.charts import drawn
from darts_async.simulation.report import SimulationResult

Cells = dict[tuple[str, int], list[SimulationResult]]
"""By arm and number of launched samples: one result for each seed."""
Value = Callable[[SimulationResult, SimulationResult], float]
"""Of a run and the baseline's run with the same seed."""

PLOTS = ("shaping_speed_up.png", "shaping_drift.png")
_DASHES = ((8, 2), (1, 1), (5, 1, 1, 1), (2, 3), (8, 1, 1, 1, 1, 1))
_MARKERS = "osD^v<>*PX"


def draw(tables: dict[str, Cells], baseline: str, directory: Path) -> None:
    """Two figures, one panel per workload: the speed-up and the length drift over the number of launched samples.

    Medians over the seeds, bars from the lowest to the highest.
    """
    _draw(tables, baseline, "speed-up over synchronous", _speed_up, directory / PLOTS[0])
    _draw(tables, baseline, "length drift (negative shortens)", _drift, directory / PLOTS[1])


def _speed_up(result: SimulationResult, baseline: SimulationResult) -> float:
    return baseline.makespan_s / result.makespan_s


def _drift(result: SimulationResult, baseline: SimulationResult) -> float:
    return round(result.length_drift, 9)  # no panel of rounding errors


def _draw(tables: dict[str, Cells], baseline: str, label: str, value: Value, path: Path) -> None:
    arms = list(dict.fromkeys(arm for cells in tables.values() for arm, _ in cells))
    with drawn(path, len(tables), width=4.4, height=4.6) as (figure, axes):
        for axis, (workload, cells) in zip(axes, tables.items(), strict=True):
            reference = next(cell for (arm, _), cell in cells.items() if arm == baseline)
            num_flat, num_curved = 0, 0
            for arm in arms:
                launches = [launch for name, launch in cells if name == arm]
                seeds = [
                    [value(*pair) for pair in zip(cells[arm, launch], reference, strict=True)] for launch in launches
                ]
                values = [median(each) for each in seeds]
                if len(launches) == 1:  # a baseline: a line to compare with
                    axis.axhline(
                        values[0],
                        label=f"{arm} (R={launches[0]})",
                        color="0.25",
                        linewidth=1,
                        dashes=_DASHES[num_flat % len(_DASHES)],
                    )
                    num_flat += 1
                else:
                    ranges = np.abs([[min(each), max(each)] for each in seeds] - np.array(values)[:, None]).T
                    axis.errorbar(
                        launches,
                        values,
                        yerr=ranges,
                        capsize=2,
                        linewidth=1.2,
                        label=arm,
                        color=f"C{num_curved}",
                        marker=_MARKERS[num_curved % len(_MARKERS)],
                        markersize=5,
                    )
                    num_curved += 1
            axis.set(title=workload, xlabel="samples launched per prompt (R)")
        axes[0].set_ylabel(label)
        handles, labels = axes[0].get_legend_handles_labels()
        columns = max(3 * len(tables) // 2, 1)
        num_rows = -(-len(labels) // columns)
        figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0.02 + 0.04 * num_rows, 1, 1))
