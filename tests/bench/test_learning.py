"""The learning benchmark: what it computes from runs, what it refuses, its second task, and one real run."""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import learning, search_task
from bench.learning_report import (
    BASELINE,
    SIGNS,
    SYNCHRONOUS,
    Learnt,
    Probe,
    Results,
    Task,
    Timing,
    bounds,
    report,
)
from darts_async.errors import ConfigError
from darts_async.extensions import REWARD, load
from darts_async.quickstart.task import is_held_out

TASK = Task(targets=(0.7, 0.8), steps=16, every_steps=8, samples=2, learning_rate=5e-4)
PROBE = Probe(
    reward=0.6,
    pass_at={1: 0.6, 8: 0.8, 16: 0.9},
    length_mean=40.0,
    length_std=20.0,
    length_p50=30.0,
    length_p90=80.0,
    length_p99=150.0,
    length_right=36.0,
    length_wrong=44.0,
    at_cap=0.0,
    all_wrong=0.1,
)


def learnt(arm: str = BASELINE, seed: int = 0, slower: float = 1.0, **changed: Any) -> Learnt:
    """A run that climbs from .6 to .9 in 30 s."""
    after = msgspec.structs.replace(PROBE, **{"reward": 0.9, "length_mean": 20.0, **changed.pop("after", {})})
    values: dict[str, Any] = {
        "task": "chain",
        "arm": arm,
        "seed": seed,
        "climb": [(0.0, 0, 0.6, 0.0), (10.0 * slower, 8, 0.7, 1e4), (30.0 * slower, 16, 0.9, 2e4)],
        "before": PROBE,
        "after": after,
        "entropy": (0.5, 0.2),
        "survival_hard": 0.9,
        "survival_easy": 0.95,
        "budget_correlation": None,
        "zero_advantage_share": 0.4,
        "staleness_max": 2.0,
    }
    return Learnt(**(values | changed))


def results(*runs: Learnt, timings: list[Timing] | None = None) -> Results:
    return Results(steps=16, commit="abc", runs=list(runs), timings=timings or [])


def test_a_target_is_reached_on_the_line_between_two_evaluations() -> None:
    run = learnt()
    assert run.reached(0.65) == pytest.approx((5.0, 4.0, 5e3, True))
    assert run.reached(0.8) == pytest.approx((20.0, 12.0, 1.5e4, True))
    assert run.reached(0.95) == pytest.approx((30.0, 16.0, 2e4, False))
    assert run.reached(0.5) == pytest.approx((0.0, 0.0, 0.0, True))
    assert run.reward_at(20.0) == pytest.approx(0.8)
    assert run.reward_at(99.0) == pytest.approx(0.9)


def test_the_interval_of_a_median_is_that_of_resampled_seeds() -> None:
    low, high = bounds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == bounds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1.0 <= low < 3.0 < high <= 5.0
    assert bounds([2.0]) == (2.0, 2.0)


def test_speed_ups_pair_runs_of_a_seed_and_a_lower_reward_is_not_called_as_good() -> None:
    runs = [learnt(seed=seed, slower=2.0) for seed in range(5)]
    runs += [learnt("fast", seed=seed, after={"reward": 0.9 - 0.01 * seed}) for seed in (1, 0, 4, 3, 2)]
    runs += [learnt("few", seed=seed) for seed in range(4)]
    text = report(results(*runs), {"chain": TASK})
    [row] = [line for line in text.splitlines() if line.startswith("| fast | 5 | 10.0 | 20.0 | 0 |")]
    assert "2.00 (2.00 to 2.00)" in row
    assert row.endswith("| -0.020 (-0.040 to +0.000) | not shown |")
    [few] = [line for line in text.splitlines() if line.startswith("| few | 4 |")]
    assert few.endswith("| too few seeds |")
    [plain] = [line for line in text.splitlines() if line.startswith(f"| {BASELINE} | 5 | 20.0 | 40.0 | 0 |")]
    assert plain.endswith("| yes |")


def test_a_seed_without_the_baseline_is_left_out_until_that_is_there() -> None:
    assert list(results(learnt(), learnt("fast", seed=1)).arms("chain")) == [BASELINE]


def test_the_factors_multiply_to_the_whole() -> None:
    timings = [
        Timing(task="chain", arm=SYNCHRONOUS, first_s=0.6, own_s=0.3),
        Timing(task="chain", arm=BASELINE, first_s=0.3, own_s=0.2),
        Timing(task="chain", arm="fast", first_s=0.2, own_s=0.1),
    ]
    text = report(results(learnt(), timings=timings), {"chain": TASK})
    assert "| fast | 200 | 100 | 2.00 | 1.50 | 2.00 | 6.00 |" in text
    assert f"| {SYNCHRONOUS} | 600 | 300 | 1.00 | 1.00 | 2.00 | 2.00 |" in text


@pytest.mark.parametrize(
    ("sign", "changed"),
    [
        ("length collapse", {"after": {"reward": 0.5}}),
        ("short and wrong", {"after": {"length_wrong": 20.0, "length_right": 30.0, "all_wrong": 0.2}}),
        ("less diverse", {"after": {"pass_at": {1: 0.9, 8: 0.9, 16: 0.87}}}),
        ("hard prompts starve", {"survival_hard": 0.8}),
        ("budget oscillates", {"budget_correlation": -0.3}),
        ("at the cap", {"after": {"at_cap": 0.02}}),
    ],
)
def test_each_sign_of_failure_is_seen_alone(sign: str, changed: dict[str, Any]) -> None:
    assert not any(is_seen(learnt()) for is_seen in SIGNS.values())
    assert [name for name, is_seen in SIGNS.items() if is_seen(learnt(**changed))] == [sign]


def test_runs_that_are_there_are_taken_over_and_others_refused(tmp_path: Path) -> None:
    asked = argparse.Namespace(out=tmp_path, resume=True, steps=16)
    assert learning.resumed(asked) is None
    kept = results(learnt(), learnt(seed=1))
    learning.write(asked, kept)
    assert learning.resumed(asked) == kept
    assert kept.has("chain", BASELINE, 0)
    assert not kept.has("chain", BASELINE, 2)
    with pytest.raises(ConfigError, match=r"learning\.json holds runs of --steps 16; these are of --steps 20"):
        learning.resumed(argparse.Namespace(out=tmp_path, resume=True, steps=20))
    (tmp_path / "learning.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(ConfigError, match=r"learning\.json has no results of schema 1"):
        learning.resumed(asked)
    with pytest.raises(ConfigError, match="give --out too"):
        learning.resumed(argparse.Namespace(out=None, resume=True, steps=16))


def test_a_run_without_a_wrong_answer_is_taken_over_too(tmp_path: Path) -> None:
    asked = argparse.Namespace(out=tmp_path, resume=True, steps=16)
    learning.write(asked, results(learnt(after={"reward": 1.0, "length_wrong": math.nan})))
    found = learning.resumed(asked)
    assert found is not None
    assert math.isnan(found.runs[0].after.length_wrong)


# --- the second task -----------------------------------------------------------------------------------------


def test_a_flawless_response_is_right_and_ends_at_the_first_digit_that_fits() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text, answer = search_task.draw_prompt(rng, rng.randint(1, 3))
        response = search_task.write_response(rng, text, search_task.PERFECT)
        assert search_task.judge(response, answer, finished=True) == 1.0
        assert search_task.judge(response, answer, finished=False) == 0.0
        assert response.split().count("yes") == 1


def test_giving_up_is_short_and_mostly_wrong() -> None:
    rng = random.Random(1)
    judged: dict[float, list[int]] = {0.0: [], 1.0: []}
    for _ in range(2000):
        text, answer = search_task.draw_prompt(rng, 2)
        response = search_task.write_response(rng, text, search_task.HUMAN)
        judged[search_task.judge(response, answer, finished=True)].append("yes" in response.split())
    assert 0.45 < len(judged[1.0]) / 2000 < 0.75
    assert sum(judged[0.0]) < 0.2 * len(judged[0.0])


def test_prompts_are_distinct_and_those_held_out_are_of_their_own_pool(tmp_path: Path) -> None:
    for from_held_out in (False, True):
        path = tmp_path / "prompts.jsonl"
        search_task.write_prompts(path, 64, seed=0, from_held_out=from_held_out)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({record["prompt"] for record in records}) == 64
        assert {is_held_out(record["prompt"]) for record in records} == {from_held_out}


def test_its_reward_can_be_loaded_as_a_users() -> None:
    function = load(REWARD, "bench.search_task:reward")
    said = {"prompt": "", "response": "try 2 +5 7 yes ans 2", "answer": "2", "metadata": {}}
    assert function(**said, finish_reason="stop") == 1.0
    assert function(**said, finish_reason="length") == 0.0


@pytest.mark.slow
def test_a_real_run_is_probed_and_its_model_kept(tmp_path: Path) -> None:
    settings = learning.settings_of("chain", tmp_path)
    run = learning.one_run("chain", settings, "survivor 6+2 of 12", 3, 8, tmp_path)
    assert [step for _, step, *_ in run.climb] == [0, 8]
    assert run.climb[-1][0] > 0
    assert run.climb[-1][3] > 16 * 8 * 8
    assert run.before != run.after
    assert 0 < run.after.reward < 1
    assert (learning.model_of(tmp_path, "chain", "survivor 6+2 of 12") / "model.safetensors").is_file()
