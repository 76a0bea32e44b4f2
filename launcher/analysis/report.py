"""`darts-launch report`: one self-contained HTML page about a run, with figures by matplotlib (extra `report`)."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment

from darts_async.errors import ConfigError
from darts_async.rollouts import Rollout, best_and_worst
from darts_async.topology.outcomes import OUTCOMES
from launcher.analysis.rollouts import RunRollouts
from launcher.analysis.run_data import RunData, gather
from launcher.display.rollouts import excerpt, one_line
from launcher.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "trained": "#2a9d5c",
    "cancelled": "#e9a23b",
    "filtered": "#8a7fc4",
    "stale": "#c94f4f",
    "abandoned": "#222222",
    "evaluated": "#5b9bd5",
}
_BUSY, _IDLE, _AWAY = "#3f7fbf", "#e3e6ea", "#c94f4f"
_BANDS = ((1, 99, 0.15), (10, 90, 0.25), (25, 75, 0.35))
_MAX_BINS = 60
REPORT_FILE = "report.html"
_PROMPT_CHARS, _RESPONSE_CHARS = 400, 1200


def write_report(run_dir: Path, out: Path) -> None:
    """Write the page. Raises `ConfigError` without data or matplotlib, or if the file cannot be written."""
    data = gather(run_dir)
    page = _page(data)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; --out names another file") from error


def _page(data: RunData) -> str:
    template = Environment(autoescape=True).from_string((files("launcher") / "report.html").read_text("utf-8"))
    return template.render(
        title=data.summary.name if data.summary else data.run_dir.name,
        status=data.record.status,
        reason=data.record.reason,
        run_dir=data.run_dir,
        facts=_facts(data),
        figures=figures(data),
        rows=stage_rows(data),
        away=data.away,
        samples=_samples(data.run_dir),
    )


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of samples of an early and a late step; none where no rollouts were kept."""
    reader = RunRollouts(run_dir)
    try:
        steps = reader.numbers("train")
        chosen = sorted({steps[0], reader.newest("train")}) if steps else []
    except ConfigError:
        return []
    return [_row(rollout) for step in chosen for rollout in _telling(reader.of("train", step))]


def _telling(rollouts: list[Rollout]) -> list[Rollout]:
    """The best, the worst, and the longest that was cancelled."""
    cancelled = [rollout for rollout in rollouts if rollout.outcome == "cancelled"]
    longest = [max(cancelled, key=lambda rollout: rollout.length)] if cancelled else []
    return [*best_and_worst(rollouts), *longest]


def _row(rollout: Rollout) -> dict[str, Any]:
    return {
        "step": rollout.step,
        "about": printable(one_line(rollout).plain),
        "prompt": printable(excerpt(rollout.prompt, _PROMPT_CHARS)),
        "text": printable(excerpt(rollout.text, _RESPONSE_CHARS)),
    }


def _facts(data: RunData) -> list[tuple[str, str]]:
    """The numbers at the top. Those of the summary appear once there is one."""
    facts = [
        ("started", datetime.fromtimestamp(data.record.started_at_s).strftime("%Y-%m-%d %H:%M:%S")),
        ("steps", f"{len(data.steps):,}"),
        ("samples ended", f"{len(data.ended):,}, of which {len(data.trained):,} were trained on"),
    ]
    summary = data.summary
    if summary is None:
        return facts
    facts.append(("duration", f"{summary.duration_s:,.0f} s"))
    if summary.before is not None and summary.after is not None:
        facts.append(("held-out reward", f"{summary.before.reward:.3f} before, {summary.after.reward:.3f} after"))
        facts.append(
            ("held-out length", f"{summary.before.length_mean:.1f} before, {summary.after.length_mean:.1f} after")
        )
    if summary.tokens is not None:
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in summary.tokens.by_outcome.items() if count)
        facts.append(
            ("tokens decoded", f"{summary.tokens.decoded:,}: {outcomes}, {summary.tokens.evaluated:,} evaluated")
        )
    if summary.weight_stall_s:
        longest = max(summary.weight_stall_s.values())
        facts.append(("decoding paused for weights", f"{longest:.2f} s, in the generator with the longest pauses"))
    return facts


# --- the figures ---------------------------------------------------------------------------------------------


def figures(data: RunData) -> list[tuple[str, str, str]]:
    """(title, caption, SVG) of each figure. Raises `ConfigError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "darts-launch report draws with matplotlib, which is not installed: pip install 'darts-async[report]'"
        ) from error
    found = []
    for title, about, draw in PLOTS:
        height = 1.2 + 0.32 * max(1, len(data.spent)) if draw is _time else 3.2
        figure = Figure(figsize=(9.0, height), layout="constrained")
        axes = figure.subplots()
        draw(axes, data)
        axes.spines[["top", "right"]].set_visible(False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
        svg = picture.getvalue()
        found.append((title, about, svg[svg.index("<svg") :]))
    return found


def _reward(axes: "Axes", data: RunData) -> None:
    for name, label, colour in (
        ("reward/pool_mean", "all scored samples", "#9aa3ad"),
        ("reward/mean", "trained", "#2a9d5c"),
    ):
        axes.plot(*data.series(name), label=label, color=colour, linewidth=1.2)
    held_out = [(e["policy_version"], e["reward/mean"], e.get("reward/standard_error", 0.0)) for e in data.evaluations]
    if held_out:
        versions, rewards, errors = zip(*held_out, strict=True)
        axes.errorbar(versions, rewards, yerr=errors, fmt="o-", color="#1f4e79", label="held out", capsize=3)
    axes.set(xlabel="step", ylabel="mean reward")
    axes.legend(frameon=False)


def _lengths(axes: "Axes", data: RunData) -> None:
    """Quantiles of the samples that were trained on, and the mean of all scored samples."""
    by_step: dict[int, list[int]] = {}
    for each in data.trained:
        assert each.step is not None
        by_step.setdefault(each.step, []).append(each.num_tokens)
    steps = sorted(by_step)
    for low, high, strength in _BANDS:
        edges = [np.percentile(by_step[step], (low, high)) for step in steps]
        below, above = (np.array(edges).reshape(-1, 2)).T
        axes.fill_between(steps, below, above, color="#3f7fbf", alpha=strength, linewidth=0, label=f"{low} to {high} %")
    axes.plot(steps, [np.median(by_step[step]) for step in steps], color="#1f4e79", label="median")
    axes.plot(*data.series("length/pool_mean"), color="#e9a23b", linewidth=1, label="mean of all scored samples")
    axes.set(xlabel="step", ylabel="tokens of a sample trained on")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=2)


def _staleness(axes: "Axes", data: RunData) -> None:
    axes.plot(*data.series("staleness/max"), drawstyle="steps-mid", color="#c94f4f", label="oldest token of the step")
    axes.plot(*data.series("staleness/mean"), color="#1f4e79", label="mean over samples of their oldest token")
    axes.set(xlabel="step", ylabel="versions")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _outcomes(axes: "Axes", data: RunData) -> None:
    """Of the samples as they ended, in as many bins as are legible."""
    outcomes = [outcome for outcome in OUTCOMES if any(each.outcome == outcome for each in data.ended)]
    num_bins = max(1, min(_MAX_BINS, len(data.ended) // 20))
    bins = np.array_split(np.arange(len(data.ended)), num_bins)
    counts = [Counter[str]() for _ in bins]
    for count, places in zip(counts, bins, strict=True):
        for place in places.tolist():
            count[data.ended[place].outcome] += data.ended[place].num_tokens
    totals = np.array([max(1, count.total()) for count in counts])
    ends = np.array([places[-1] + 1 for places in bins])
    bottom = np.zeros(len(bins))
    for outcome in outcomes:
        shares = np.array([count[outcome] for count in counts]) / totals
        width = np.diff(ends, prepend=0)
        axes.bar(ends - width / 2, shares, width, bottom, color=_COLOURS[outcome], label=outcome)
        bottom += shares
    axes.set(xlabel="samples, in the order in which they ended", ylabel="share of their tokens", ylim=(0, 1))
    axes.legend(frameon=False, ncols=len(outcomes), loc="upper center", bbox_to_anchor=(0.5, 1.12))


def _time(axes: "Axes", data: RunData) -> None:
    if not data.spent:
        axes.text(0.5, 0.5, "no trace (telemetry.trace is off, or it has just begun)", ha="center")
        axes.set_axis_off()
        return
    names = [each.process for each in data.spent][::-1]
    left = np.zeros(len(names))
    for label, colour in (("busy", _BUSY), ("idle", _IDLE), ("away", _AWAY)):
        shares = np.array([each.share(getattr(each, f"{label}_s")) for each in data.spent][::-1])
        axes.barh(names, shares, left=left, color=colour, label=label)
        for place, (begin, share) in enumerate(zip(left, shares, strict=True)):
            if share > 0.06:
                ink = "white" if label != "idle" else "#333333"
                axes.text(begin + share / 2, place, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=8)
        left += shares
    axes.set(xlabel="share of the time from the first version to the last step", xlim=(0, 1))
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12))


PLOTS: Sequence[tuple[str, str, Callable[["Axes", RunData], None]]] = (
    ("Reward", "Held-out samples are fresh and never cut off; error bars are standard errors.", _reward),
    ("Response lengths", "Samples trained on, and the mean of all scored samples.", _lengths),
    ("Staleness", "Policy versions between decoding a token and training on it.", _staleness),
    ("Outcomes", "What happened to the decoded tokens.", _outcomes),
    ("Busy, idle and away", "Shares of the time of each process.", _time),
)


def stage_rows(data: RunData) -> list[dict[str, Any]]:
    """The rows of the table under the last figure."""
    return [
        {
            "process": each.process,
            "shares": [each.share(each.busy_s), each.share(each.idle_s), each.share(each.away_s)],
            "stages": " · ".join(
                f"{stage} {each.share(seconds):.1%}" for stage, seconds in (each.by_stage_s | each.waits_s).items()
            ),
        }
        for each in data.spent
    ]
