import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.advantage import LOWEST_PASS_RATE, Decoded, group_advantages, leave_one_out
from darts_async.config import Baseline

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


def short_and_tail(num_short: int, num_tail: int, decoded: Decoded) -> np.ndarray:
    """Weights of so many samples of the short end and as many of a tail of `num_tail` that were launched."""
    launched, kept = decoded.shortest + num_tail, sum(decoded)
    tail = kept / launched * num_tail / decoded.longest
    return np.array([kept / launched] * num_short + [tail] * decoded.longest, np.float32)


def test_leave_one_out_of_survivors_equals_numbers_computed_by_hand() -> None:
    # 2 at the short end, 2 of a tail of 5: 7 launched. Short end: (1 + 2.5 * 1) / 6; survivors: (1 + 4 / 1 * r) / 6
    rewards, weights = np.array([1, 0, 1, 0], np.float32), short_and_tail(2, 5, Decoded(2, 2))
    baselines = np.array([0 + 2.5, 1 + 2.5, 1 + 4 * 0, 1 + 4 * 1]) / 6
    np.testing.assert_allclose(leave_one_out(rewards, weights, Decoded(2, 2)), rewards - baselines, rtol=1e-12)
    actual = group_advantages(rewards, weights, normalise=False, baseline="leave_one_out", decoded=Decoded(2, 2))
    np.testing.assert_allclose(actual, np.array([1, 1, 2.5, 2.5]) * 4 / 7 * (rewards - baselines), rtol=1e-6)
    # Without the reward of the second: each pair that is left counts 3 / 2 times.
    better = np.array([2.5 * 1, 4 * 0 + 1 * 0 + 4 * 1, 1 * -1 + 4 * -1]) / 6 * 3 / 2
    np.testing.assert_allclose(leave_one_out(rewards[[0, 2, 3]], weights[[0, 2, 3]], Decoded(2, 2)), better, rtol=1e-12)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 100), st.booleans())
def test_each_weight_tells_how_many_samples_were_launched(
    num_short: int, num_survivors: int, num_cancelled: int, has_short: bool
) -> None:
    decoded, num_tail = Decoded(num_short, num_survivors), num_survivors + num_cancelled
    weights = short_and_tail(num_short if has_short else 0, num_tail, decoded)
    expected = num_short + num_tail
    assert {decoded.num_launched(float(weight)) for weight in weights} == {expected}


def test_samples_that_are_left_of_equal_weights_are_compared_with_their_siblings() -> None:
    """However many the rule decodes."""
    rewards, weights = np.array([1, 0, 0.5], np.float32), np.ones(3, np.float32)
    for decoded in (None, Decoded(2, 1), Decoded(6, 2), Decoded(3, 5)):
        np.testing.assert_allclose(leave_one_out(rewards, weights, decoded), [0.75, -0.75, 0], atol=1e-12)


@pytest.mark.parametrize("decoded", [None, Decoded(6, 2), Decoded(7, 1)])
@pytest.mark.parametrize("weights", [[1, 1, 1, 10], [9, 9, 8, 7], [1e-30, 1, 1, 1e30]])
def test_weights_that_no_rule_gives_kill_nothing(weights: list[float], decoded: Decoded | None) -> None:
    """No setting leads there; a message that has them is trained on all the same."""
    better = leave_one_out(np.array([1, 0, 1, 1], np.float32), np.array(weights, np.float32), decoded)
    assert np.isfinite(better).all()


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
