"""The real MLflow with a database: what its own client reads, also after kills."""

from pathlib import Path

import pytest

from darts_async.config import RunConfig
from launcher.preflight.extension_check import check_sinks
from tests.launcher.sinks.world import EVALUATIONS, STEP_REWARDS, FollowedRun

pytestmark = pytest.mark.slow

READ = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
(run,) = client.search_runs([client.get_experiment_by_name("arithmetic").experiment_id])
def history(name):
    return sorted([each.timestamp, each.step, each.value] for each in client.get_metric_history(run.info.run_id, name))
names = "reward/mean", "evaluation/reward/mean", "weights/total_s", "evaluation/pass_at_1"
print(json.dumps([run.info.run_name, run.info.status, run.data.params, {name: history(name) for name in names}]))
"""


def test_the_database_has_each_value_once_after_kills(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with FollowedRun(tmp_path, "mlflow", {"mlflow": {"tracking_uri": uri, "experiment": "arithmetic"}}) as run:
        run.follow_with_a_kill()
        name, status, params, found = run.read_back(READ, uri)
    points = {metric: [(step, value) for _, step, value in history] for metric, history in found.items()}
    assert points["reward/mean"] == STEP_REWARDS
    assert points["evaluation/reward/mean"] == EVALUATIONS
    assert points["weights/total_s"] == [(0, 0.5), (1, 0.6)]
    assert points["evaluation/pass_at_1"] == [(0, 0.5), (3, 1.0)], "MLflow takes no @ in a name"
    assert (name, status) == ("arithmetic", "FINISHED")
    assert not [name for name in params if name.startswith("nodes")], "they may hold secrets"
    assert params["learner.loss.kind"] == RunConfig().learner.loss.kind


def test_an_address_that_it_does_not_know_is_refused_before_the_start() -> None:
    telemetry = {"sinks": ["mlflow"], "mlflow": {"tracking_uri": "nowhere://at.all"}}
    (problem,) = check_sinks(RunConfig.model_validate({"telemetry": telemetry}))
    assert problem.here
    assert "telemetry.mlflow.tracking_uri cannot be used" in problem.message
