"""The table of metrics is what real runs write, and what the README shows."""

import re
from pathlib import Path

import pytest

from darts_async.topology.outcomes import OUTCOMES
from launcher.progress.metric_names import EVALUATION_METRICS, STEP_METRICS, metric_of, metric_table
from launcher.sinks.sink import point_of
from tests import ROOT
from tests.support.launched import LaunchedRun

ELSEWHERE = {
    "prompts/passed_over": "a curriculum",
    "sets/{set}/reward/{which}": "several sets",
    "sets/{set}/pass@{k}": "several sets",
    "sets/{set}/length/{which}": "several sets",
    "learner/mfu": "a GPU",
    "rewards/{function}/mean": "several reward functions",
    "rewards/{function}/std": "several reward functions",
    "learner/masked_share": "another loss",
    "learner/outside_truncation_older": "chance",
    "learner/gap_older_mean": "chance",
    "learner/gap_older_max": "chance",
    "run/redundancy_autocorrelation": "chance",
    "run/pays_for_length": "chance",
    "selection/length_slope": "chance",
    "selection/pays_for_length": "chance",
}
"""Metrics that the run of the test need not have."""


def test_the_readme_has_the_table() -> None:
    assert metric_table() in (ROOT / "launcher" / "README.md").read_text(), f"write this there:\n{metric_table()}"


def test_no_name_is_of_two_entries() -> None:
    for table in (STEP_METRICS, EVALUATION_METRICS):
        for metric in table:
            example = re.sub(r"\{\w+\}", "7", metric.name)
            assert [each.name for each in table if each.pattern.fullmatch(example)] == [metric.name]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_tokens_of_each_outcome_are_in_the_table(outcome: str) -> None:
    assert metric_of(f"tokens/{outcome}") is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_writes_the_metrics_of_the_table_and_no_others(tmp_path: Path) -> None:
    settings = {
        "learner": {"steps": 5, "groups_per_step": 4, "loss": {"kl_weight": 0.01, "entropy_weight": 0.001}},
        "evaluation": {"samples_per_prompt": 2},
        "prompts": {"num_train": 16, "held_out": 4},
        "sampling": {"top_p": 0.99},
        "shaping": {"redundancy": {"total": "utility"}},
    }
    with LaunchedRun(tmp_path, "quickstart.yaml", settings) as run:
        assert run.end() == 0, run.output
        lines = run.lines("metrics.jsonl")
    for kind, table in (("step", STEP_METRICS), ("evaluation", EVALUATION_METRICS)):
        points = [point for line in lines if line["type"] == kind and (point := point_of(line)) is not None]
        names = {name.removeprefix("evaluation/") for point in points for name in point.metrics}
        unknown = {name for name in names if metric_of(name, table) is None}
        assert not unknown, f"add to the table: {sorted(unknown)}"
        unwritten = {metric.name for metric in table if not any(map(metric.pattern.fullmatch, names))}
        assert not unwritten - ELSEWHERE.keys(), f"no longer written, or only if: {sorted(unwritten)}"
