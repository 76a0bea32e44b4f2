"""The examples of `EXTENDING.md`, as a reader would use them: the files as they are there, and nothing else."""

import csv
import doctest
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import launcher.commands.cli
from darts_async.config import RewardConfig
from darts_async.extensions import KINDS
from darts_async.reward.code import CodeReward
from darts_async.reward.process import functions_of
from darts_async.rollouts import read_rollouts, rollout_files
from darts_async.topology.run_files import SAMPLES_DIR
from tests import ROOT
from tests.support.judge_server import judge_server
from tests.support.launched import CONFIGS, LaunchedRun

GUIDE = (ROOT / "darts_async" / "EXTENDING.md").read_text()
PYTHON = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)
YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
SECTIONS = dict(re.findall(r"^##+ (.*?)\n(.*?)(?=^##+ |\Z)", GUIDE, re.DOTALL | re.MULTILINE))
SEVERAL, PROGRAMS, JUDGE = "Several reward functions", "Programs with test cases", "A judge"
"""In place of `A reward function`."""
DOCSTRINGS = (
    "darts_async.extensions",
    "darts_async.generator.engine",
    "darts_async.prompts.record_sources",
    "darts_async.prompts.source",
    "darts_async.reward.builtin",
    "darts_async.learner.losses.kinds",
    "darts_async.shaper.rules.custom",
    "darts_async.shaper.token_accounts",
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
    assert len(re.findall(r"^## ", GUIDE, re.MULTILINE)) == len(KINDS)


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
def test_several_reward_functions_are_added_up_and_each_has_its_curve(tmp_path: Path) -> None:
    section = SECTIONS[SEVERAL]
    write_modules(tmp_path, section)
    short = {"learner": {"steps": 2, "groups_per_step": 2}, "evaluation": {"samples_per_prompt": 1}}
    with LaunchedRun(tmp_path, "scripted.yaml", merged(short, settings_of(section))) as run:
        assert run.end() == 0, run.output
        run.assert_clean()
        lines = [line for line in run.lines("metrics.jsonl") if "reward/mean" in line]
        kept = [
            each for path in rollout_files(run.run_dir / SAMPLES_DIR, "train").values() for each in read_rollouts(path)
        ]
    scored = [each for each in kept if each.reward is not None]
    assert scored
    for each in scored:
        assert each.reward_parts["judge"] == 0.5
        assert each.reward == pytest.approx(each.reward_parts["right"] + 2 * each.reward_parts["brevity"])
    assert all(not each.reward_parts for each in kept if each.reward is None)
    assert {line["type"] for line in lines} == {"step", "evaluation"}
    for line in lines:
        assert line["rewards/judge/mean"] == 0.5
        assert line["rewards/brevity/mean"] < 0
        total = line["rewards/right/mean"] + 2 * line["rewards/brevity/mean"]
        assert line["reward/pool_mean" if line["type"] == "step" else "reward/mean"] == pytest.approx(total)


@pytest.mark.slow
def test_programs_earn_what_their_test_cases_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = SECTIONS[PROGRAMS]
    write_modules(tmp_path, section)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    [record] = importlib.import_module("my_programs").doubles(num_train=1, held_out=0, seed=0)
    config = RewardConfig.model_validate(settings_of(section)["reward"])
    [spec] = functions_of(config)
    assert spec.code is not None
    reward, fields = CodeReward(spec.code), {"prompt": "", "answer": "", "metadata": record, "finish_reason": "stop"}
    assert reward(response="```python\nprint(2 * int(input()))\n```", **fields) == 1.0
    assert reward(response="```python\nprint(42)\n```", **fields) == 0.5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_programs_are_run_in_a_run(tmp_path: Path) -> None:
    section = SECTIONS[PROGRAMS]
    write_modules(tmp_path, section)
    short = {"learner": {"steps": 1, "groups_per_step": 2}, "evaluation": {"samples_per_prompt": 1}}
    with LaunchedRun(tmp_path, "scripted.yaml", merged(short, settings_of(section))) as run:
        assert run.end() == 0, run.output
        run.assert_clean()
        means = [line["rewards/code/mean"] for line in run.lines("metrics.jsonl") if "reward/mean" in line]
    assert means == [0.0] * len(means), "no response has a program"
    assert means


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_judge_that_fails_at_times_costs_rewards_and_no_run(tmp_path: Path) -> None:
    settings = settings_of(SECTIONS[JUDGE])["reward"]
    replies = itertools.cycle([(200, "Score: 5"), (200, "Score: 5"), (503, "busy")])
    with judge_server(replies) as url:
        settings["functions"][1]["judge"] |= {"url": url, "max_attempts": 1, "requests_per_minute": None}
        reward = {"reward": {**settings, "max_failed_share": 0.0}}  # an outage is no failure of the function
        short = {"learner": {"steps": 2, "groups_per_step": 2}, "evaluation": {"samples_per_prompt": 1}}
        with LaunchedRun(tmp_path, "scripted.yaml", short | reward) as run:
            assert run.end() == 0, run.output
            run.assert_clean()
            steps = [line for line in run.lines("metrics.jsonl") if line["type"] == "step" and "reward/mean" in line]
    assert [line["rewards/judge/mean"] for line in steps] == [0.5, 0.5]
    assert steps[-1]["run/failed_rewards"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_is_made_of_all_of_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learner": {"steps": 3, "groups_per_step": 2}, "evaluation": {"samples_per_prompt": 1}}
    for section in (section for title, section in SECTIONS.items() if title not in (SEVERAL, PROGRAMS, JUDGE)):
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
