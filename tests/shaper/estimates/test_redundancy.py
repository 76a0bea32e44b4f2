"""How many samples are launched: the total, the split, and the split of a stream."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config.shaping import Split
from darts_async.shaper.estimates.redundancy import (
    Allocator,
    mean_redundancy,
    reward_aware_value,
    split_paper,
    split_uniform,
)
from darts_async.wire.encoding import decoder, encode

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
    paper, uniform = split_paper(spreads, budget, M, 2 * M), split_uniform(num, budget, M, 2 * M)
    for split in (paper, uniform):
        assert split.sum() == budget
        assert split.min() >= M
        assert split.max() <= 2 * M
    assert uniform.max() - uniform.min() <= 1


@given(spreads_strategy, st.floats(0, 1))
def test_more_spread_never_gets_fewer_samples(spreads: list[float], share: float) -> None:
    split = split_paper(spreads, len(spreads) * M + int(share * len(spreads) * M), M, 2 * M)
    by_spread = sorted(zip(spreads, split.tolist(), strict=True))
    for (less, few), (more, many) in itertools.pairwise(by_spread):
        assert few <= many or less == more


def test_equal_spreads_share_alike_even_where_there_is_nothing_to_gain() -> None:
    assert split_paper([0.0] * 4, 38, M, 2 * M).tolist() == [10, 10, 9, 9]
    assert split_paper([0.3] * 4, 38, M, 2 * M).tolist() == [10, 10, 9, 9]


@pytest.mark.parametrize("budget", [15, 33])
def test_a_budget_that_cannot_be_spent_is_refused(budget: int) -> None:
    with pytest.raises(AssertionError, match=str(budget)):
        split_paper([1.0, 1.0], budget, M, 2 * M)


@pytest.mark.parametrize("spread", [-0.1, math.nan, math.inf])
def test_a_spread_that_is_none_is_refused(spread: float) -> None:
    with pytest.raises(AssertionError, match=str(spread)):
        split_paper([spread], 8, M, 2 * M)


# --- the total ---------------------------------------------------------------------------------------------------


@given(st.floats(0, 3), st.floats(0.05, 1))
def test_mean_redundancy_maximises_benefit_less_price_of_time(spread: float, elasticity: float) -> None:

    def gain(m: float) -> float:
        x = (m - M) / M
        return spread * (1 - math.exp(-2 / 3 * x)) - 2 / 15 * (1 + elasticity * x)

    found = mean_redundancy(spread, M, elasticity=elasticity)
    assert M <= found <= 14
    assert gain(found) >= max(gain(m) for m in np.linspace(M, 14, 200).tolist()) - 1e-9


def test_default_mean_redundancy_is_the_papers() -> None:
    for spread in (0.21, 0.25, 0.3, 0.32):
        assert mean_redundancy(spread, M) == pytest.approx(M * (1 + 1.5 * math.log(5 * spread)))
    assert mean_redundancy(2.0, M) == 14
    assert mean_redundancy(0.2, M) == mean_redundancy(0.0, M) == M


def test_redundancy_is_free_on_idle_hardware_and_dear_on_full() -> None:
    assert mean_redundancy(0.25, M, elasticity=0.1) > mean_redundancy(0.25, M, elasticity=0.9)
    assert mean_redundancy(0.01, M, elasticity=0) == 14


# --- batch after batch -------------------------------------------------------------------------------------------


def lognormal_spreads(num: int, seed: int = 0) -> list[float]:
    sigmas = np.exp(np.random.default_rng(seed).normal(-1.598, 0.392, num))
    return [float(spread) for spread in np.sqrt(np.expm1(sigmas**2))]


def test_each_batch_gets_the_exact_greedy_split_of_its_budget() -> None:
    allocator, spreads = Allocator(M, 2 * M, "paper"), lognormal_spreads(32)
    assert allocator.allocate(spreads, 10.0) == split_paper(spreads, 320, M, 2 * M).tolist()


def test_what_is_rounded_off_is_carried_to_the_next_batch() -> None:
    allocator = Allocator(M, 2 * M, "uniform")
    batches = [allocator.allocate([1.0] * 3, 10.4) for _ in range(50)]
    assert {sum(batch) for batch in batches} == {31, 32}
    assert abs(sum(map(sum, batches)) - 50 * 3 * 10.4) <= 0.5
    assert all(max(batch) - min(batch) <= 1 for batch in batches)


def test_with_the_lowest_mean_redundancy_is_switched_off_and_nothing_is_owed() -> None:
    allocator, other = Allocator(M, 2 * M, "paper"), Allocator(M, 2 * M, "paper")
    allocator.allocate(lognormal_spreads(3), 10.1)
    assert allocator.allocate(lognormal_spreads(50), mean_redundancy(0.1, M)) == [M] * 50
    assert allocator.allocate(lognormal_spreads(7), 9.5) == other.allocate(lognormal_spreads(7), 9.5)


def test_placebo_has_the_multiset_of_each_batch_but_not_the_prompts() -> None:
    paper, placebo = Allocator(M, 2 * M, "paper"), Allocator(M, 2 * M, "shuffled", seed=5)
    spreads = [lognormal_spreads(32, seed) for seed in range(30)]
    pairs = [(paper.allocate(s, 11.0), placebo.allocate(s, 11.0)) for s in spreads]
    assert all(sorted(one) == sorted(other) for one, other in pairs)
    one, other = np.array(pairs).swapaxes(0, 1).reshape(2, -1)
    assert np.corrcoef(np.ravel(spreads), one)[0, 1] > 0.9
    assert abs(np.corrcoef(np.ravel(spreads), other)[0, 1]) < 0.15
    again, another = (Allocator(M, 2 * M, "shuffled", seed=seed).allocate(spreads[0], 11.0) for seed in (5, 6))
    assert again == pairs[0][1] != another


def test_reward_aware_values_prefer_what_can_teach() -> None:
    values = [reward_aware_value(0.3, variance) for variance in (0.01, 0.2, 0.0)]
    assert Allocator(M, 2 * M, "reward_aware").allocate(values, 32 / 3) == [8, 16, 8]


@given(
    st.lists(st.tuples(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(0, 20)), max_size=20),
    st.sampled_from(["uniform", "paper", "shuffled"]),
)
def test_an_allocator_stays_within_bounds_and_owes_less_than_a_sample(
    calls: list[tuple[list[float], float]], split: Split
) -> None:
    allocator = Allocator(M, 2 * M, split)
    for values, mean in calls:
        launched = allocator.allocate(values, mean)
        assert len(launched) == len(values)
        assert min(launched) >= M
        assert max(launched) <= 2 * M
        assert mean > M or launched == [M] * len(values)
        allocator.validate()


@pytest.mark.parametrize("split", ["uniform", "paper", "shuffled"])
def test_an_allocator_that_was_saved_goes_on_as_the_one_that_was_not(split: Split) -> None:
    spreads = lognormal_spreads(7)
    saved, fresh = (Allocator(M, 2 * M, split, seed=3) for _ in range(2))
    saved.allocate(spreads, 10.2)  # 71.4 samples: .4 are owed
    restored = decoder(Allocator).decode(encode(saved))
    after, again, other = ([a.allocate(spreads, 10.2) for _ in range(5)] for a in (saved, restored, fresh))
    assert after == again != other
