"""The page for Prometheus is read by its own parser, and says what is known of the run."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from darts_async.config import RunConfig
from darts_async.protocol import EvaluationCompleted, ProcessStatus
from launcher.display.prometheus import prometheus_text
from launcher.plan.plan import link_addresses, plan_run
from launcher.progress.run_view import MAX_LATEST, RunView
from launcher.progress.step_merger import StepLine

PLAN = plan_run(RunConfig(), Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7006)))
GENERATOR = next(spec.name for spec in PLAN.processes if spec.name.startswith("generator"))


def new_view(name: str = "demo") -> RunView:
    return RunView(PLAN, name=name, run_dir="/runs/demo-1", total_steps=10, now_s=100.0)


def read(view: RunView) -> dict[tuple[str, str], float]:
    """{(name, labels): value}, as Prometheus reads it."""
    families = list(text_string_to_metric_families(prometheus_text(view, 160.0)))
    names = [family.name for family in families]
    assert len(set(names)) == len(names), "no name comes twice"
    assert all(family.documentation for family in families)
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_run_that_has_just_begun_has_its_own_numbers() -> None:
    found = read(new_view())
    assert found["darts_run_info", "demo,demo-1"] == 1.0
    assert found["darts_run_elapsed_seconds", ""] == 60.0
    assert (found["darts_run_completed_steps", ""], found["darts_run_planned_steps", ""]) == (0.0, 10.0)
    assert found["darts_process_up", GENERATOR] == 1.0
    assert ("darts_run_last_step_age_seconds", "") not in found


def test_metrics_have_their_unit_in_their_name() -> None:
    view = new_view()
    view.take_step(
        StepLine(3, {"reward/pool_mean": 0.5, "length/p99": 80.0, "groups/zero_advantage_share": 0.25}), 150.0
    )
    view.take_step(StepLine(3, {"weights/total_s": 0.125, "weights/num_bytes": 512.0, "learner/mine": 7.0}), 151.0)
    samples = np.array([1, 1]), np.array([0.0, 1.0], np.float32), np.array([3, 5], np.int32)
    view.take_evaluation(EvaluationCompleted(4, *samples, newest_version=4))
    view.take_status(GENERATOR, ProcessStatus("decoding", 4, 700, 64, 20.0, {"decode": 5.0}, 0.002))
    found = read(view)
    assert found["darts_reward_pool_mean", ""] == 0.5
    assert found["darts_length_p99_tokens", ""] == 80.0
    assert found["darts_groups_zero_advantage_ratio", ""] == 0.25
    assert found["darts_weights_total_seconds", ""] == 0.125
    assert found["darts_weights_num_bytes", ""] == 512.0
    assert found["darts_learner_mine", ""] == 7.0, "of a loss of the user's"
    assert found["darts_evaluation_pass_at_2_ratio", ""] == 1.0
    assert found["darts_evaluation_policy_version", ""] == 4.0
    assert found["darts_run_last_step_age_seconds", ""] == 10.0
    assert found["darts_process_tokens", GENERATOR] == 700.0
    assert found["darts_process_busy_seconds", f"{GENERATOR},decode"] == 5.0


@given(st.dictionaries(st.text(max_size=20), st.floats(), max_size=20), st.text(max_size=20))
def test_no_name_and_no_value_spoils_the_page(metrics: dict[str, float], name: str) -> None:
    view = new_view(name)
    view.take_step(StepLine(0, metrics), 101.0)
    read(view)


def test_the_names_that_are_kept_are_bounded() -> None:
    view = new_view()
    for step in range(3):
        view.take_step(StepLine(step, {f"{step}/{number}": float(step) for number in range(MAX_LATEST)}), 101.0)
    assert len(view.latest) == MAX_LATEST
