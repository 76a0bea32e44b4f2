"""`darts-launch report`: one self-contained HTML page about a run."""

from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from darts_async.errors import ConfigError
from darts_async.rollouts import Rollout, best_and_worst
from launcher.analysis.report_plots import figures, stage_rows
from launcher.analysis.rollouts import RunRollouts
from launcher.analysis.run_data import RunData, gather
from launcher.display.rollouts import about, excerpt
from launcher.terminal import printable

REPORT_FILE = "report.html"
_PROMPT_CHARS, _RESPONSE_CHARS = 400, 1200


def write_report(run_dir: Path, out: Path) -> None:
    """Write the page of a run, live or over.

    Raises:
        ConfigError: the run has nothing to report, matplotlib is not installed, or the file cannot be written.
    """
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
        "about": printable(about(rollout).plain),
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
