"""What the history learns from censored visits, and what it leaves alone."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from darts_async.shaper.estimates.history import History
from darts_async.shaper.estimates.redundancy import split_paper
from darts_async.wire.encoding import decoder, encode

KEEP = 8
FloatArray = NDArray[np.float64]


def lengths_of(rng: np.random.Generator, mu: float, sigma: float, num: int) -> list[int]:
    return sorted(max(1, round(math.exp(x))) for x in rng.normal(mu, sigma, num).tolist())


def observe_shortest(history: History, prompt_id: int, lengths: list[int], rewards: list[float]) -> None:
    """The shortest finished; the others were aborted when the last of these did."""
    history.observe(prompt_id, lengths[:KEEP], [lengths[KEEP - 1]] * (len(lengths) - KEEP), rewards)


def test_a_prompt_never_seen_is_the_population() -> None:
    history = History()
    for prompt_id in range(20):
        history.observe(prompt_id, [100, 120, 90, 110], [130], [1.0, 0.0, 1.0, 1.0])
    unseen, population = history.length(999), history.population
    assert (unseen.mu, unseen.num_samples) == (population.lengths.mean, 0)
    assert unseen.sigma == math.exp(population.lengths.log_sigma)
    mean = population.pass_alpha / (population.pass_alpha + population.pass_beta)
    assert history.pass_rate(999) == pytest.approx(mean)
    assert history.num_visits(999) == 0
    assert history.difficulty_tercile(999) is None


@pytest.mark.slow
def test_the_population_is_recovered_from_visits_of_which_half_is_aborted() -> None:
    rng, history = np.random.default_rng(0), History()
    for prompt_id in range(1500):
        mu, sigma, rate = rng.normal(6.667, 0.424), math.exp(rng.normal(-1.598, 0.392)), rng.beta(0.31, 0.31)
        rewards = (rng.random(KEEP) < rate).astype(float).tolist()
        observe_shortest(history, prompt_id, lengths_of(rng, mu, sigma, 16), rewards)
    history.validate()
    found = history.population
    assert found.lengths.mean == pytest.approx(6.667, abs=0.06)
    assert found.lengths.mean_sd == pytest.approx(0.424, rel=0.15)
    assert found.lengths.log_sigma == pytest.approx(-1.598, abs=0.1)
    assert found.lengths.log_sigma_sd == pytest.approx(0.392, rel=0.15)
    assert found.pass_alpha == pytest.approx(0.31, rel=0.35)
    assert found.pass_beta == pytest.approx(0.31, rel=0.35)


def test_visits_sharpen_the_estimate_and_memory_bounds_how_far() -> None:
    rng, history = np.random.default_rng(0), History(memory=0.5)
    informations = []
    for _ in range(12):
        history.observe(3, lengths_of(rng, 5.0, 0.3, 8), [], [])
        informations.append(history.length(3).num_samples)
    assert informations == sorted(informations)
    assert informations[-1] == pytest.approx(16, rel=1e-2)
    assert history.length(3).mu == pytest.approx(5.0, abs=0.2)
    for _ in range(6):  # the policy has changed
        history.observe(3, lengths_of(rng, 4.0, 0.3, 8), [], [])
    assert history.length(3).mu == pytest.approx(4.0, abs=0.2)


def feedback(
    spread_of: Callable[[int], float], observe: Callable[[int, list[int]], None]
) -> tuple[float, NDArray[np.int64]]:
    """Allocate by spread, keep the shortest, observe, again: lag-1 autocorrelation of R within prompts, and the R."""
    rng, num_prompts = np.random.default_rng(1), 40
    sigmas = np.exp(rng.normal(-1.598, 0.392, num_prompts)).tolist()
    rounds = []
    for _ in range(25):
        rounds.append(split_paper([spread_of(i) for i in range(num_prompts)], 12 * num_prompts, KEEP, 2 * KEEP))
        for i, launched in enumerate(rounds[-1].tolist()):
            observe(i, lengths_of(rng, 6.667, sigmas[i], launched))
    deviations = np.array(rounds[5:]) - np.mean(rounds[5:], axis=0)
    now, after = deviations[:-1].ravel(), deviations[1:].ravel()
    return float((now * after).sum() / math.sqrt((now**2).sum() * (after**2).sum())), np.array(rounds)


@pytest.mark.slow
def test_the_naive_spread_of_kept_samples_makes_the_budget_oscillate() -> None:
    spreads: dict[int, float] = {}

    def observe(prompt_id: int, lengths: list[int]) -> None:
        spreads[prompt_id] = float(np.std(lengths[:KEEP]) / np.mean(lengths[:KEEP]))

    correlation, _ = feedback(lambda i: spreads.get(i, 0.2), observe)
    assert correlation < -0.2


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "at_least"), [(0.0, -0.12), (0.7, 0.3)])
def test_the_censored_spread_does_not_oscillate(memory: float, at_least: float) -> None:
    """Without memory successive visits are independent: 0, less 1 / 20 because means are taken over 20 rounds."""
    history = History(memory=memory)

    def observe(prompt_id: int, lengths: list[int]) -> None:
        observe_shortest(history, prompt_id, lengths, [])

    correlation, _ = feedback(lambda i: history.length(i).relative_spread, observe)
    assert correlation > at_least


def test_fixed_length_prompts_end_with_a_spread_too_small_to_pay() -> None:
    history = History()
    for prompt_id in range(30):
        history.observe(prompt_id, [64] * 8, [], [])
    assert history.length(0).relative_spread < 0.2
    assert history.length(999).relative_spread < 0.2


def test_pass_rates_are_shrunk_towards_the_population() -> None:
    history = History()
    for prompt_id in range(40):
        history.observe(prompt_id, [10] * 8, [], [float(prompt_id % 2)] * 8)
    assert 0 < history.pass_rate(0) < 0.1
    assert 0.9 < history.pass_rate(1) < 1
    assert history.reward_variance(0) < history.reward_variance(999) < 0.25
    history.observe(999, [10], [10] * 7, [1.0])
    assert 0.5 < history.pass_rate(999) < history.pass_rate(1)


def test_samples_without_reward_are_missing_not_failures() -> None:
    history = History()
    history.observe(1, [10] * 8, [], [1.0] * 8)
    before = history.pass_rate(1)
    aborted = History()
    aborted.observe(1, [10] * 8, [30] * 8, [1.0] * 8)
    assert aborted.pass_rate(1) == before


def test_terciles_order_prompts_by_pass_rate() -> None:
    history = History()
    for _ in range(4):
        for prompt_id in range(12):
            num_right = prompt_id // 4 * 4
            history.observe(prompt_id, [10] * 8, [], [1.0] * num_right + [0.0] * (8 - num_right))
    assert [history.difficulty_tercile(i) for i in (0, 4, 8)] == [0, 1, 2]
    history.observe(50, [10], [], [])
    assert history.difficulty_tercile(50) is None


def test_samples_still_running_count_and_are_not_recorded() -> None:
    history = History()
    history.observe(1, [90, 100, 110, 120], [], [])
    before = encode(history)
    with_running = history.estimate_with(1, [100, 105], [300, 310])
    assert with_running.mu > history.length(1).mu
    assert encode(history) == before
    history.observe(1, [100, 105], [300, 310], [])
    assert history.length(1) == with_running


def test_a_sample_aborted_before_its_first_token_says_nothing() -> None:
    one, other = History(), History()
    one.observe(1, [90, 100], [0, 0], [])
    other.observe(1, [90, 100], [], [])
    assert one.length(1) == other.length(1)


def test_memory_outside_its_range_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"1\.5"):
        History(memory=1.5)


visits = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.lists(st.integers(1, 40_000), max_size=16),
        st.lists(st.integers(0, 40_000), max_size=16),
        st.lists(st.floats(-1, 2), max_size=16),
    ),
    max_size=24,
)


@pytest.mark.slow
@given(visits, st.sampled_from([0.0, 0.7, 1.0]))
def test_any_visits_leave_a_valid_history_that_survives_a_round_trip(
    drawn: list[tuple[int, list[int], list[int], list[float]]], memory: float
) -> None:
    history = History(memory=memory)
    for prompt_id, finished, censored, rewards in drawn:
        history.observe(prompt_id, finished, censored, rewards)
        history.validate()
        assert 0 < history.pass_rate(prompt_id) < 1
        assert 0 < history.reward_variance(prompt_id) <= 0.25
    copy = decoder(History).decode(encode(history))
    copy.validate()
    assert copy == history
    for each in (history, copy):
        each.observe(1, [100, 200], [300], [1.0, 0.0])
    assert copy == history
    assert history.num_visits(1) == 1 + sum(1 for visit in drawn if visit[0] == 1)
