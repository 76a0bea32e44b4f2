"""Speed-ups of `bench.emulated` as bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median


def draw(path: Path, speed_ups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """{workload: {arm: one for each seed}}; bars are medians, whiskers the range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(arm for found in speed_ups.values() for arm in found))
    figure, axis = plt.subplots(figsize=(2.2 + 2.6 * len(speed_ups), 4.2))
    width = 0.84 / len(arms)
    for index, arm in enumerate(arms):
        places, heights, below, above = [], [], [], []
        for group, found in enumerate(speed_ups.values()):
            if arm in found:
                middle = median(found[arm])
                places.append(group + (index - (len(arms) - 1) / 2) * width)
                heights.append(middle)
                below.append(middle - min(found[arm]))
                above.append(max(found[arm]) - middle)
        axis.bar(places, heights, width * 0.92, yerr=(below, above), label=arm, color=f"C{index}", capsize=2)
        for place, height in zip(places, heights, strict=True):
            axis.annotate(f"{height:.2f}", (place, height), ha="center", va="bottom", fontsize=7)
    axis.axhline(1.0, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(speed_ups)), [f"{name} accelerators" for name in speed_ups])
    axis.set_ylabel("groups trained per hour, over synchronous")
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
