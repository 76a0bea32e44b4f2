import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config import Baseline
from darts_async.learner.advantage import LOWEST_PASS_RATE, group_advantages, leave_one_out_baselines

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, -2.0]), min_size=1, max_size=12)


def advantages(
    rewards: list[float],
    weights: list[float] | None = None,
    normalise: bool = True,
    baseline: Baseline = "group",
    pass_rate: float | None = None,
) -> np.ndarray:
    weights = weights or [1.0] * len(rewards)
    arrays = np.array(rewards, np.float32), np.array(weights, np.float32)
    return group_advantages(*arrays, normalise=normalise, baseline=baseline, pass_rate=pass_rate)


def test_advantages_equal_numbers_computed_by_hand() -> None:
    # mean 1/4, population variance (9/16 + 3/16) / 4 = 3/16
    expected = np.array([0.75, -0.25, -0.25, -0.25]) / np.sqrt(3 / 16)
    np.testing.assert_allclose(advantages([1, 0, 0, 0]), expected, rtol=1e-5)
    np.testing.assert_allclose(advantages([1, 0, 0, 0], normalise=False), [0.75, -0.25, -0.25, -0.25])


def test_weights_move_the_baseline_and_scale_the_term() -> None:
    # baseline (1 + 3 * 0) / 4; the second sample stands for three
    np.testing.assert_allclose(advantages([1, 0], [1, 3], normalise=False), [0.75, -0.75])
    # variance (0.75^2 + 3 * 0.25^2) / 4 = 3/16
    np.testing.assert_allclose(advantages([1, 0], [1, 3]), np.array([0.75, -0.75]) / np.sqrt(3 / 16), rtol=1e-5)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -7.3])
def test_equal_rewards_give_exactly_zero(value: float, baseline: Baseline) -> None:
    assert not advantages([value] * 7, [1, 1, 1, 1, 8 / 3, 8 / 3, 8 / 3], baseline=baseline).any()
    assert not advantages([value] * 7, [0.3, 1.7, 1, 1, 2, 5, 0.1]).any()


@given(REWARDS, st.data())
def test_advantages_of_a_group_sum_to_zero(rewards: list[float], data: st.DataObject) -> None:
    size = len(rewards)
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=size, max_size=size))
    assert abs(advantages(rewards, weights).sum()) < 1e-4


@given(REWARDS, st.floats(0.5, 2), st.floats(-3, 3))
def test_normalised_advantages_ignore_scale_and_shift_of_rewards(
    rewards: list[float], scale: float, shift: float
) -> None:
    moved = [scale * reward + shift for reward in rewards]
    if len(set(np.float32(moved))) == len(set(np.float32(rewards))):
        np.testing.assert_allclose(advantages(moved), advantages(rewards), atol=1e-3)


def test_without_selection_a_sample_is_compared_with_the_mean_of_its_siblings() -> None:
    actual = advantages([1, 0, 0.5], normalise=False, baseline="leave_one_out")
    np.testing.assert_allclose(actual, [1 - 0.25, 0 - 0.75, 0.5 - 0.5], atol=1e-7)


def test_the_leave_one_out_baseline_equals_numbers_computed_by_hand() -> None:
    # 2 at the short end, 2 of a tail of 5: 7 launched. Short end: (1 + 2.5 * 1) / 6; survivors: (1 + 4 / 1 * r) / 6
    rewards, weights = np.array([1, 0, 1, 0], np.float32), np.array([1, 1, 2.5, 2.5], np.float32)
    expected = np.array([0 + 2.5, 1 + 2.5, 1 + 4 * 0, 1 + 4 * 1]) / 6
    np.testing.assert_allclose(leave_one_out_baselines(rewards, weights), expected, rtol=1e-12)
    actual = advantages([1, 0, 1, 0], [1, 1, 2.5, 2.5], normalise=False, baseline="leave_one_out")
    np.testing.assert_allclose(actual, np.array([1, 1, 2.5, 2.5]) * (rewards - expected), rtol=1e-6)


@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 9), st.floats(-3, 3, width=32))
def test_the_leave_one_out_baseline_of_equal_rewards_is_that_reward(
    num_short: int, num_survivors: int, num_cancelled: int, value: float
) -> None:
    weight = (num_survivors + num_cancelled) / num_survivors
    weights = np.array([1.0] * num_short + [weight] * num_survivors, np.float32)
    baselines = leave_one_out_baselines(np.full(len(weights), value, np.float32), weights)
    np.testing.assert_allclose(baselines, value, rtol=1e-12)


def test_a_lone_sentinel_is_compared_with_the_others_and_kills_nothing() -> None:
    """No setting sends one to a leave-one-out baseline; a message that does is trained on all the same."""
    baselines = leave_one_out_baselines(np.array([1, 0, 1, 1], np.float32), np.array([1, 1, 1, 10], np.float32))
    np.testing.assert_allclose(baselines, [(0 + 1 + 10) / 12, (1 + 1 + 10) / 12, (1 + 0 + 10) / 12, 2 / 3])


@given(st.floats(0.1, 3))
def test_only_ratios_of_weights_make_a_leave_one_out_baseline(scale: float) -> None:
    rewards, weights = np.array([1, 0, 1, 0, 0.5], np.float32), np.array([1, 1, 1, 7 / 3, 7 / 3])
    scaled = leave_one_out_baselines(rewards, (scale * weights).astype(np.float32))
    np.testing.assert_allclose(scaled, leave_one_out_baselines(rewards, weights.astype(np.float32)), rtol=1e-6)


def test_a_history_is_a_baseline_that_ignores_the_group() -> None:
    actual = advantages([1, 1, 0], [1, 1, 2], normalise=False, baseline="history", pass_rate=0.25)
    np.testing.assert_allclose(actual, [0.75, 0.75, -0.5])
    # deviation of the history: sqrt(1/4 * 3/4)
    normalised = advantages([1, 1, 1], baseline="history", pass_rate=0.25)
    np.testing.assert_allclose(normalised, np.full(3, 0.75 / np.sqrt(3 / 16)), rtol=1e-6)


@pytest.mark.parametrize("pass_rate", [0.0, 1.0])
def test_a_history_without_spread_does_not_blow_a_surprise_up(pass_rate: float) -> None:
    surprise = advantages([1 - pass_rate], baseline="history", pass_rate=pass_rate)
    limit = 1 / np.sqrt(LOWEST_PASS_RATE * (1 - LOWEST_PASS_RATE))
    np.testing.assert_allclose(np.abs(surprise), [limit], rtol=1e-6)
    assert not advantages([pass_rate], baseline="history", pass_rate=pass_rate).any()
