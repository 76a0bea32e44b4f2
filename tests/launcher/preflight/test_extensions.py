"""What a run brings itself is tried out before it starts, in a process that is thrown away."""

import sys
from pathlib import Path
from typing import Any

import pytest

from darts_async.config import RunConfig
from darts_async.extensions import KINDS
from darts_async.prompts.load import PromptCounts
from launcher.preflight import extension_check
from launcher.preflight.extension_check import check_extensions, check_prompts
from launcher.preflight.prompt_check import Found
from tests import ROOT


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config_of(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


def test_the_quickstart_starts_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension_check, "_try_in_a_child", None)
    assert [*check_extensions(RunConfig())] == []
    assert check_prompts(RunConfig()) == Found((), PromptCounts(4096, 128, 0, 0))


@pytest.mark.slow
def test_a_source_of_the_users_is_called_in_a_child_and_its_prompts_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "tests.fakes.sources", raising=False)
    config = config_of(prompts={"source": "tests.fakes.sources:numbered", "held_out": 2, "num_train": 9})
    assert check_prompts(config) == Found((), PromptCounts(9, 2, 0, 0))
    assert "tests.fakes.sources" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "setting", "message"),
    [
        ({"shaping": {"rule": "tests.fakes.rules:Idle"}}, "shaping.rule", "selects 0 of 10 scored samples"),
        (
            {"learner": {"loss": {"kind": "tests.learner.losses.test_custom:bare"}}},
            "learner.loss.kind",
            "must return (loss of each token [5], metrics)",
        ),
        (
            {"telemetry": {"sinks": ["tests.launcher.sinks.fakes:Collects", "tests.fakes.rules:Idle"]}},
            "telemetry.sinks",
            "it is called as Idle(run_dir=, config=, memory=)",
        ),
        (
            {"reward": {"functions": [{"function": "tests.reward.test_scorer:slow_length", "takes": "batch"}]}},
            "reward.functions",
            "it is called as slow_length(prompts=, responses=, answers=, metadata=, finish_reasons=)",
        ),
        ({"generator": {"engine": "tests.fakes.rules:Nothing"}}, "generator.engine", "has no 'Nothing'"),
    ],
)
def test_a_mistake_is_a_problem_of_its_setting(sections: dict[str, Any], setting: str, message: str) -> None:
    (problem,) = check_extensions(config_of(**sections))
    assert problem.place == setting
    assert setting in KINDS
    assert message in problem.message


@pytest.mark.slow
def test_a_source_that_leaves_python_is_a_problem() -> None:
    (problem,) = check_prompts(config_of(prompts={"source": "tests.fakes.sources:leaves", "held_out": 2})).problems
    assert problem.place == "prompts.source"
    assert "ended the process (exit code 3)" in problem.message


def test_a_file_that_is_not_there_is_one_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = check_extensions(config_of(shaping={"rule": "my_rule:Rule"}))
    assert f"there is no module 'my_rule'; looked in the current directory ({tmp_path})" in problem.message
