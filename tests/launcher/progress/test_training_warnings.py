"""Warnings of a run that learns little: after enough steps, once, and with what to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.progress.step_merger import StepLine
from launcher.progress.training_warnings import WATCHED, WINDOW_STEPS, TrainingWarnings

FINE = {
    "reward/pool_mean": 0.4,
    "groups/pool_zero_advantage_share": 0.2,
    "length/capped_share": 0.1,
    "reward/failed_share": 0.0,
}


def told(num_steps: int, **changed: float) -> list[str]:
    warnings = TrainingWarnings()
    names = {name.replace("/", "_"): name for name in FINE}
    metrics = FINE | {names[key]: value for key, value in changed.items()}
    return [text for step in range(num_steps) for text in warnings.take(StepLine(step, metrics))]


def test_a_run_that_learns_is_left_alone() -> None:
    assert told(50) == []


@pytest.mark.parametrize(
    ("changed", "said", "advice"),
    [
        ({"length_capped_share": 0.6}, "60% of the responses are cut", "raise it"),
        ({"reward_failed_share": 0.2}, "20% of the responses have no reward", "samples --failed"),
        (
            {"groups_pool_zero_advantage_share": 0.9},
            "the same reward in 90% of the groups",
            "neither always nor never solves",
        ),
        (
            {"groups_pool_zero_advantage_share": 1.0, "reward_pool_mean": 0.0},
            "every reward of the last 5 steps is 0, so nothing is learned",
            "darts-launch samples",
        ),
    ],
)
def test_each_warning_comes_once_after_enough_steps(changed: dict[str, float], said: str, advice: str) -> None:
    assert told(WINDOW_STEPS - 1, **changed) == []
    (text,) = told(50, **changed)
    assert said in text
    assert advice in text


def test_one_odd_step_raises_no_warning() -> None:
    warnings = TrainingWarnings()
    for step in range(20):
        odd = {"length/capped_share": 1.0} if step == 9 else {}
        assert warnings.take(StepLine(step, FINE | odd)) == []


def test_a_step_that_comes_again_counts_once() -> None:
    warnings = TrainingWarnings()
    for _ in range(50):
        assert warnings.take(StepLine(0, FINE | {"length/capped_share": 1.0})) == []


@given(st.lists(st.dictionaries(st.sampled_from(WATCHED), st.floats(0, 1)), max_size=40))
def test_no_warning_comes_twice_whatever_the_metrics(steps: list[dict[str, float]]) -> None:
    warnings, texts = TrainingWarnings(), list[str]()
    for step, metrics in enumerate(steps):
        texts += warnings.take(StepLine(step, metrics))
        warnings.validate()
    assert len(texts) <= 4
