"""What counts in a step and what it is divided by, against numbers counted by hand."""

import numpy as np
import pytest

from darts_async.advantage import overlong_penalties
from darts_async.config import LossConfig
from darts_async.learner.losses.aggregation import denominator, token_shares
from darts_async.protocol import TrainGroup
from tests.learner.world import make_group

CAP = 5


def group_of(lengths: list[int], versions: list[int] | None = None) -> TrainGroup:
    group = make_group(lengths, step=3)
    if versions is not None:
        group.versions[:] = versions
    return group


@pytest.mark.parametrize(
    ("aggregate", "shares", "divisor"),
    [
        ("token_mean", [1, 1, 1, 1, 1, 1], 6),
        ("sequence_mean", [0.25, 0.25, 0.25, 0.25, 0.5, 0.5], 2),  # the sample without a token is none
        ("constant", [1, 1, 1, 1, 1, 1], 10),
    ],
)
def test_each_aggregate_has_its_shares_and_denominator(aggregate: str, shares: list[float], divisor: float) -> None:
    config = LossConfig(aggregate=aggregate)  # type: ignore[arg-type]
    group = group_of([4, 0, 2])
    np.testing.assert_array_equal(token_shares(group, config, CAP), np.array(shares, np.float32))
    assert denominator(group, config, CAP) == divisor


def test_stale_tokens_are_left_out_one_by_one() -> None:
    group = group_of([3, 2, 1], versions=[1, 2, 3, 1, 3, 1])
    config = LossConfig(aggregate="sequence_mean", max_token_staleness=1)
    np.testing.assert_array_equal(token_shares(group, config, CAP), np.array([0, 0.5, 0.5, 0, 1, 0], np.float32))
    assert denominator(group, config, CAP) == 2
    assert denominator(group, LossConfig(max_token_staleness=1), CAP) == 3


def test_overlong_samples_are_left_out_as_a_whole() -> None:
    group = group_of([4, 5, 2])
    config = LossConfig(overlong_filter=True)
    assert token_shares(group, config, CAP).tolist() == [1] * 4 + [0] * 5 + [1] * 2
    assert denominator(group, config, CAP) == 6
    assert denominator(group, LossConfig(overlong_filter=True, aggregate="constant"), CAP) == 10


def test_a_group_of_which_nothing_is_trained_adds_nothing() -> None:
    for aggregate in ("token_mean", "sequence_mean", "constant"):
        config = LossConfig(overlong_filter=True, aggregate=aggregate)  # type: ignore[arg-type]
        assert not token_shares(group_of([5, 5]), config, CAP).any()
        assert denominator(group_of([5, 5]), config, CAP) == 0


def test_the_overlong_penalty_rises_over_the_buffer() -> None:
    lengths = np.array([10, 60, 80, 90, 100], np.int32)
    config = LossConfig(overlong_buffer_tokens=40, overlong_penalty=2.0)
    np.testing.assert_allclose(overlong_penalties(lengths, config, 100), [0, 0, 1, 1.5, 2])
    assert not overlong_penalties(lengths, LossConfig(), 100).any()
