"""The real W&B, offline: what its files have, also after kills."""

from pathlib import Path

import pytest

from darts_async.config import RunConfig
from launcher.preflight.extension_check import check_sinks
from tests.launcher.sinks.world import EVALUATIONS, HISTORY, STEP_REWARDS, FollowedRun

pytestmark = pytest.mark.slow

READ = """
import json, pathlib, sys
from wandb.proto.wandb_internal_pb2 import Record
from launcher.sinks.wandb_sink import records_of
rows, metrics, runs = [], [], []
for file in sorted(pathlib.Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    for data in records_of(file.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            names = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append([record.history.step.num, names])
        elif kind == "metric":
            metrics.append([record.metric.name or record.metric.glob_name, record.metric.step_metric])
        elif kind == "run":
            runs.append([record.run.run_id, record.run.display_name, record.run.project])
print(json.dumps({"rows": rows, "metrics": metrics, "runs": runs}))
"""


def test_the_files_have_each_line_once_after_kills(tmp_path: Path) -> None:
    with FollowedRun(tmp_path, "wandb", {"wandb": {"mode": "offline", "project": "arithmetic"}}) as run:
        run.follow_with_a_kill()
        found = run.read_back(READ, str(run.run_dir))
    rows = sorted(found["rows"])
    numbers = [number for number, line in enumerate(HISTORY, 1) if line["type"] != "resumed"]
    assert [number for number, _ in rows] == numbers, "the number of the line is W&B's own step, which only grows"
    measured = [row for _, row in rows]
    assert [(row["step"], row["reward/mean"]) for row in measured if "reward/mean" in row] == STEP_REWARDS
    evaluations = [row for row in measured if "evaluation/reward/mean" in row]
    assert [(row["step"], row["evaluation/reward/mean"]) for row in evaluations] == EVALUATIONS
    assert evaluations[1]["evaluation/pass@1"] == 1.0
    assert ["*", "step"] in found["metrics"], "all are drawn against the step of the optimiser"
    assert {tuple(each) for each in found["runs"]} == {(run.key, "arithmetic", "arithmetic")}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "it has no key: No API key configured. Use `wandb login` to log in.; set WANDB_API_KEY"),
        ({"WANDB_API_KEY": "short"}, "it has no key: "),
        ({"WANDB_MODE": "sometimes"}, "WANDB_MODE is 'sometimes'; use online or offline"),
    ],
)
def test_without_a_key_it_is_refused_before_the_start(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (problem,) = check_sinks(RunConfig.model_validate({"telemetry": {"sinks": ["wandb"]}}))
    assert problem.here
    assert message in problem.message
