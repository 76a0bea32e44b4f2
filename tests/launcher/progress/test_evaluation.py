"""What an evaluation says, against enumeration and numbers worked out by hand."""

import io
import json
import math
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from darts_async.config import RunConfig
from darts_async.protocol import EvaluationCompleted
from launcher.display.summary import summarise, summary_screen
from launcher.display.view import run_screen
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.plan.plan import plan_run
from launcher.progress.evaluation import Evaluation, evaluation_text, gain_between, pass_at_k
from launcher.progress.run_view import RunView
from launcher.progress.step_merger import StepLine
from launcher.sinks.recorder import Recorder


def report(version: int, rewards: list[float], newest: int | None = None, num_skipped: int = 0) -> EvaluationCompleted:
    """Two samples of each prompt, 10 and 14 tokens long for the first, 20 tokens for all others."""
    ids = np.arange(len(rewards)) // 2
    lengths = np.array([10, 14, *[20] * (len(rewards) - 2)], np.int32)
    newest = version if newest is None else newest
    return EvaluationCompleted(version, ids, np.array(rewards, np.float32), lengths, newest, num_skipped)


def shown(renderable: RenderableType) -> str:
    output = io.StringIO()
    Console(file=output, width=120).print(renderable)
    return output.getvalue()


def new_view(*reports: EvaluationCompleted, total_steps: int = 10) -> RunView:
    config = RunConfig()
    plan = plan_run(config, Path("/runs/demo"), ["tcp://127.0.0.1:1"] * 6)
    view = RunView(plan, name="demo", run_dir="/runs/demo", total_steps=total_steps, now_s=0.0)
    for each in reports:
        view.take_evaluation(each)
    return view


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_all_draws_of_k_in_which_one_passes(passed: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(passed)))
    draws = [any(draw) for draw in combinations(passed, k)]
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(draws) / len(draws))


def test_pass_at_k_stays_exact_where_factorials_overflow_a_float() -> None:
    assert pass_at_k(1024, 1, 512) == pytest.approx(0.5)
    assert pass_at_k(1024, 0, 1024) == 0.0
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(4, 2, 5)


def test_the_numbers_of_an_evaluation_are_those_worked_out_by_hand() -> None:
    summary = Evaluation.of(report(3, [1.0, 0.5, 0.6, 1.0, 0.0, -1.0], newest=5)).summary()
    assert summary.pass_at == pytest.approx({1: 0.5, 2: 2 / 3})  # 1, 2 and 0 of 2 pass: half a point does not
    assert summary.reward == pytest.approx(0.35)
    # prompt means .75, .8, -.5: standard deviation .7365, over sqrt(3)
    assert summary.reward_standard_error == pytest.approx(0.42525, rel=1e-4)
    assert summary.length_std_within_prompt == pytest.approx(2.82843 / 3, rel=1e-5)
    assert (summary.num_samples, summary.length_mean, summary.length_p50) == (6, pytest.approx(104 / 6), 20)


def test_a_prompt_with_fewer_judged_samples_is_left_out_of_the_larger_k_alone() -> None:
    ids, rewards = np.array([0, 0, 0, 0, 1, 1, 1, 2]), np.array([1, 0, 0, 0, 1, 1, 0, 0], np.float32)
    message = EvaluationCompleted(0, ids, rewards, np.full(8, 9, np.int32), 0)
    assert Evaluation.of(message).summary().pass_at == pytest.approx(
        {1: (1 / 4 + 2 / 3 + 0) / 3, 2: (1 / 2 + 1) / 2, 4: 1.0}
    )


def test_of_one_sample_there_are_no_errors_and_no_spreads() -> None:
    message = EvaluationCompleted(2, np.array([7]), np.array([1.0], np.float32), np.array([5], np.int32), 2)
    evaluation = Evaluation.of(message)
    assert evaluation.summary().metrics() == {
        "reward/mean": 1.0,
        "pass@1": 1.0,
        "length/mean": 5.0,
        "length/p50": 5.0,
        "length/p99": 5.0,
    }
    assert evaluation_text(evaluation.summary()) == (
        "held-out prompts at version 2  reward 1.000  pass@1 1.000  length 5.0"
    )
    assert gain_between(evaluation, evaluation).standard_error is None


def test_the_line_of_an_evaluation_says_which_versions_and_what_was_skipped() -> None:
    text = evaluation_text(Evaluation.of(report(4, [1, 0, 1, 1], newest=6, num_skipped=2)).summary())
    assert text == (
        "held-out prompts at version 4  reward 0.750 ± 0.250  pass@1 0.750  pass@2 1.000  length 16.0  "
        "versions up to 6  2 skipped meanwhile"
    )


def test_metrics_have_the_numbers_and_those_of_each_sample(tmp_path: Path) -> None:
    Recorder(tmp_path, 10.0).evaluation(Evaluation.of(report(4, [1, 0, 1, 1], newest=6, num_skipped=1)), 12.5)
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    expected = {"type": "evaluation", "policy_version": 4, "newest_version": 6, "num_skipped": 1, "elapsed_s": 2.5}
    assert expected.items() <= line.items()
    assert (line["pass@1"], line["pass@2"], line["reward/standard_error"]) == pytest.approx((0.75, 1.0, 0.25))
    assert (line["rewards"], line["num_tokens"]) == ([1, 0, 1, 1], [10, 14, 20, 20])


def test_every_line_of_the_metrics_is_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    largest = float(np.finfo(np.float32).max)
    recorder = Recorder(tmp_path, 0.0)
    metrics = {"learner/grad_norm": math.nan, "reward/pool_mean": math.inf, "learner/loss": 0.5}
    recorder.step(StepLine(3, metrics), 1.0)
    recorder.evaluation(Evaluation.of(report(4, [largest] * 6)), 1.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    step, evaluation = (json.loads(line, parse_constant=refused) for line in lines)
    assert step.pop("unix_s") > 0
    assert step == {"type": "step", "step": 3, "learner/loss": 0.5, "elapsed_s": 1.0}
    assert evaluation["reward/mean"] == pytest.approx(largest)


def test_the_live_view_shows_the_course_of_the_held_out_reward_before_the_first_step_and_on() -> None:
    view = new_view(report(0, [0, 0, 1, 0]))
    assert "held-out" not in shown(run_screen(new_view(), 1.0))
    assert "0.250  ▄  from 0.250, at version 0" in shown(run_screen(view, 1.0))
    view.take_evaluation(report(5, [1, 0, 1, 0], newest=7))
    assert "0.500  ▁█  from 0.250, at version 5" in shown(run_screen(view, 1.0))
    assert not view.notices


def test_the_summary_holds_first_against_last_and_shows_all_in_one_line() -> None:
    reports = report(0, [0, 0, 1, 0]), report(5, [1, 0, 1, 1], newest=8, num_skipped=3), report(10, [1, 0, 1, 0])
    summary = summarise(new_view(*reports), RunOutcome("finished", "why"), model_path=None, now_s=9.0)
    assert [evaluation.policy_version for evaluation in summary.evaluations] == [0, 5, 10]
    text = shown(summary_screen(summary))
    for part in (
        "before",
        "after",
        "+0.250 ± 0.250",
        "pass@2",
        "▁█▅  reward at versions 0 to 10: 3 evaluations, 3 skipped",
    ):
        assert part in text


def test_the_last_evaluation_of_a_run_that_was_stopped_is_not_called_the_one_after_it() -> None:
    view = new_view(report(0, [0, 0, 1, 0]), report(5, [1, 0, 1, 1]))
    text = shown(summary_screen(summarise(view, RunOutcome("stopped", "why"), model_path=None, now_s=9.0)))
    assert "last" in text
    assert "after" not in text
    assert "evaluations" not in text, "two are in the table"


def test_each_set_of_prompts_has_its_own_numbers() -> None:
    message = msgspec.structs.replace(
        report(3, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), prompts_by_set={"a": [0, 1], "b": [2, 9]}
    )
    evaluation = Evaluation.of(message)
    summary = evaluation.summary()
    assert summary.reward == pytest.approx(0.5)
    assert {name: each.reward for name, each in summary.sets.items()} == {"a": 0.75, "b": 0.0}
    metrics = summary.metrics()
    assert metrics["sets/a/pass@2"] == 1.0
    assert metrics["sets/a/length/mean"] == 16.0
    assert metrics["sets/b/reward/mean"] == 0.0
    assert "of which a 0.750, b 0.000" in evaluation_text(summary)
    assert msgspec.json.decode(msgspec.json.encode(summary), type=type(summary)) == summary


def test_a_set_without_rewards_has_no_numbers_and_one_set_is_not_told_apart() -> None:
    message = msgspec.structs.replace(report(3, [1.0, 0.0]), prompts_by_set={"a": [0], "b": [5]})
    assert [*Evaluation.of(message).summary().sets] == ["a"]
    assert Evaluation.of(report(3, [1.0, 0.0])).summary().sets == {}


def test_a_sample_passes_with_a_reward_above_the_setting() -> None:
    graded = report(3, [0.4, 0.6, 0.9, 1.0])
    assert Evaluation.of(graded).summary().pass_at[1] == pytest.approx(0.75)
    assert Evaluation.of(msgspec.structs.replace(graded, pass_above=0.9)).summary().pass_at[1] == pytest.approx(0.25)


def test_a_run_that_only_evaluates_is_shown_as_one() -> None:
    message = msgspec.structs.replace(report(0, [1.0, 1.0, 0.0, 1.0]), prompts_by_set={"sums": [0], "products": [1]})
    view = new_view(message, total_steps=0)
    assert "evaluating, without steps" in shown(run_screen(view, 1.0))
    summary = summarise(view, RunOutcome("finished", "why"), model_path=None, now_s=9.0)
    text = shown(summary_screen(summary))
    assert "finished: no steps, an evaluation in" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["sums"][:3] == ["1.000", "1.000", "1.000"]
    assert rows["products"][:3] == ["0.500", "0.500", "1.000"]
    assert rows["all"][:5] == ["0.750", "±", "0.250", "0.750", "1.000"]
    assert "before" not in text


def test_what_several_reward_functions_gave_is_in_the_line_and_read_back() -> None:
    message = msgspec.structs.replace(report(4, [1, 0, 1, 1]), part_metrics={"rewards/right/mean": 0.75})
    evaluation = Evaluation.of(message)
    line = evaluation.summary().metrics()
    assert line["rewards/right/mean"] == 0.75
    arrays = {name: getattr(evaluation, name).tolist() for name in ("prompt_ids", "rewards", "num_tokens")}
    numbers = {"policy_version": 4, "newest_version": 4, "num_skipped": 0, "pass_above": 0.5, "prompts_by_set": {}}
    assert Evaluation.of_line(line | arrays | numbers).summary() == evaluation.summary()
