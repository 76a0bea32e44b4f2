"""The pictures of the benchmarks."""

import argparse
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Curves = Mapping[str, Sequence[tuple[float, float]]]


def for_plots(path: str) -> Path:
    """The type of an option that names where plots go: refused, before anything is measured, if nothing can draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("plots need matplotlib; install it with: pip install 'darts-async[bench]'")
    return Path(path)


@contextmanager
def drawn(path: Path, columns: int = 1, *, width: float = 6.0, height: float = 4.2) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes, side by side, which are written in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    yield figure, list(axes[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclass(frozen=True)
class Panel:
    """Curves in one pair of axes."""

    x: str
    y: str
    curves: Curves
    title: str = ""
    log: str = ""
    """Which of `x` and `y` are logarithmic."""
    levels: Mapping[str, float] = field(default_factory=dict)
    """What to compare with, all along x."""


def draw_curves(path: Path, panels: Sequence[Panel]) -> None:
    """Points with lines through them; curves of the same name have the same colour."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    with drawn(path, len(panels)) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=True):
            for name, points in panel.curves.items():
                x, y = zip(*points, strict=True)
                axis.plot(x, y, marker="o", markersize=4, linewidth=1.4, color=f"C{names.index(name)}", label=name)
            for name, level in panel.levels.items():
                axis.axhline(level, color="0.4", linewidth=0.9, linestyle=":", label=name)
            axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
            axis.set_xscale("log" if "x" in panel.log else "linear")
            axis.set_yscale("log" if "y" in panel.log else "linear")
            axis.legend(fontsize=8, frameon=False)
        figure.tight_layout()


def draw_bars(
    path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]], label: str, *, level: float | None = None
) -> None:
    """{group: {bar: its values}}: medians, with whiskers from the lowest to the highest; `level` to compare with."""
    bars = list(dict.fromkeys(bar for found in groups.values() for bar in found))
    width = 0.84 / len(bars)
    with drawn(path, width=2.4 + 2.6 * len(groups)) as (figure, [axis]):
        for index, bar in enumerate(bars):
            present = [(place, found[bar]) for place, found in enumerate(groups.values()) if found.get(bar)]
            middles = [median(values) for _, values in present]
            below = [middle - min(values) for middle, (_, values) in zip(middles, present, strict=True)]
            above = [max(values) - middle for middle, (_, values) in zip(middles, present, strict=True)]
            places = [place + (index - (len(bars) - 1) / 2) * width for place, _ in present]
            axis.bar(places, middles, width * 0.92, yerr=(below, above), label=bar, color=f"C{index}", capsize=2)
            for place, middle, rest in zip(places, middles, above, strict=True):
                text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
                axis.annotate(text, (place, middle + rest), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        if level is not None:
            axis.axhline(level, color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.set_ylabel(label)
        axis.grid(visible=False, axis="x")
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.tight_layout()


def draw_shares(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """{panel: {bar: {part: share of the whole}}}: bars that lie, one part behind the other."""
    shares = [share for bars in panels.values() for bar in bars.values() for share in bar.items()]
    parts = list(dict.fromkeys(part for part, share in shares if share))
    height = 1.4 + 0.42 * max(len(bars) for bars in panels.values())
    with drawn(path, len(panels), width=7.0, height=height) as (figure, axes):
        for axis, (title, bars) in zip(axes, panels.items(), strict=True):
            for place, bar in enumerate(bars.values()):
                begin = 0.0
                for part, share in ((part, share) for part, share in bar.items() if share):
                    axis.barh(place, share, left=begin, height=0.7, color=f"C{parts.index(part)}")
                    if share > 0.06:
                        axis.annotate(f"{share:.0%}", (begin + share / 2, place), ha="center", va="center", fontsize=7)
                    begin += share
            axis.set_yticks(range(len(bars)), list(bars))
            axis.invert_yaxis()
            axis.grid(visible=False)
            axis.set(title=title, xlim=(0, 1), xlabel="share of the time")
        swatches = [axes[0].barh(0, 0, color=f"C{index}") for index in range(len(parts))]
        figure.legend(swatches, parts, loc="lower center", ncols=len(parts), frameon=False, fontsize=8)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
