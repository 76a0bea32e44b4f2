"""The totals of a run that has ended: as numbers (`summarise`, pure), and as a screen.

Every decoded token has exactly one outcome, so

    trained + cancelled + filtered + stale + abandoned + evaluated = decoded

The left side is the shaper's ledger, the right side the generators' own counters. For a generator that ended early, the
right side counts the tokens that the shaper received. The summary shows whether both sides agree.
"""

from pathlib import Path

import msgspec
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from darts_async.protocol import RunFinished
from darts_async.reward.worker_messages import failure_text
from darts_async.topology.outcomes import EVALUATED, OUTCOMES
from launcher.display.view import bar, clock, plain_table, sparkline
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.progress.evaluation import EvaluationSummary, Gain, gain_between
from launcher.progress.run_view import IDLE_STAGE, RunView

STALL_STAGE = "swap"
"""The stage in which a generator installs weights and decodes nothing."""
_BAR_WIDTH = 24


class TokenAccount(msgspec.Struct, frozen=True):
    """Where the decoded tokens went."""

    by_outcome: dict[str, int]
    evaluated: int
    accounted: int
    decoded: int
    """The engines' own count; for engines that ended early, the tokens that were received."""
    of_ended_early: int = 0
    """The part of `decoded` by generators that died or were restarted."""

    @property
    def balanced(self) -> bool:
        return self.accounted == self.decoded


class RewardAccount(msgspec.Struct, frozen=True):
    """How many responses were scored, and how many of them have no reward."""

    num_responses: int
    failed: dict[str, int]
    first_failures: dict[str, str]

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())


class ProcessTime(msgspec.Struct, frozen=True):
    """How the last incarnation of a process spent its time."""

    name: str
    uptime_s: float
    busy_s: dict[str, float]
    idle_s: float
    loop_lag_max_s: float
    restarts: int = 0


class Summary(msgspec.Struct, frozen=True):
    """Everything that `summary.json` holds."""

    name: str
    status: str
    reason: str
    duration_s: float
    num_steps: int
    total_steps: int
    before: EvaluationSummary | None
    after: EvaluationSummary | None
    gain: Gain | None
    evaluations: list[EvaluationSummary]
    tokens: TokenAccount | None
    rewards: RewardAccount | None
    samples_by_outcome: dict[str, int]
    tokens_by_staleness: dict[int, int]
    processes: list[ProcessTime]
    weight_stall_s: dict[str, float]
    """Time in which each generator did not decode because of weight updates."""
    run_dir: str
    model_path: str | None


def summarise(view: RunView, outcome: RunOutcome, *, model_path: Path | None, now_s: float) -> Summary:
    summaries, finished = list(view.evaluations.values()), view.finished
    first, last, several = view.first_evaluation, view.last_evaluation, len(summaries) > 1
    return Summary(
        name=view.name,
        status=outcome.status,
        reason=outcome.reason,
        duration_s=now_s - view.started_at_s,
        num_steps=max(view.num_steps, finished.num_steps if finished is not None else 0),
        total_steps=view.total_steps,
        before=summaries[0] if summaries else None,
        after=summaries[-1] if several else None,
        gain=gain_between(first, last) if first is not None and last is not None and several else None,
        evaluations=summaries,
        tokens=_tokens(view, finished) if finished else None,
        rewards=_rewards(finished) if finished else None,
        samples_by_outcome=finished.samples_by_outcome if finished else {},
        tokens_by_staleness=finished.tokens_by_staleness if finished else {},
        processes=[
            ProcessTime(
                name=row.name,
                uptime_s=row.uptime_s,
                busy_s={stage: seconds for stage, seconds in row.busy_s.items() if stage != IDLE_STAGE},
                idle_s=row.idle_s,
                loop_lag_max_s=row.loop_lag_max_s,
                restarts=row.restarts,
            )
            for row in view.rows.values()
            if row.uptime_s > 0
        ],
        weight_stall_s={row.name: row.busy_s[STALL_STAGE] for row in view.rows.values() if STALL_STAGE in row.busy_s},
        run_dir=view.run_dir,
        model_path=str(model_path) if model_path is not None else None,
    )


def _rewards(finished: RunFinished) -> RewardAccount:
    return RewardAccount(finished.num_rewards, finished.failed_rewards, finished.first_failures)


def _tokens(view: RunView, finished: RunFinished) -> TokenAccount:
    of_ended_early = view.tokens_received(finished.tokens_by_generator)
    return token_account(finished.tokens_by_outcome, view.tokens_decoded + of_ended_early, of_ended_early)


def token_account(tokens_by_outcome: dict[str, int], decoded: int, of_ended_early: int = 0) -> TokenAccount:
    """Compare the outcomes with what the engines counted. Outcomes with other names count too."""
    evaluated = tokens_by_outcome.get(EVALUATED, 0)
    by_outcome: dict[str, int] = {
        outcome: tokens_by_outcome.get(outcome, 0) for outcome in OUTCOMES if outcome != EVALUATED
    }
    by_outcome |= {outcome: count for outcome, count in tokens_by_outcome.items() if outcome not in OUTCOMES}
    return TokenAccount(by_outcome, evaluated, sum(by_outcome.values()) + evaluated, decoded, of_ended_early)


# --- the screen ----------------------------------------------------------------------------------------------


def summary_screen(summary: Summary) -> RenderableType:
    """The totals as a screen, shown at the end of a run."""
    parts: list[RenderableType] = [_title(summary)]
    if summary.before is not None:
        parts += ["", _evaluation_table(summary) if summary.total_steps else _sets_table(summary.before)]
    if len(summary.evaluations) > 2:
        parts.append(_all_evaluations(summary.evaluations))
    if summary.tokens is not None and max(summary.tokens.accounted, summary.tokens.decoded) > 0:
        by_outcome = summary.tokens.by_outcome | {EVALUATED: summary.tokens.evaluated}
        parts += ["", _share_table("tokens", by_outcome), _balance(summary.tokens)]
    if summary.rewards is not None and summary.rewards.num_failed:
        parts += ["", *_failed_rewards(summary.rewards)]
    if summary.tokens_by_staleness:
        counts = sorted(summary.tokens_by_staleness.items())
        by_staleness = {f"{age} version{'' if age == 1 else 's'}": count for age, count in counts}
        parts += ["", _share_table("staleness", by_staleness)]
    if summary.processes:
        parts += ["", _time_table(summary)]
    return Padding(Group(*parts, "", _places(summary)), (1, 2))


def _title(summary: Summary) -> Text:
    mark, style = {"finished": ("✓", "green"), "stopped": ("■", "yellow")}.get(summary.status, ("✗", "red"))
    done = f"{summary.num_steps} of {summary.total_steps} steps" if summary.total_steps else "no steps, an evaluation"
    took = clock(summary.duration_s)
    return Text.assemble((f"{mark} ", style), (summary.name, "bold"), f" {summary.status}: {done} in {took}")


def _table(*columns: str, title: str) -> Table:
    table = plain_table(title, *columns, gap=3, numbers=columns)
    table.columns[0].min_width = 14
    return table


def _evaluation_table(summary: Summary) -> Table:
    before, after, gain = summary.before, summary.after, summary.gain
    assert before is not None
    is_whole = after is None or after.policy_version == summary.total_steps
    table = _table("before", "after" if is_whole else "last", "change", title="held-out")
    error = f" ± {gain.standard_error:.3f}" if gain and gain.standard_error is not None else ""
    change = Text(f"{gain.reward:+.3f}{error}", style="green" if gain.reward > 0 else "red") if gain else Text("")
    table.add_row("reward", f"{before.reward:.3f}", f"{after.reward:.3f}" if after else "", change)
    for k, first in before.headline_pass_at.items():
        _add_change(table, f"pass@{k}", first, after.pass_at.get(k) if after else None, ".3f")
    for label, name in (
        ("length, mean", "length_mean"),
        ("  std in prompt", "length_std_within_prompt"),
        ("  p50", "length_p50"),
        ("  p99", "length_p99"),
    ):
        _add_change(table, label, getattr(before, name), getattr(after, name, None), ",.1f")
    for name, of_set in before.sets.items():
        last = after.sets.get(name) if after else None
        _add_change(table, f"reward, {name}", of_set.reward, last.reward if last else None, ".3f")
    return table


def _sets_table(evaluation: EvaluationSummary) -> Table:
    """One evaluation: a row for each set of prompts, and one for all of them."""
    ks = evaluation.headline_pass_at
    table = _table("reward", *(f"pass@{k}" for k in ks), "length", "  std in prompt", title="held-out")
    rows = {**evaluation.sets, "all" if evaluation.sets else "": evaluation}
    for name, of in rows.items():
        error, spread = of.reward_standard_error, of.length_std_within_prompt
        table.add_row(
            name,
            f"{of.reward:.3f}" + (f" ± {error:.3f}" if error is not None else ""),
            *(f"{of.pass_at[k]:.3f}" if k in of.pass_at else "" for k in ks),
            f"{of.length_mean:,.1f}",
            f"{spread:,.1f}" if spread is not None else "",
        )
    return table


def _add_change(table: Table, label: str, first: float | None, last: float | None, form: str) -> None:
    if first is not None:
        values = (f"{last:{form}}", f"{last - first:+{form}}") if last is not None else ("", "")
        table.add_row(label, f"{first:{form}}", *values)


def _all_evaluations(evaluations: list[EvaluationSummary]) -> Text:
    num_skipped = sum(evaluation.num_skipped for evaluation in evaluations)
    skipped = f", {num_skipped} skipped" if num_skipped else ""
    first, last = evaluations[0].policy_version, evaluations[-1].policy_version
    return Text.assemble(
        (sparkline([evaluation.reward for evaluation in evaluations], _BAR_WIDTH), "cyan"),
        (f"  reward at versions {first} to {last}: {len(evaluations)} evaluations{skipped}", "dim"),
    )


def _share_table(title: str, counts: dict[str, int]) -> Table:
    table = _table("count", "share", title=title)
    table.add_column("")
    total = sum(counts.values())
    for label, count in counts.items():
        share = count / total if total else 0.0
        table.add_row(label, f"{count:,}", f"{share:.1%}", bar(share, _BAR_WIDTH))
    return table


def _balance(tokens: TokenAccount) -> Text:
    if tokens.balanced:
        early = f", {tokens.of_ended_early:,} of them before they were restarted" if tokens.of_ended_early else ""
        return Text.assemble(
            ("✓ ", "green"), f"the outcomes add up to the {tokens.decoded:,} tokens that the engines decoded{early}"
        )
    difference = tokens.accounted - tokens.decoded
    return Text.assemble(
        ("✗ ", "red"),
        f"the outcomes add up to {tokens.accounted:,} tokens, but the engines decoded {tokens.decoded:,} "
        f"({difference:+,})",
    )


def _failed_rewards(rewards: RewardAccount) -> list[Text]:
    """A line of numbers, and the message of the first failure of each kind."""
    by_kind = ", ".join(
        f"{count:,} {kind}" for kind, count in sorted(rewards.failed.items(), key=lambda pair: -pair[1])
    )
    share = rewards.num_failed / rewards.num_responses
    line = f"{rewards.num_failed:,} of {rewards.num_responses:,} rewards failed ({share:.1%}): {by_kind}"
    said = [Text(f"  first {failure_text(kind, error)}", style="dim") for kind, error in rewards.first_failures.items()]
    return [Text.assemble(("! ", "yellow"), line), *said]


def _time_table(summary: Summary) -> Table:
    table = _table("restarts", "up", "idle", title="time")
    table.add_column("busy, by stage")
    for row in summary.processes:
        stages = sorted(row.busy_s.items(), key=lambda item: -item[1])
        shown = " · ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in stages if seconds >= 0.05)
        restarts = Text(str(row.restarts), style="yellow" if row.restarts else "dim")
        table.add_row(
            row.name, restarts, clock(row.uptime_s), f"{row.idle_s / row.uptime_s:.0%}", Text(shown, style="dim")
        )
    if summary.weight_stall_s:
        stall_s = max(summary.weight_stall_s.values())
        table.add_row(
            "weight stall", "", f"{stall_s:.2f} s", "", Text("longest pause of decoding in one generator", style="dim")
        )
    return table


def _places(summary: Summary) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(min_width=14, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("run", summary.run_dir)
    if summary.model_path is not None:
        grid.add_row("model", summary.model_path)
    return grid
