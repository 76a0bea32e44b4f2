import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.learner.advantage import group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, -2.0]), min_size=1, max_size=12)


def advantages(rewards: list[float], weights: list[float] | None = None, normalise: bool = True) -> np.ndarray:
    weights = weights or [1.0] * len(rewards)
    return group_advantages(np.array(rewards, np.float32), np.array(weights, np.float32), normalise=normalise)


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


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -7.3])
def test_equal_rewards_give_exactly_zero(value: float) -> None:
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
