"""How many samples are launched: the total, the split, and the split of a stream."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.shaper.redundancy import (
    Allocator,
    Utility,
    continuous_split,
    latency_elasticity,
    mean_redundancy,
    split_paper,
    split_reward_aware,
    split_shuffled,
    split_uniform,
)

M = 8
spreads_strategy = st.lists(st.floats(0, 3), min_size=1, max_size=12)


def cost(spreads: list[float], split: Sequence[float]) -> float:
    return sum(s / r for s, r in zip(spreads, split, strict=True))


@given(st.lists(st.floats(0, 3), min_size=1, max_size=4), st.integers(0, 12))
def test_greedy_split_is_as_good_as_the_best_of_all(spreads: list[float], extra: int) -> None:
    low, high = 3, 6
    budget = low * len(spreads) + extra % (3 * len(spreads) + 1)
    every = [s for s in itertools.product(range(low, high + 1), repeat=len(spreads)) if sum(s) == budget]
    best = min(cost(spreads, split) for split in every)
    assert cost(spreads, split_paper(spreads, budget, low, high).tolist()) == pytest.approx(best)


@given(spreads_strategy, st.floats(0, 1))
def test_every_split_spends_the_budget_within_bounds(spreads: list[float], share: float) -> None:
    num = len(spreads)
    budget = num * M + int(share * num * M)
    splits = [
        split_paper(spreads, budget, M, 2 * M),
        split_uniform(num, budget, M, 2 * M),
        split_shuffled(spreads, budget, M, 2 * M, seed=3),
        split_reward_aware(spreads, [0.2] * num, budget, M, 2 * M),
    ]
    for split in splits:
        assert split.sum() == budget
        assert split.min() >= M
        assert split.max() <= 2 * M
    assert splits[1].max() - splits[1].min() <= 1
    assert sorted(splits[2]) == sorted(splits[0])


@given(spreads_strategy, st.floats(0, 1))
def test_more_spread_never_gets_fewer_samples(spreads: list[float], share: float) -> None:
    split = split_paper(spreads, len(spreads) * M + int(share * len(spreads) * M), M, 2 * M)
    by_spread = sorted(zip(spreads, split.tolist(), strict=True))
    for (less, few), (more, many) in itertools.pairwise(by_spread):
        assert few <= many or less == more


def test_equal_spreads_share_alike_even_where_there_is_nothing_to_gain() -> None:
    assert split_paper([0.0] * 4, 38, M, 2 * M).tolist() == [10, 10, 9, 9]
    assert split_paper([0.3] * 4, 38, M, 2 * M).tolist() == [10, 10, 9, 9]


def test_shuffled_split_follows_its_seed() -> None:
    spreads = np.linspace(0.1, 2, 40)
    first, again, other = (split_shuffled(spreads, 480, M, 2 * M, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_reward_aware_split_prefers_what_can_teach() -> None:
    assert split_reward_aware([0.3, 0.3, 0.3], [0.01, 0.2, 0.0], 32, M, 2 * M).tolist() == [8, 16, 8]


@pytest.mark.parametrize("budget", [15, 33])
def test_a_budget_that_cannot_be_spent_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"budget of {budget} samples for 2 prompts is outside \[16, 32\]"):
        split_paper([1.0, 1.0], budget, M, 2 * M)


@pytest.mark.parametrize("spread", [-0.1, math.nan, math.inf])
def test_a_spread_that_is_none_is_refused(spread: float) -> None:
    with pytest.raises(ValueError, match="a length spread is"):
        split_paper([spread], 8, M, 2 * M)


# --- the total ---------------------------------------------------------------------------------------------------


@given(st.floats(0, 3), st.floats(0.05, 1))
def test_mean_redundancy_maximises_benefit_less_price_of_time(spread: float, elasticity: float) -> None:
    utility = Utility(elasticity=elasticity)

    def gain(m: float) -> float:
        x = (m - M) / M
        return spread * (1 - math.exp(-utility.kappa * x)) - utility.price * (1 + elasticity * x)

    found = mean_redundancy(spread, M, utility=utility)
    assert M <= found <= 14
    assert gain(found) >= max(gain(m) for m in np.linspace(M, 14, 200).tolist()) - 1e-9


def test_default_mean_redundancy_is_the_papers() -> None:
    for spread in (0.21, 0.25, 0.3, 0.32):
        assert mean_redundancy(spread, M) == pytest.approx(M * (1 + 1.5 * math.log(5 * spread)))
    assert mean_redundancy(2.0, M) == 14
    assert mean_redundancy(0.2, M) == mean_redundancy(0.0, M) == M


def test_redundancy_is_free_on_idle_hardware_and_dear_on_full() -> None:
    def affine(batch: float) -> float:
        return 1 + batch / 64

    assert latency_elasticity(affine, 64) == pytest.approx(0.5, abs=0.01)
    assert latency_elasticity(lambda _: 3.0, 32) == 0
    assert latency_elasticity(lambda b: 2 * b, 32) == pytest.approx(1)
    idle, busy = (Utility(elasticity=latency_elasticity(affine, batch)) for batch in (8, 512))
    assert mean_redundancy(0.25, M, utility=idle) > mean_redundancy(0.25, M, utility=busy)
    assert mean_redundancy(0.01, M, utility=Utility(elasticity=0)) == 14


# --- one at a time -----------------------------------------------------------------------------------------------


@given(st.lists(st.just(0.0) | st.floats(1e-6, 3), min_size=1, max_size=30), st.floats(0, 1))
def test_continuous_split_meets_its_mean_and_bounds_the_greedy_one(spreads: list[float], share: float) -> None:
    num, num_positive = len(spreads), sum(s > 0 for s in spreads)
    budget = num * M + int(share * num_positive * M)
    split = continuous_split(np.array(spreads), budget / num, M, 2 * M)
    assert split.min() >= M
    assert split.max() <= 2 * M
    assert split.sum() == pytest.approx(budget, abs=1e-6)
    assert cost(spreads, split.tolist()) <= cost(spreads, split_paper(spreads, budget, M, 2 * M).tolist()) + 1e-6


def test_continuous_split_gives_all_it_can_where_the_mean_is_out_of_reach() -> None:
    assert continuous_split(np.array([0.5, 0.0]), 15.0, M, 2 * M).tolist() == [16, 8]


def lognormal_spreads(num: int, seed: int = 0) -> list[float]:
    sigmas = np.exp(np.random.default_rng(seed).normal(-1.598, 0.392, num))
    return [float(spread) for spread in np.sqrt(np.expm1(sigmas**2))]


@pytest.mark.slow
@pytest.mark.parametrize("mean", [8.3, 10.0, 13.5])
def test_allocator_gives_a_stream_nearly_the_batch_split(mean: float) -> None:
    allocator, spreads = Allocator(M, 2 * M), lognormal_spreads(1024)
    online = []
    for spread in spreads:
        online.append(allocator.allocate(spread, mean))
        allocator.validate()
    batch = split_paper(spreads, round(mean * len(spreads)), M, 2 * M)
    assert np.mean(online) == pytest.approx(mean, abs=0.05)
    assert np.abs(np.array(online) - batch)[256:].mean() < 0.6
    assert cost(spreads, online) == pytest.approx(cost(spreads, batch.tolist()), rel=0.005)


def test_allocator_pays_back_when_the_prompts_change() -> None:
    allocator = Allocator(M, 2 * M, window=32)
    spreads = [*lognormal_spreads(200), *(3 * s for s in lognormal_spreads(200, seed=1))]
    given = [allocator.allocate(spread, 10.0) for spread in spreads]
    assert np.mean(given) == pytest.approx(10, abs=0.1)


def test_uniform_values_get_the_mean_with_its_fraction_carried() -> None:
    allocator = Allocator(M, 2 * M)
    given = [allocator.allocate(1.0, 10.4) for _ in range(50)]
    assert set(given) == {10, 11}
    assert sum(given) == 520


def test_without_spread_or_with_the_lowest_mean_redundancy_is_switched_off() -> None:
    allocator = Allocator(M, 2 * M)
    assert {allocator.allocate(0.0, 12.0) for _ in range(300)} == {M}
    assert {allocator.allocate(s, mean_redundancy(0.1, M)) for s in lognormal_spreads(50)} == {M}


def test_placebo_has_the_distribution_but_not_the_prompts() -> None:
    spreads = lognormal_spreads(400)
    paper, placebo = Allocator(M, 2 * M), Allocator(M, 2 * M, shuffle_seed=5)
    given = np.array([(paper.allocate(s, 11.0), placebo.allocate(s, 11.0)) for s in spreads])
    assert given.mean(axis=0) == pytest.approx([11, 11], abs=0.15)
    assert given.std(axis=0)[1] == pytest.approx(given.std(axis=0)[0], rel=0.15)
    assert np.corrcoef(spreads, given[:, 0])[0, 1] > 0.9
    assert abs(np.corrcoef(spreads, given[:, 1])[0, 1]) < 0.15


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 20)), max_size=60), st.sampled_from([None, 7]))
def test_allocator_is_deterministic_and_within_bounds(calls: list[tuple[float, float]], seed: int | None) -> None:
    one, other = Allocator(M, 2 * M, window=16, shuffle_seed=seed), Allocator(M, 2 * M, window=16, shuffle_seed=seed)
    for value, mean in calls:
        launched = one.allocate(value, mean)
        assert launched == other.allocate(value, mean)
        assert M <= launched <= 2 * M
        assert launched == M or mean > M
        one.validate()


def test_an_allocator_with_crossed_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bounds \[8, 7\]"):
        Allocator(8, 7)
