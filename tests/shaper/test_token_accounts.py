"""The metrics of a step, by hand."""

import numpy as np
import pytest

from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.token_accounts import StepStatistics
from tests.shaper.world import prompts


def group_of(group_id: int, rewards: list[float], lengths: list[int], kept: list[int], *, launched: int = 0) -> Group:
    zeros = [(3, np.zeros(n, np.int32), np.zeros(n, np.float32)) for n in lengths]
    samples = [
        Sample(i, Stage.SCORED, num_tokens=n, oldest_version=3, finish_reason="stop", reward=r, chunks=[chunk])
        for i, (r, n, chunk) in enumerate(zip(rewards, lengths, zeros, strict=True))
    ]
    samples += [Sample(len(samples) + i, Stage.CANCELLING, num_tokens=7) for i in range(launched - len(samples))]
    group = Group(group_id, prompts(1)[0], "train", samples)
    group.weights = {samples[i].sample_id: 1.0 if i else 2.0 for i in kept}
    return group


def test_the_metrics_of_a_step_are_those_of_its_kept_samples_beside_the_pool() -> None:
    statistics = StepStatistics()
    first = group_of(0, [0.0, 1.0, 1.0], [10, 20, 60], [0, 1], launched=4)
    second = group_of(1, [1.0, 1.0, 0.0], [30, 30, 30], [0, 1])
    statistics.completed(first, tercile=0)
    statistics.completed(second, tercile=None)
    statistics.dropped(Group(7, prompts(1)[0], "train", []), 0)
    metrics = statistics.close(5, [first, second], [{}, {}])
    assert metrics["reward/mean"] == pytest.approx(3 / 4)
    assert metrics["reward/pool_mean"] == pytest.approx(4 / 6)
    assert metrics["length/mean"] == pytest.approx(90 / 4)
    assert metrics["length/pool_mean"] == pytest.approx(180 / 6)
    # first: rewards -+.5 against lengths -+5 -> 2.5; second: all equal -> 0
    assert metrics["reward/length_covariance"] == pytest.approx(1.25)
    assert metrics["groups/zero_advantage_share"] == 0.5
    assert metrics["groups/pool_zero_advantage_share"] == 0.0
    assert metrics["groups/baseline_shift"] == pytest.approx(((1 / 2 - 2 / 3) + (1 - 2 / 3)) / 2)
    # weights 2 and 1: 9 / (2 * 5)
    assert metrics["weights/effective_share"] == pytest.approx(0.9)
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (2.0, 2.0)
    assert (metrics["redundancy/launched_3"], metrics["redundancy/launched_4"]) == (1.0, 1.0)
    assert metrics["redundancy/mean"] == 3.5
    assert metrics["run/survival_hard"] == 0.5
    assert metrics["run/censored_hard"] == 0.25
    assert metrics["run/survival_unknown"] == 1.0


def test_a_step_of_groups_of_different_sizes_has_metrics_by_hand() -> None:
    statistics = StepStatistics()
    first, second = group_of(0, [0.0, 1.0, 1.0], [10, 20, 60], [0, 1, 2]), group_of(1, [1.0, 0.0], [30, 40], [0, 1])
    second.samples.append(Sample(2, Stage.UNSCORABLE, num_tokens=5, end_reason="reward_raised"))
    for group in (first, second):
        group.weights = dict.fromkeys(group.weights or {}, 1.0)
        statistics.completed(group, tercile=None)
    metrics = statistics.close(5, [first, second], [{}, {}])
    assert metrics["reward/mean"] == pytest.approx(3 / 5)
    assert metrics["length/mean"] == pytest.approx(160 / 5)
    # first: (-2/3) 10 + (1/3) 20 + (1/3) 60 = 20; second: (1/2) 30 - (1/2) 40 = -5
    assert metrics["reward/length_covariance"] == pytest.approx(15 / 5)
    assert metrics["groups/kept_mean"] == 2.5
    assert metrics["reward/failed_share"] == pytest.approx(1 / 6)
    assert metrics["weights/effective_share"] == pytest.approx(1.0)


def test_the_pool_is_all_that_was_launched_where_a_draw_has_left_some_for_others() -> None:
    """Two short ones are right; of a tail of four, all wrong, one survives: 2 of 6 are right and not 2 of 3."""
    statistics = StepStatistics()
    group = group_of(0, [1.0, 1.0, 0.0], [10, 20, 60], [0, 1, 2], launched=6)
    statistics.completed(group, None)
    metrics = statistics.close(5, [group], [{2: 4.0}])
    assert metrics["reward/mean"] == pytest.approx(2 / 3)
    assert metrics["reward/pool_mean"] == pytest.approx(1 / 3)
    assert metrics["length/pool_mean"] == pytest.approx(270 / 6)
    assert metrics["length/pool_p50"] == 60
    assert metrics["groups/baseline_shift"] == pytest.approx(1 / 3)


def test_oscillation_of_the_budget_shows_as_a_negative_autocorrelation() -> None:
    statistics = StepStatistics()
    for visit, launched in enumerate([4, 8, 4, 8, 4, 8]):
        group = group_of(visit, [0.0, 1.0], [10, 20], [0, 1], launched=launched)
        statistics.completed(group, tercile=None)
        metrics = statistics.close(5, [group], [{}])
    assert metrics["run/redundancy_autocorrelation"] == pytest.approx(-1.0)


def test_each_of_several_reward_functions_has_its_mean_and_spread_over_the_pool() -> None:
    statistics = StepStatistics()
    group = group_of(0, [0.0, 1.0, 1.0], [10, 20, 60], [0, 1])
    for sample, parts in zip(group.samples, [(0.0, 4.0), (1.0, 4.0), (1.0, 7.0)], strict=True):
        sample.reward_parts = parts
    statistics.completed(group, tercile=None)
    metrics = statistics.close(5, [group], [{0: 2.0}], ["right", "brief"])
    assert metrics["rewards/right/mean"] == pytest.approx(0.5)
    assert metrics["rewards/right/std"] == pytest.approx(0.5)
    assert metrics["rewards/brief/mean"] == pytest.approx(4.75)
    assert metrics["rewards/brief/std"] == pytest.approx((3 * 0.75**2 / 4 + 2.25**2 / 4) ** 0.5)
