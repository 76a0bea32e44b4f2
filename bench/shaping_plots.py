"""The plots of `bench.shaping`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from darts_async.errors import ConfigError
from darts_async.simulation import SimulationResult

Cells = dict[tuple[str, int], SimulationResult]
"""By arm and number of launched samples."""

PLOTS = ("shaping_speed_up.png", "shaping_drift.png")
_DASHES = ((8, 2), (1, 1), (5, 1, 1, 1), (2, 3), (8, 1, 1, 1, 1, 1))
_MARKERS = "osD^v<>*PX"


def require_matplotlib() -> None:
    """Say so before anything is measured if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--out draws plots, which needs matplotlib; install it with: pip install 'darts-async[bench]'"
        )


def draw(tables: dict[str, Cells], baseline: str, directory: Path) -> None:
    """Two figures, one panel per workload: the speed-up and the length drift over the number of launched samples."""
    _draw(tables, baseline, "speed-up over synchronous", _speed_up, directory / PLOTS[0])
    _draw(tables, baseline, "length drift (negative shortens)", _drift, directory / PLOTS[1])


def _speed_up(cells: Cells, baseline: SimulationResult, arm: str, launch: int) -> float:
    return baseline.makespan_s / cells[arm, launch].makespan_s


def _drift(cells: Cells, baseline: SimulationResult, arm: str, launch: int) -> float:
    return round(cells[arm, launch].length_drift, 9)  # no panel of rounding errors


def _draw(
    tables: dict[str, Cells],
    baseline: str,
    label: str,
    value: Callable[[Cells, SimulationResult, str, int], float],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(4.4 * len(tables), 4.6), squeeze=False)
    arms = list(dict.fromkeys(arm for cells in tables.values() for arm, _ in cells))
    for axis, (workload, cells) in zip(axes[0], tables.items(), strict=True):
        reference = next(r for (arm, _), r in cells.items() if arm == baseline)
        num_flat, num_curved = 0, 0
        for arm in arms:
            launches = [launch for name, launch in cells if name == arm]
            values = [value(cells, reference, arm, launch) for launch in launches]
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
                axis.plot(
                    launches,
                    values,
                    label=arm,
                    color=f"C{num_curved}",
                    marker=_MARKERS[num_curved % len(_MARKERS)],
                    markersize=5,
                )
                num_curved += 1
        axis.set(title=workload, xlabel="samples launched per prompt (R)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
