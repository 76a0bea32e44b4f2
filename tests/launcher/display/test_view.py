"""What is shown: the live view, the plain lines and the final totals, from plain data."""

import io
import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from darts_async.config import RunConfig
from darts_async.protocol import EvaluationCompleted, ProcessStatus, RunFinished
from darts_async.rollouts import Rollout
from launcher.display.status import run_status, status_screen
from launcher.display.summary import Summary, summarise, summary_screen, token_account
from launcher.display.view import (
    LiveDisplay,
    PlainDisplay,
    bar,
    clock,
    make_display,
    run_screen,
    sparkline,
    state_text,
    step_text,
)
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.nodes.fleet import Fleet
from launcher.nodes.node_messages import NodeStatus
from launcher.nodes.supervisor import ProcessRecord
from launcher.plan.plan import link_addresses, plan_run
from launcher.progress.evaluation import EvaluationSummary
from launcher.progress.run_view import LENGTH_METRIC, MAX_POINTS, REWARD_METRIC, RunView, Trend
from launcher.progress.step_merger import StepLine

PLAN = plan_run(RunConfig(), Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7006)))
OUTCOMES = {"trained": 700, "cancelled": 150, "filtered": 50, "evaluated": 100}


def new_view() -> RunView:
    return RunView(PLAN, name="demo", run_dir="/runs/a", total_steps=10, now_s=100.0)


def status(uptime_s: float, num_tokens: int, busy_s: float) -> ProcessStatus:
    return ProcessStatus("decoding", 4, num_tokens, 64, uptime_s, {"decode": busy_s}, 0.002)


def text_of(renderable: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(renderable)
    return console.export_text()


def line(step: int, reward: float) -> StepLine:
    return StepLine(step, {REWARD_METRIC: reward, LENGTH_METRIC: 100.0 - step})


def test_rates_and_busy_shares_are_of_the_last_seconds() -> None:
    view = new_view()
    for second in range(20):
        view.take_status("generator/0", status(float(second), 100 * second + 1000 * (second > 10), second * 0.5))
    row = view.rows["generator/0"]
    assert row.tokens_per_s == pytest.approx(100.0)
    assert row.busy_share == pytest.approx(0.5)


def test_of_a_generator_that_ended_early_counts_what_was_received_and_of_the_last_one_its_own_count() -> None:
    view = new_view()
    view.take_status("generator/0", status(5.0, 800, 0.0))
    view.take_exit("generator/0", "was ended by SIGKILL", left_cleanly=False)
    view.take_start("generator/0", 2)
    for uptime_s, num_tokens in ((0.1, 0), (1.0, 50)):
        view.take_status("generator/0", status(uptime_s, num_tokens, 0.0))
    assert view.rows["generator/0"].tokens_per_s == pytest.approx(50 / 0.9)
    assert (view.rows["generator/0"].restarts, view.rows["generator/0"].ended) == (1, False)
    received = {"generator/0": {1: 790, 2: 49}}
    assert (view.tokens_decoded, view.tokens_received(received)) == (0, 839)
    view.take_exit("generator/0", "done", left_cleanly=True)
    assert (view.tokens_decoded, view.tokens_received(received)) == (50, 790)


def fleet_with(name: str, pid: int) -> Fleet:
    """A process runs."""
    fleet = Fleet(PLAN, lost_after_s=1.0)
    fleet.start(name, 1)
    record = ProcessRecord(name, pid, 1.0, ())
    fleet.reported("local", 1, NodeStatus(record, [record], []), 0.0)
    return fleet


def test_the_status_and_the_live_view_fit_into_80_columns() -> None:
    view = new_view()
    view.take_start("generator/0", 4)
    view.take_status("generator/0", status(0.0, 0, 0.0))
    view.take_status("generator/0", status(4000.0, 50_000_000, 0.0))
    text = text_of(status_screen(run_status(view, fleet_with("generator/0", 12345), 4200.0, ending=None)), 80)
    row = r"generator/0 +decoding +12345 +4 +12,500 +64 +1:06:40 +3"
    assert re.search(row, text), text
    text = text_of(run_screen(view, 4200.0), 80)
    assert re.search(r"generator/0 +decoding +4 +12,500 +64 .* 3 *\n", text), text


def test_a_process_that_is_away_shows_when_it_comes_back() -> None:
    view = new_view()
    view.take_exit("generator/0", "was ended by SIGKILL", left_cleanly=False)
    view.take_restart("generator/0", 121.2, 120.0)
    assert "restarting in 1.2 s" in text_of(run_screen(view, 120.0))
    assert "restarting in 1.2 s" in text_of(
        status_screen(run_status(view, Fleet(PLAN, lost_after_s=1.0), 120.0, ending=None))
    )
    view.take_start("generator/0", 2)
    text = text_of(run_screen(view, 122.0))
    assert "restarting" not in text
    assert re.search(r"generator/0 +starting, away 2 s .* 1 *\n", text), "the count of restarts"
    view.take_service("generator/0")
    assert "away" not in text_of(run_screen(view, 123.0))


def test_several_generators_are_summed_up_and_one_that_is_away_is_not_counted() -> None:
    config = RunConfig.model_validate({"roles": {"generator": {"replicas": 2}}})
    plan = plan_run(config, Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7006)))
    view = RunView(plan, name="demo", run_dir="/runs/a", total_steps=10, now_s=100.0)
    for name in plan.names("generator"):
        for second in range(3):
            view.take_status(name, status(float(second), 300 * second, 0.0))
    assert re.search(r"generators +2 of 2 +600 +128 *\n", text_of(run_screen(view, 120.0)))
    view.take_exit("generator/0", "done", left_cleanly=False)
    view.take_restart("generator/0", 120.0, 120.0)
    view.take_start("generator/0", 2)
    assert re.search(r"generators +1 of 2 +300 +64 *\n", text_of(run_screen(view, 122.0)))
    view.take_service("generator/0")
    assert re.search(r"generators +2 of 2 +300 +64 *\n", text_of(run_screen(view, 123.0)))


def test_idle_time_is_taken_as_reported_where_stages_overlap() -> None:
    view = new_view()
    for uptime_s in (0.0, 10.0):
        busy_s = {"train": 0.8 * uptime_s, "publish": 0.6 * uptime_s, "idle": 0.1 * uptime_s}
        view.take_status("learner/0", ProcessStatus("training", 1, 0, 0, uptime_s, busy_s, 0.0))
    assert view.rows["learner/0"].busy_share == pytest.approx(0.9)
    assert view.rows["learner/0"].idle_s == pytest.approx(1.0)


def test_a_late_report_joins_its_step() -> None:
    view = new_view()
    assert view.take_step(StepLine(0, {"a": 1.0}), 101.0)
    assert not view.take_step(StepLine(0, {"b": 2.0}), 105.0)
    assert view.num_steps == 1
    assert view.last_step_at_s == 101.0


def test_the_time_left_follows_from_the_steps_after_the_first() -> None:
    view = new_view()
    assert view.remaining_s(150.0) is None
    view.take_step(line(0, 0.1), 160.0)  # the first one includes loading and the evaluation
    assert view.remaining_s(160.0) is None
    view.take_step(line(1, 0.2), 162.0)
    assert view.remaining_s(162.0) == pytest.approx(16.0)
    assert view.remaining_s(163.0) == pytest.approx(15.0)
    assert view.remaining_s(1000.0) == 0.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=1000))
def test_a_trend_is_bounded_and_keeps_the_mean_and_both_ends(values: list[float]) -> None:
    trend = Trend()
    for step, value in enumerate(values):
        trend.add(step, value)
    points = trend.values()
    assert len(points) <= min(len(values), MAX_POINTS)
    assert (trend.first, trend.last) == (values[0], values[-1])
    assert min(values) - 1e-9 <= min(points) <= max(points) <= max(values) + 1e-9
    if len(values) <= MAX_POINTS:
        assert points == values


def test_the_view_of_a_long_run_is_as_small_as_that_of_a_short_one() -> None:
    def size_after(num_steps: int) -> int:
        view = new_view()
        for step in range(num_steps):
            view.take_step(line(step, 0.5), float(step))
        return len(msgspec.msgpack.encode([(trend.first, trend.values()) for trend in view.trends.values()]))

    assert size_after(50_000) <= size_after(MAX_POINTS)


def test_of_many_evaluations_the_samples_of_the_first_and_the_last_are_kept() -> None:
    view = new_view()
    rewards = np.zeros(4, np.float32)
    for version in (4, 0, 8, 2):
        ids, lengths = np.arange(4, dtype=np.int64), np.ones(4, np.int32)
        view.take_evaluation(EvaluationCompleted(version, ids, rewards + version, lengths, version))
    assert list(view.evaluations) == [0, 2, 4, 8]
    assert all(isinstance(each, EvaluationSummary) for each in view.evaluations.values())
    assert view.first_evaluation is not None
    assert view.last_evaluation is not None
    assert (view.first_evaluation.policy_version, view.last_evaluation.policy_version) == (0, 8)


def test_a_process_that_waits_for_room_is_shown_so() -> None:
    view = new_view()
    view.take_exit("shaper/0", "ended with exit code 75", left_cleanly=False)
    view.take_restart("shaper/0", 5.0, 5.0, needs_room=True)
    assert state_text(view.rows["shaper/0"], 9.0) == "waits for space, away 4 s"


def test_a_notice_is_shown_once_and_only_the_last_few() -> None:
    view = new_view()
    for number in (1, 2, 2, 3, 4, 5):
        view.note(f"notice {number}")
    assert list(view.notices) == [f"notice {number}" for number in (2, 3, 4, 5)]


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_the_live_view_shows_processes_trends_and_notices(width: int) -> None:
    view = new_view()
    view.take_status("generator/0", status(1.0, 0, 0.9))
    view.take_status("generator/0", status(2.0, 1234, 1.8))
    for step in range(4):
        view.take_step(line(step, 0.1 * step), 110.0 + step)
    view.take_exit("reward/0", "ended with exit code 1", left_cleanly=False)
    view.note("no step for 60 s")
    text = text_of(run_screen(view, 120.0), width)
    assert all(len(row) <= width for row in text.splitlines())
    assert "no step for 60 s" in text
    if width >= 60:
        assert {"generator/0", "learner/0"} <= {word for row in text.splitlines() for word in row.split()}
        assert "tokens/s" in text
        assert ("restarts" in text) == (width >= 100), "a narrow terminal has fewer columns"
    if width >= 100:
        for part in ("4/10 steps", "0:20", "1,234", "90%", "0.300", "▁▃▆█", "exit code 1", "starting"):
            assert part in text


@pytest.mark.parametrize("width", [40, 60, 140])
def test_two_rollouts_take_few_lines_at_any_width_and_their_texts_are_printable(width: int) -> None:
    view = new_view()
    fields = {
        "kind": "train",
        "step": 3,
        "prompt_id": 1,
        "prompt": "1 + 1 =\n" * 99,
        "outcome": "trained",
        "reward": 0.5,
    }
    long = "one\n\n\ttwo \x1b[2J\u202e 漢字 " * 400
    view.take_rollouts(
        [
            Rollout(sample=f"7/{index}", group_id=7, sample_index=index, text=text, advantage=-1.5, **fields)
            for index, text in enumerate(("short", long))
        ]
    )
    before, text = text_of(run_screen(new_view(), 120.0), width), text_of(run_screen(view, 120.0), width)
    assert all(cell_len(row) <= width for row in text.splitlines())
    num_facts = 2 if width < 60 else 1
    assert len(text.splitlines()) - len(before.splitlines()) == 2 * (1 + num_facts + 1) + 1 + 2, (
        "an empty line, the facts, a line of the prompt, and one or two of the response"
    )
    assert "short" in text
    assert "7/1  trained  reward 0.500" in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text


def test_one_plain_line_per_step() -> None:
    output = io.StringIO()
    view, display = new_view(), PlainDisplay(Console(file=output, width=40))
    view.take_step(line(2, 0.25), 165.0)
    display.refresh(view, 165.0)
    display.step(view, line(2, 0.25), 165.0)
    display.note("[a] notice")
    display.close()
    assert output.getvalue() == "step  3/10  reward 0.250  length 98.0  elapsed 1:05\n[a] notice\n"
    assert step_text(view, StepLine(0, {}), 100.0) == "step  1/10  elapsed 0:00"


def test_the_display_is_live_on_a_terminal_only() -> None:
    assert isinstance(make_display(Console(file=io.StringIO())), PlainDisplay)
    assert isinstance(
        make_display(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})), PlainDisplay
    )
    output = io.StringIO()
    display = make_display(Console(file=output, force_terminal=True, width=100, _environ={"TERM": "xterm"}))
    assert isinstance(display, LiveDisplay)
    display.refresh(new_view(), 101.0)
    display.close()
    display.close()
    assert "generator/0" in output.getvalue()


@given(st.lists(st.floats(), max_size=90), st.integers(1, 50))
def test_a_sparkline_is_never_wider_than_asked(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) <= min(len(values), width)


def test_sparklines_bars_and_clocks() -> None:
    assert sparkline([1, 2, 3, 8], 8) == "▁▂▃█"
    assert sparkline([0, 2, 6, 8], 2) == "▁█"
    assert sparkline([5, 5], 8) == "▄▄"
    assert sparkline([], 8) == ""
    assert bar(0.5, 4).plain == "██  "
    assert bar(7.0, 2).plain == "██"
    assert clock(59.6) == "1:00"
    assert clock(3725) == "1:02:05"


def summary_of(view: RunView, status: str = "finished") -> Summary:
    outcome = RunOutcome(status, "why")  # type: ignore[arg-type]
    return summarise(view, outcome, model_path=Path("/runs/a/model"), now_s=160.0)


def finished_view(decoded: int) -> RunView:
    view = new_view()
    before = EvaluationCompleted(
        0, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0], np.float32), np.array([10, 14, 40, 40], np.int32), 0
    )
    after = EvaluationCompleted(
        10, np.array([0, 0, 1, 1]), np.array([1, 1, 1, 0], np.float32), np.array([10, 10, 20, 24], np.int32), 10
    )
    view.take_evaluation(before)
    view.take_evaluation(after)
    view.take_status("generator/0", status(50.0, decoded, 40.0))
    view.take_exit("generator/0", "done", left_cleanly=True)
    view.finished = RunFinished("why", OUTCOMES, {"trained": 8}, {0: 300, 1: 400}, 10)
    return view


def test_the_gain_and_its_error_are_of_paired_prompts() -> None:
    summary = summary_of(finished_view(1000))
    assert summary.before is not None
    assert summary.gain is not None
    assert summary.gain.reward == pytest.approx(0.5)
    # prompt means before (0, .5), after (1, .5): differences (1, 0), standard deviation .7071, over sqrt(2)
    assert summary.gain.standard_error == pytest.approx(0.5)
    # within the prompts: std(10, 14) = 2.828, std(40, 40) = 0
    assert summary.before.length_std_within_prompt == pytest.approx(1.41421, rel=1e-4)
    assert summary.before.length_mean == 26.0


def test_a_sample_without_a_reward_leaves_the_numbers_of_its_prompt_right() -> None:
    view = finished_view(1000)
    ids, rewards = np.array([0, 0, 1]), np.array([1, 1, 0], np.float32)
    view.take_evaluation(EvaluationCompleted(10, ids, rewards, np.array([10, 14, 40], np.int32), 10))
    summary = summary_of(view)
    assert summary.after is not None
    assert summary.after.length_std_within_prompt == pytest.approx(2.82843, rel=1e-4)  # of the first prompt alone
    assert summary.gain is not None
    # prompt means before (0, .5), after (1, 0): differences (1, -.5), standard deviation 1.0607, over sqrt(2)
    assert summary.gain.standard_error == pytest.approx(0.75)


def test_tokens_that_do_not_add_up_are_said_so() -> None:
    text = text_of(summary_screen(summary_of(finished_view(1000))))
    assert "✓ the outcomes add up to the 1,000 tokens that the engines decoded" in text
    text = text_of(summary_screen(summary_of(finished_view(1025))))
    assert "✗ the outcomes add up to 1,000 tokens, but the engines decoded 1,025 (-25)" in text


def test_failed_rewards_are_a_line_of_the_totals_with_the_first_of_each_kind() -> None:
    view = finished_view(1000)
    assert "rewards" not in text_of(summary_screen(summary_of(view)))
    view.finished = RunFinished(
        "why",
        OUTCOMES,
        {},
        {},
        10,
        {},
        376,
        {"timeout": 5, "raised": 70},
        {"raised": "Traceback\nKeyError: 'x'", "timeout": "?"},
    )
    text = text_of(summary_screen(summary_of(view)))
    assert "75 of 376 rewards failed (19.9%): 70 raised, 5 timeout" in text
    assert "first raised: KeyError: 'x'" in text
    assert json.loads(msgspec.json.encode(summary_of(view)))["rewards"]["failed"] == {"raised": 70, "timeout": 5}


def test_an_outcome_of_another_name_is_not_lost() -> None:
    account = token_account({"trained": 5, "vanished": 3, "evaluated": 2}, 10)
    assert account.by_outcome["vanished"] == 3
    assert account.accounted == 10


def test_the_totals_show_gain_staleness_times_and_places() -> None:
    text = text_of(summary_screen(summary_of(finished_view(1000))))
    for part in ("✓ demo finished", "+0.500 ± 0.500", "1 version ", "57.1%", "decode 40.0 s", "20%", "/runs/a/model"):
        assert part in text


def test_a_run_that_was_stopped_early_has_a_summary_too() -> None:
    summary = summary_of(new_view(), "stopped")
    assert "■ demo stopped: 0 of 10 steps in 1:00" in text_of(summary_screen(summary))
    assert json.loads(msgspec.json.encode(summary))["tokens"] is None
