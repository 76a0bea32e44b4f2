"""`darts-launch follow`: what it refuses before anything starts, and what it gives to sinks of a run that is over."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

import launcher.commands.cli
from darts_async.config import RunConfig
from tests.launcher.sinks.world import DEADLINE_S, HISTORY

COLLECTS, HANGS = "tests.launcher.sinks.fakes:Collects", "tests.launcher.sinks.fakes:Hangs"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "runs" / "arithmetic"
    (found / "logs").mkdir(parents=True)
    (found / "config.yaml").write_text(yaml.safe_dump(RunConfig().model_dump(mode="json")))
    state = {"status": "finished", "reason": "done", "started_at_s": 1.0, "ended_at_s": 2.0, "launcher_pid": 1}
    (found / "state.json").write_text(json.dumps(state))
    (found / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in HISTORY))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.chdir(tmp_path)
    return found


def follow(*words: str) -> Result:
    return CliRunner().invoke(launcher.commands.cli.app, ["follow", *words], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["runs/nowhere", "--sink", "wandb"], ["runs/nowhere is not a run directory"]),
        (["--sink", "wandb", "--runs-dir", "nowhere"], ["there is no run in"]),
        (["runs/arithmetic"], ["has no telemetry.sinks: name one with --sink: wandb, tensorboard, trackio"]),
        (
            ["runs/arithmetic", "--sink", "wandbb"],
            ["telemetry.sinks is 'wandbb'", "did you mean 'wandb'?"],
        ),
        (["runs/arithmetic", "--sink", "wandb", "--sink", "wandb"], ["names 'wandb' 2 times"]),
        (
            ["runs/arithmetic", "--sink", "wandb", "telemetry.wandb.projct=mine"],
            ["telemetry.wandb.projct", "did you mean telemetry.wandb.project?"],
        ),
        (["runs/arithmetic", "--sink", "wandb", "telemtry.wandb.project=mine"], ["telemtry"]),
        (["runs/arithmetic", "--sink", "wandb", "telemetry.wandb.mode=sometimes"], ["telemetry.wandb.mode"]),
        (["runs/arithmetic", "--sink", "wandb", "telemetry.wandb.project=["], ["the value is not YAML"]),
        (["runs/arithmetic", "runs/arithmetic2", "--sink", "wandb"], ["runs/arithmetic2: this word"]),
    ],
)
def test_a_mistake_is_exit_code_2(words: list[str], messages: list[str], run_dir: Path) -> None:
    result = follow(*words)
    assert result.exit_code == 2, result.output
    for message in messages:
        assert message in result.output.replace("\n", " ")


@pytest.mark.slow
def test_a_package_that_is_missing_is_named_with_the_command(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("raise ModuleNotFoundError(\"No module named 'trackio'\", name='trackio')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    result = follow("runs/arithmetic", "--sink", "trackio")
    assert result.exit_code == 2
    assert "the package 'trackio' is not installed: pip install 'darts-async[trackio]'" in result.output


@pytest.mark.slow
def test_a_sink_that_says_that_it_cannot_work_is_refused(run_dir: Path) -> None:
    result = follow("runs/arithmetic", "--sink", "tests.launcher.sinks.fakes:CannotBeMade")
    assert result.exit_code == 2
    assert "API_KEY is not set" in result.output


@pytest.mark.slow
def test_it_can_be_interrupted_while_a_sink_hangs(run_dir: Path) -> None:
    command = [sys.executable, "-m", "launcher", "follow", "runs/arithmetic", "--sink", HANGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert HANGS in process.stdout.readline(), "it follows"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert f"the sink {HANGS} did not finish within" in errors


@pytest.mark.slow
def test_a_run_that_is_over_is_followed_to_its_end(run_dir: Path) -> None:
    result = follow("runs/arithmetic", "--sink", COLLECTS)
    assert result.exit_code == 0, result.output
    assert f"{COLLECTS} has {len(HISTORY)} lines of metrics.jsonl" in result.output
    assert (run_dir / "collected.jsonl").read_text() == (run_dir / "metrics.jsonl").read_text()
    assert follow("runs/arithmetic", "--sink", COLLECTS).exit_code == 0
    assert (run_dir / "collected.jsonl").read_text() == (run_dir / "metrics.jsonl").read_text()
