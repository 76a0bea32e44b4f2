"""A run that is resumed with another `config.yaml` than it began with."""

from pathlib import Path
from typing import Any

import pytest

from darts_async.config import RunConfig
from darts_async.shaper.ledger import scan_ledger
from darts_async.topology.plan import RunPlan
from darts_async.topology.run_files import LEDGER_FILE
from launcher.preflight.changed_settings import FIXED, changed, refuse_changes
from launcher.problems import InputError
from launcher.run_dir.run_dir import write_inputs
from tests.support.launched import LaunchedRun

CONFIG = RunConfig.model_validate({})


def with_settings(place: str, value: Any) -> RunConfig:
    settings = CONFIG.model_dump(mode="json")
    *sections, name = place.split(".")
    inner = settings
    for section in sections:
        inner = inner[section]
    assert inner[name] != value
    inner[name] = value
    return RunConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("seed", 7),
        ("model.path", "another"),
        ("prompts.num_train", 77),
        ("sampling.max_new_tokens", 77),
        ("shaping.min_keep", 3),
        ("staleness.max_staleness", 7),
        ("evaluation.samples_per_prompt", 7),
        ("reward.function", "math"),
        ("learner.groups_per_step", 7),
        ("learner.lora", {"rank": 3}),
    ],
)
def test_what_the_journal_follows_from_is_refused_with_both_values_and_the_way_back(place: str, value: Any) -> None:
    problems = changed(CONFIG, with_settings(place, value), num_steps=0)
    problem = next(problem for problem in problems if problem.place == place)
    was = CONFIG
    for name in place.split("."):
        was = getattr(was, name)
    if not isinstance(value, dict):
        assert problem.value == repr(value)
    assert repr(was) in problem.message
    assert f"write {was!r} again" in (problem.fix or "")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("roles.generator.replicas", 3),
        ("telemetry.trace", False),
        ("learner.steps", 1000),
        ("learner.checkpoint_every", 7),
        ("learner.learning_rate", 0.5),
        ("reward.deadline_s", 77.0),
        ("network.lease_s", 77.0),
        ("generator.num_slots", 7),
    ],
)
def test_where_and_how_fast_a_run_goes_on_may_change(place: str, value: Any) -> None:
    assert changed(CONFIG, with_settings(place, value), num_steps=5) == ()


def test_another_weight_of_a_reward_function_is_another_reward() -> None:
    before, now = (
        RunConfig.model_validate({"reward": {"functions": [{"function": "math", "weight": weight}]}})
        for weight in (1.0, 2.0)
    )
    [problem] = changed(before, now, num_steps=5)
    assert problem.place == "reward.functions"


def test_a_run_is_not_resumed_to_a_step_that_lies_in_its_past() -> None:
    config = with_settings("learner.steps", 3)
    assert changed(config, config, num_steps=3) == ()
    [problem] = changed(config, config, num_steps=4)
    assert (problem.place, problem.value, problem.fix) == ("learner.steps", "3", "give 4 or more")


def test_every_fixed_setting_exists() -> None:
    for path in FIXED:
        value: Any = CONFIG
        for name in path.split("."):
            value = getattr(value, name)


def test_a_file_is_compared_with_what_the_last_life_began_with_and_with_nothing_if_that_is_lost(tmp_path: Path) -> None:
    write_inputs(tmp_path, CONFIG, RunPlan((), ()))
    other = with_settings("seed", 7)
    assert refuse_changes(tmp_path, tmp_path / "config.yaml", CONFIG, 0) == ()
    more = with_settings("learner.steps", 1000)
    assert [str(change) for change in refuse_changes(tmp_path, tmp_path / "config.yaml", more, 0)] == [
        f"learner.steps: {CONFIG.learner.steps} -> 1000"
    ]
    with pytest.raises(InputError, match=r"config\.yaml: seed: 7: is 0 in the run so far"):
        refuse_changes(tmp_path, tmp_path / "config.yaml", other, 0)
    (tmp_path / "config.begun.yaml").write_bytes(b"\xff")
    refuse_changes(tmp_path, tmp_path / "config.yaml", other, 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_goes_on_with_fewer_and_with_more_generators_and_steps_and_not_with_other_groups(tmp_path: Path) -> None:
    settings = {
        "roles": {"generator": {"replicas": 2}},
        "learner": {"steps": 20, "checkpoint_every": 5},
        "telemetry": {"status_every_s": 0.1},
    }
    with LaunchedRun(tmp_path, "scripted.yaml", settings) as run:
        run.wait_for_steps(6)
        run.kill_all()
        refused = run.verb("resume", str(run.run_dir), "shaping.launch=8")
        assert (refused.returncode, "shaping.launch" in refused.stderr) == (2, True), refused.stderr
        run.resume("roles.generator.replicas=1", "learner.steps=1000")
        run.wait_for_steps(30)
        run.kill_all()
        run.resume("roles.generator.replicas=3", "learner.steps=60")
        assert run.end() == 0, run.output
        summary = run.assert_clean()
        assert summary["num_steps"] == 60
        assert {line["process"] for line in run.events("started")} >= {f"generator/{n}" for n in range(3)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_finished_run_is_trained_further(tmp_path: Path) -> None:
    with LaunchedRun(tmp_path, "scripted.yaml", {"learner": {"steps": 7, "checkpoint_every": 5}}) as run:
        assert run.end() == 0, run.output
        before = run.assert_clean()
        refused = run.verb("resume", str(run.run_dir))
        assert (refused.returncode, "learner.steps=14` trains further" in refused.stderr) == (2, True), refused.stderr
        run.resume("learner.steps=20")
        assert run.end() == 0, run.output
        assert "changed: learner.steps: 7 -> 20" in run.output
        after = run.assert_clean()
        assert (before["num_steps"], after["num_steps"]) == (7, 20)
        assert not scan_ledger(run.run_dir / LEDGER_FILE).counted.num_void, "what was decided stays decided"
        lines = [line for line in run.lines("metrics.jsonl") if line["type"] == "evaluation"]
        evaluations = {line["policy_version"]: line for line in lines}  # the last of a life may come again in the next
        assert list(evaluations) == [0, 7, 20]
        num_samples = sum(len(line["num_tokens"]) for line in evaluations.values())
        assert after["samples_by_outcome"]["evaluated"] == num_samples
        assert [event["changes"] for event in run.events("resumed")] == [["learner.steps: 7 -> 20"]]
        steps = [line["step"] for line in run.lines("metrics.jsonl") if "learner/loss" in line]
        assert steps == list(range(20)), "no step was trained twice"
        assert (run.run_dir / "model" / "config.json").is_file()


JUDGE = {"url": "http://old:1/v1", "model": "m"}


def with_judge(**settings: Any) -> RunConfig:
    functions = [{"judge": JUDGE | settings}]
    return RunConfig.model_validate({"reward": {"functions": functions, "deadline_s": 900.0}})


@pytest.mark.parametrize(
    ("name", "value"),
    [("url", "http://new:1/v1"), ("api_key_env", "KEY"), ("requests_per_minute", 9.0), ("total_s", 99.0)],
)
def test_a_judge_may_move_and_be_asked_more_slowly(name: str, value: Any) -> None:
    assert changed(with_judge(), with_judge(**{name: value}), num_steps=0) == ()


@pytest.mark.parametrize(("name", "value"), [("model", "n"), ("template", "{response}?"), ("best", 5.0)])
def test_a_judge_may_not_judge_otherwise(name: str, value: Any) -> None:
    assert [problem.place for problem in changed(with_judge(), with_judge(**{name: value}), num_steps=0)] == [
        "reward.functions"
    ]
