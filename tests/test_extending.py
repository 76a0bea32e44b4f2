"""The examples of `EXTENDING.md`, as a reader would use them: the files as they are there, and nothing else."""

import csv
import doctest
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import launcher.commands.cli
from darts_async.extensions import KINDS
from tests import ROOT
from tests.support.launched import CONFIGS, LaunchedRun

GUIDE = (ROOT / "darts_async" / "EXTENDING.md").read_text()
PYTHON = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)
YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE))
DOCSTRINGS = (
    "darts_async.extensions",
    "darts_async.generator.engine",
    "darts_async.prompts.record_sources",
    "darts_async.prompts.source",
    "darts_async.reward.builtin",
    "darts_async.learner.losses.kinds",
    "darts_async.shaper.rules.custom",
    "launcher.sinks.sink",
)


def settings_of(section: str) -> dict[str, Any]:
    (text,) = YAML.findall(section)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def write_modules(folder: Path, section: str) -> None:
    for name, code in PYTHON.findall(section):
        (folder / name).write_text(code)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(base[key], value) for key, value in over.items() if isinstance(base.get(key), dict)}
    return base | over | both


def test_every_kind_has_a_section_that_sets_it() -> None:
    found = [json.dumps(settings_of(section)) for section in SECTIONS.values()]
    for kind in KINDS.values():
        assert any(f'"{kind.setting.rpartition(".")[2]}": ' in text for text in found), kind.setting
    assert len(found) == len(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_each_example_is_valid(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_modules(tmp_path, SECTIONS[title])
    base = yaml.safe_load((CONFIGS / "scripted.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump(merged(base, settings_of(SECTIONS[title]))))
    result = CliRunner().invoke(launcher.commands.cli.app, ["validate", "run.yaml"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_is_made_of_all_of_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learner": {"steps": 3, "groups_per_step": 2}, "evaluation": {"samples_per_prompt": 1}}
    for section in SECTIONS.values():
        write_modules(tmp_path, section)
        settings = merged(settings, settings_of(section))
    with LaunchedRun(tmp_path, "scripted.yaml", settings) as run:
        assert run.end() == 0, run.output
        run.assert_clean()
        lines = run.lines("metrics.jsonl")
        with (run.run_dir / "rewards.csv").open() as file:
            rows = {int(step): float(reward) for step, reward in csv.reader(file)}
    steps = {line["step"]: line for line in lines if line["type"] == "step" and "reward/mean" in line}
    assert sorted(rows) == [0, 1, 2]
    assert rows == {step: line["reward/mean"] for step, line in steps.items()}
    assert list(rows.values()) == pytest.approx([-0.02] * 3), "20 words, and none is right"
    assert all(0 <= line["learner/weight_capped_share"] <= 1 for line in steps.values())


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert (failed, attempted > 0) == (0, True)
