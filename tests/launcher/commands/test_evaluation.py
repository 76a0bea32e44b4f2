"""The verb `evaluate`: one model, no steps, the numbers of each set, and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from launcher.commands.evaluation import as_evaluation
from tests import ROOT

CONFIG = ROOT / "launcher" / "configs" / "scripted.yaml"


def test_a_run_that_evaluates_takes_no_step_whatever_the_schedule_was() -> None:
    given = RunConfig.model_validate({"name": "mine", "learner": {"steps": 9, "schedule": "cosine", "warmup_steps": 2}})
    config = as_evaluation(given, "somebody/model")
    assert (config.name, config.model.path, config.learner.steps) == ("evaluate-mine", "somebody/model", 0)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert config.prompts == given.prompts


def test_the_model_of_a_run_is_its_last_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="has no model yet and no checkpoint"):
        as_evaluation(RunConfig(), str(tmp_path))
    (tmp_path / "checkpoints" / "step-000150.damaged").mkdir(parents=True)
    for name in ("checkpoints/step-000050", "checkpoints/step-000100", "model"):
        (tmp_path / name).mkdir(parents=True)
        assert as_evaluation(RunConfig(), str(tmp_path)).model.path == str(tmp_path / name)


def test_no_reference_model_and_no_adapters_are_loaded_to_evaluate() -> None:
    given = RunConfig.model_validate({"learner": {"lora": {"rank": 4}, "loss": {"kl_weight": 0.1}}})
    learner = as_evaluation(given, "somebody/model").learner
    assert (learner.lora, learner.loss.kl_weight, learner.loss.reference_path) == (None, 0.0, None)


def test_an_evaluation_of_nothing_is_refused() -> None:
    config = RunConfig.model_validate({"evaluation": {"samples_per_prompt": 0}})
    with pytest.raises(ConfigError, match="samples_per_prompt is 0, so nothing would be evaluated"):
        as_evaluation(config, "somebody/model")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_is_evaluated_on_every_set(tmp_path: Path) -> None:
    settings = yaml.safe_load(CONFIG.read_text())
    settings["evaluation"] |= {"sets": [{"name": "probe", "held_out": 3}]}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "launcher", "evaluate", "darts_async.quickstart:model", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held-out prompts at version 0" in done.stdout
    assert "✓ evaluate-scripted finished: no steps, an evaluation in" in done.stdout
    (probe,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["probe"]]
    assert len(probe) == 1 + 3 + 2 + 2  # reward ± error, pass@1 and pass@2, length and its spread
    (run_dir,) = (tmp_path / "runs").iterdir()
    (line,) = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    assert (line["type"], len(line["rewards"])) == ("evaluation", 2 * (8 + 3))
    assert "sets/probe/pass@2" in line
    assert not (run_dir / "model").exists()
    refused = subprocess.run([*command[:4], "no/such/model", str(file)], cwd=tmp_path, capture_output=True, check=False)
    assert refused.returncode == 2
