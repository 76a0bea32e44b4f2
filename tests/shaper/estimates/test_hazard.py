"""Who is aborted, who is spared, and that what is spared stands for what is lost."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.shaper.estimates.hazard import (
    GroupProgress,
    HazardRule,
    PruningChoice,
    expected_length_given_beyond,
    expected_remaining,
    hazard_prunes,
)
from darts_async.shaper.estimates.lognormal import LengthEstimate

ESTIMATE = LengthEstimate(mu=math.log(100), sigma=1.0, num_samples=8)
RULE = HazardRule(keep=8, shortest=7, threshold=1.8, spare_probability=0.0)
GROUP = GroupProgress(
    group_id=1,
    estimate=ESTIMATE,
    difficulty=0,
    typical_tokens=100.0,
    num_launched=12,
    finished_tokens=(20, 30, 40, 50, 60, 70, 80),
    finished_rewards=(0.0,) * 7,
    running={1: 120, 4: 300, 5: 250, 8: 100, 9: 400},
)


def integrated(mu: float, sigma: float, tokens: float, cap: float = math.inf) -> float:
    """E[min(l, cap) | l > tokens], the density taken relative to its value at the threshold."""
    start = (math.log(tokens) - mu) / sigma
    u = np.linspace(start, max(start, 0.0) + 14 + 4 * sigma, 400_001)
    density = np.exp(-0.5 * (u - max(start, 0.0)) * (u + max(start, 0.0)))
    lengths = np.minimum(np.exp(mu + sigma * u), cap)
    return float(np.trapezoid(lengths * density, u) / np.trapezoid(density, u))


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.2])
@pytest.mark.parametrize("z", [-6.0, -0.5, 0.0, 0.5, 3.0, 11.9, 12.1, 60.0])
def test_expected_length_agrees_with_numerical_integration(sigma: float, z: float) -> None:
    tokens = math.exp(6.0 + sigma * z)
    found = expected_length_given_beyond(6.0, sigma, tokens)
    assert found == pytest.approx(integrated(6.0, sigma, tokens), rel=1e-6)


def test_expected_length_is_the_mean_before_the_first_token() -> None:
    assert expected_length_given_beyond(6.0, 0.5, 0) == pytest.approx(math.exp(6.125))
    assert expected_length_given_beyond(6.0, 0.5, 1) == pytest.approx(math.exp(6.125))


@given(st.floats(0, 10), st.floats(0.01, 3), st.floats(0, 1e6), st.floats(1, 1e6))
def test_the_remainder_is_finite_positive_and_at_most_what_the_cap_leaves(
    mu: float, sigma: float, tokens: float, cap: float
) -> None:
    estimate = LengthEstimate(mu, sigma, 1.0)
    unlimited, capped = expected_remaining(estimate, tokens), expected_remaining(estimate, tokens, cap)
    assert math.isfinite(unlimited)
    assert unlimited >= -1e-9 * tokens
    assert 0 <= capped <= max(0.0, cap - tokens) * (1 + 1e-9) + 1e-6
    assert capped <= unlimited * (1 + 1e-9) + 1e-6


def test_the_cap_shortens_the_remainder_as_integration_says() -> None:
    for tokens in (50, 150, 400):
        expected = integrated(ESTIMATE.mu, ESTIMATE.sigma, tokens, cap=500) - tokens
        assert expected_remaining(ESTIMATE, tokens, 500) == pytest.approx(expected, rel=1e-4)
    assert expected_remaining(ESTIMATE, 500, 500) == 0


def test_a_straggler_is_expected_to_need_ever_longer() -> None:
    remaining = [expected_remaining(ESTIMATE, tokens) for tokens in (100, 200, 300, 500, 1000, 10_000)]
    assert remaining == sorted(remaining)


def test_the_tail_is_pruned_worst_first_while_m_stay_alive() -> None:
    assert hazard_prunes(RULE, GROUP, seed=0).prune == (9, 4, 5, 1)
    assert hazard_prunes(replace(RULE, threshold=2.5), GROUP, seed=0).prune == (9, 4)
    eager = replace(RULE, threshold=1.0)
    assert hazard_prunes(eager, GROUP, seed=0).prune == (9, 4, 5, 1)
    assert hazard_prunes(eager, replace(GROUP, finished_tokens=(*GROUP.finished_tokens, 90)), seed=0).prune == (
        9,
        4,
        5,
        1,
        8,
    )


def test_nothing_is_pruned_before_k_siblings_have_finished() -> None:
    assert hazard_prunes(RULE, replace(GROUP, finished_tokens=GROUP.finished_tokens[:6]), seed=0) == PruningChoice()


def test_a_sample_that_began_late_is_not_of_the_tail_however_much_it_still_needs() -> None:
    even = LengthEstimate(mu=math.log(100), sigma=0.2, num_samples=8)
    running = {1: 0, 2: 5, 3: 80, 4: 130, 5: 135}
    assert expected_remaining(even, 5) > expected_remaining(even, 130)
    group = replace(GROUP, estimate=even, running=running)
    assert set(hazard_prunes(replace(RULE, threshold=0.01), group, seed=0).prune) == {4, 5}
    # K-th of the finished, not the longest of them
    many = replace(group, finished_tokens=(20, 30, 40, 50, 60, 70, 75, 200))
    assert set(hazard_prunes(replace(RULE, threshold=0.01), many, seed=0).prune) == {3, 4, 5}


def test_the_threshold_is_in_typical_lengths() -> None:
    long = replace(GROUP, typical_tokens=200.0)
    assert hazard_prunes(replace(RULE, threshold=1.25), long, seed=0).prune == (9, 4)


@pytest.mark.parametrize("difficulty", [1, None])
def test_middle_difficulty_waits_for_contrast(difficulty: int | None) -> None:
    middle = replace(GROUP, difficulty=difficulty)
    assert hazard_prunes(RULE, middle, seed=0) == PruningChoice()
    assert hazard_prunes(RULE, replace(middle, finished_rewards=()), seed=0) == PruningChoice()
    assert hazard_prunes(RULE, replace(middle, finished_rewards=(0.0, 1.0)), seed=0).prune


def test_one_sample_of_a_group_is_spared_with_probability_rho() -> None:
    rule = replace(RULE, spare_probability=0.15)
    choices = [hazard_prunes(rule, replace(GROUP, group_id=g), seed=1) for g in range(2000)]
    assert choices == [hazard_prunes(rule, replace(GROUP, group_id=g), seed=1) for g in range(2000)]
    counts = {s: sum(v.spare == s for v in choices) for s in GROUP.running}
    assert counts[8] == 0  # never a candidate
    for sample_id in (1, 4, 5, 9):
        assert counts[sample_id] == pytest.approx(300, abs=55)
    for choice in choices:
        assert choice.spare not in choice.prune
        assert len(choice.prune) + (choice.spare is not None) == 4


def test_rho_is_lowered_where_the_candidates_could_outnumber_its_inverse() -> None:
    rule = replace(RULE, spare_probability=0.5)
    assert rule.spare_probability_of(12) == 0.2
    assert rule.weight_of_spared(12) == 5
    assert rule.spare_probability_of(8) == 0.5


def weighted_sum(rule: HazardRule, values: dict[int, float], group: GroupProgress, seed: int) -> float:
    """Samples become candidates in two goes; the estimate of the sum over all."""
    total, weight = sum(values.values()), rule.weight_of_spared(group.num_launched)
    for threshold in (2.5, 1.8):
        choice = hazard_prunes(replace(rule, threshold=threshold), group, seed)
        total -= sum(values[s] for s in choice.prune)
        if choice.spare is not None:
            total += (weight - 1) * values[choice.spare]
        gone = {*choice.prune, choice.spare}
        running = {s: t for s, t in group.running.items() if s not in gone}
        num_gone = len(group.running) - len(running)
        group = replace(group, running=running, num_candidates=group.num_candidates + num_gone)
    return total


@pytest.mark.slow
def test_spared_samples_make_sums_over_the_group_unbiased() -> None:
    rule = replace(RULE, spare_probability=0.2)
    values = {1: 3.0, 4: -1.0, 5: 2.0, 8: 7.0, 9: 10.0}
    sums = [weighted_sum(rule, values, replace(GROUP, group_id=g), seed=2) for g in range(6000)]
    standard_error = float(np.std(sums)) / math.sqrt(len(sums))
    assert np.mean(sums) == pytest.approx(sum(values.values()), abs=4 * standard_error)
    assert standard_error < 0.3


@given(
    st.dictionaries(st.integers(0, 30), st.integers(0, 2000), max_size=9),
    st.lists(st.integers(1, 200), max_size=8).map(sorted),
    st.integers(0, 4),
    st.floats(0, 1),
    st.integers(0, 2**40),
)
def test_a_choice_names_running_samples_once_and_leaves_m_alive(
    running: dict[int, int], finished_tokens: list[int], num_before: int, rho: float, seed: int
) -> None:
    rule = replace(RULE, spare_probability=rho)
    group = replace(GROUP, running=running, finished_tokens=finished_tokens, num_candidates=num_before, num_launched=17)
    choice = hazard_prunes(rule, group, seed)
    named = [*choice.prune, *([] if choice.spare is None else [choice.spare])]
    assert len(set(named)) == len(named)
    assert set(named) <= set(running)
    assert not named or len(finished_tokens) + len(running) - len(named) >= rule.keep
    assert all(running[s] > finished_tokens[rule.shortest - 1] for s in named)
