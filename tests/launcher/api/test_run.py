"""Whole runs that are started from Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from darts_async.errors import ConfigError
from launcher.analysis.audit import audit_run
from launcher.api import RunFailedError, run
from launcher.run_dir.run_dir import read_record
from tests.support.launched import CONFIGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SMALL = {
    "learner.steps": 4,
    "learner.groups_per_step": 2,
    "roles.generator.replicas": 1,
    "prompts.held_out": 1,
    "telemetry.status_every_s": 0.1,
}
RECORDS = [{"prompt": f"{a} +{b} =", "answer": str(a + b)} for a in range(1, 5) for b in range(1, 5)]


def test_a_closure_and_a_list_of_prompts_train_the_shipped_model(tmp_path: Path) -> None:
    asked, heard, evaluated, said = list[str](), list[int](), list[float](), list[str]()

    def brief(*, prompt: str, response: str, **_: Any) -> float:
        asked.append(prompt)
        return -0.01 * len(response)

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        assert "learner/loss" in metrics
        heard.append(step)

    result = run(
        CONFIGS / "quickstart.yaml",
        SMALL | {"runs_dir": str(tmp_path / "runs")},
        reward=brief,
        prompts=RECORDS,
        on_step=on_step,
        on_evaluation=lambda metrics: evaluated.append(metrics["reward/mean"]),
        show=said.append,
    )
    assert (result.status, result.run_dir.parent) == ("finished", tmp_path / "runs")
    assert heard == [0, 1, 2, 3]
    assert len(result.series("learner/loss")) == 4
    assert evaluated == [each["reward/mean"] for each in result.evaluations]
    assert all(reward < 0 for reward in evaluated), "it was the closure that scored"
    assert asked
    assert set(asked) <= {record["prompt"] for record in RECORDS}
    assert result.model_path is not None
    assert any("step 4/4" in line.replace("  ", " ") for line in said), said
    assert audit_run(result.run_dir).findings == []


def test_settings_may_be_a_mapping_and_what_is_wrong_with_them_is_said(tmp_path: Path) -> None:
    settings = {"runs_dir": str(tmp_path), "learner": {"stesp": 3}}
    with pytest.raises(ConfigError, match=r"did you mean learner\.steps\?"):
        run(settings, show=None)
    with pytest.raises(ConfigError, match="no directory"):
        run({"runs_dir": str(tmp_path)}, {"model.path": "/nowhere"}, show=None)


def test_an_exception_of_a_callback_stops_the_run_in_order_and_is_raised(tmp_path: Path) -> None:
    class EnoughError(Exception): ...

    def on_step(step: int, _: Mapping[str, float]) -> None:
        if step == 2:
            raise EnoughError

    overrides = {"runs_dir": str(tmp_path), "learner.steps": 100_000}
    with pytest.raises(EnoughError):
        run(CONFIGS / "scripted.yaml", overrides, on_step=on_step, show=None)
    [run_dir] = [path.parent for path in tmp_path.glob("*/state.json")]
    assert read_record(run_dir).status == "stopped"
    assert audit_run(run_dir).findings == []


def test_a_show_that_raises_stops_the_run_and_is_raised(tmp_path: Path) -> None:
    def refuses(line: str) -> None:
        if "step" in line:
            raise UnicodeEncodeError("ascii", line, 0, 1, "of the screen")

    with pytest.raises(UnicodeEncodeError):
        run(CONFIGS / "scripted.yaml", {"runs_dir": str(tmp_path), "learner.steps": 100_000}, show=refuses)
    [run_dir] = [path.parent for path in tmp_path.glob("*/state.json")]
    assert read_record(run_dir).status == "stopped"


def test_a_run_that_fails_raises_with_its_result(tmp_path: Path) -> None:
    def fails(**_: Any) -> float:
        raise LookupError("no such answer")

    with pytest.raises(RunFailedError, match="no such answer") as caught:
        run(CONFIGS / "quickstart.yaml", SMALL | {"runs_dir": str(tmp_path)}, reward=fails, show=None)
    assert caught.value.result.status == "failed"
