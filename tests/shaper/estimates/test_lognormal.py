"""The censored lognormal fit against a likelihood that is maximised by brute force."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.shaper.estimates.lognormal import LengthEstimate, LogSample, Prior, fit, hazard, log_survival

FLAT = Prior(mean=6.0, mean_sd=1e6, log_sigma=math.log(0.2), log_sigma_sd=1e5)
TRUE_MU, TRUE_SIGMA = 6.7, 0.2


def kept_shortest(rng: np.random.Generator, *, kept: int = 8, launched: int = 16) -> tuple[list[float], list[float]]:
    """Log lengths of the shortest, and of where the others were aborted: at the last of these."""
    logs = np.sort(rng.normal(TRUE_MU, TRUE_SIGMA, launched)).tolist()
    return logs[:kept], [logs[kept - 1]] * (launched - kept)


def golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a unimodal function is largest."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (left, high) if function(left) < function(right) else (low, right)
    return (low + high) / 2


def brute_force(seen: list[float], beyond: list[float], prior: Prior, learnt: float) -> tuple[float, float]:
    """Mode of the penalised likelihood, by golden section in mu within golden section in ln sigma."""

    def objective(mu: float, rho: float) -> float:
        sigma = math.exp(rho)
        value = sum(-rho - 0.5 * ((x - mu) / sigma) ** 2 for x in seen)
        value += sum(log_survival((x - mu) / sigma) for x in beyond)
        value -= 0.5 * ((mu - prior.mean) / prior.mean_sd) ** 2
        return value - 0.5 * ((rho - prior.log_sigma) / prior.log_sigma_sd) ** 2 + learnt * rho

    def best_mu(rho: float) -> float:
        return golden_section(lambda mu: objective(mu, rho), 4.0, 9.0)

    rho = golden_section(lambda rho: objective(best_mu(rho), rho), math.log(0.03), math.log(2.0))
    return best_mu(rho), math.exp(rho)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prior", [FLAT, Prior(6.4, 0.3, math.log(0.25), 0.39)])
def test_fit_agrees_with_a_numerically_maximised_likelihood(seed: int, prior: Prior) -> None:
    seen, beyond = kept_shortest(np.random.default_rng(seed), kept=6, launched=12)
    beyond[-1] -= 0.4  # one was aborted earlier
    found = fit(LogSample.of(seen), beyond, prior)
    learnt = found.mean_information / (found.mean_information + (found.sigma / prior.mean_sd) ** 2)
    mu, sigma = brute_force(seen, beyond, prior, learnt)
    assert found.mu == pytest.approx(mu, abs=2e-5)
    assert found.sigma == pytest.approx(sigma, rel=2e-4)


def test_uncensored_fit_is_the_sample_mean_and_standard_deviation() -> None:
    logs = [6.0, 6.3, 6.1, 7.0]
    found = fit(LogSample.of(logs), [], FLAT)
    assert found.mu == pytest.approx(np.mean(logs), abs=1e-6)
    assert found.sigma == pytest.approx(np.std(logs, ddof=1), rel=1e-5)
    assert found.mean_information == 4
    assert found.mu_variance == pytest.approx(np.var(logs, ddof=1) / 4, rel=1e-3)
    assert found.log_sigma_variance == pytest.approx(1 / (2 * 3), rel=1e-3)  # squares are n - 1 at the estimate
    assert found.completed == LogSample.of(logs)


@pytest.mark.slow
def test_censored_fit_recovers_the_spread_of_which_the_naive_one_sees_half() -> None:
    rng = np.random.default_rng(0)
    naive, censored = [], []
    for _ in range(400):
        seen, beyond = kept_shortest(rng)
        naive.append(np.std(seen))
        censored.append(fit(LogSample.of(seen), beyond, FLAT).sigma)
    assert 0.45 < np.mean(naive) / TRUE_SIGMA < 0.6
    assert 0.9 < np.mean(censored) / TRUE_SIGMA < 1.02


def test_completed_statistics_are_a_fixed_point_of_the_fit() -> None:
    seen, beyond = kept_shortest(np.random.default_rng(1))
    found = fit(LogSample.of(seen), beyond, FLAT)
    again = fit(found.completed, [], FLAT)
    assert again.mu == pytest.approx(found.mu, abs=1e-5)
    assert again.sigma == pytest.approx(found.sigma, rel=1e-4)
    assert found.completed.count == 16


def test_few_samples_are_shrunk_and_none_leave_the_prior() -> None:
    prior = Prior(mean=6.0, mean_sd=0.4, log_sigma=math.log(0.2), log_sigma_sd=0.39)
    nothing = fit(LogSample(), [], prior)
    assert (nothing.mu, nothing.sigma) == pytest.approx((6.0, 0.2))
    wide = [5.0, 7.0]
    found = fit(LogSample.of(wide), [], prior)
    assert 0.2 < found.sigma < np.std(wide, ddof=1)
    assert fit(LogSample.of([7.0]), [], prior).mu < 7.0


logs_strategy = st.lists(st.floats(0, 10), max_size=12)
priors = st.builds(Prior, st.floats(0, 9), st.floats(0.05, 2), st.floats(-3, 0), st.floats(0.1, 1))


@given(logs_strategy, logs_strategy, priors)
def test_fit_solves_its_equations(logs: list[float], beyond: list[float], prior: Prior) -> None:
    seen = LogSample.of(logs)
    found = fit(seen, beyond, prior)
    assert math.isfinite(found.mu)
    assert 0.01 <= found.sigma <= 5
    assert 0 <= found.mean_information <= len(logs) + len(beyond) + 1e-9
    assert found.completed.count == pytest.approx(len(logs) + len(beyond))
    hazards = sum(hazard((x - found.mu) / found.sigma) for x in beyond)
    likelihood = sum(x - found.mu for x in logs) / found.sigma**2 + hazards / found.sigma
    pull = (found.mu - prior.mean) / prior.mean_sd**2
    scale = (len(logs) + len(beyond)) / found.sigma**2 + 1 / prior.mean_sd**2
    assert abs(likelihood - pull) / scale < 5e-3 * found.sigma + 1e-6 or found.sigma in (0.01, 5)


@given(logs_strategy, logs_strategy)
def test_statistics_of_two_parts_are_those_of_the_whole(first: list[float], second: list[float]) -> None:
    both, whole = LogSample.of(first).plus(LogSample.of(second)), LogSample.of(first + second)
    assert both.count == whole.count
    assert both.mean == pytest.approx(whole.mean, abs=1e-9)
    assert both.scatter == pytest.approx(whole.scatter, abs=1e-8)


def test_hazard_is_continuous_and_right_far_in_both_tails() -> None:
    assert hazard(12 - 1e-9) == pytest.approx(hazard(12), rel=1e-9)
    assert log_survival(12 - 1e-9) == pytest.approx(log_survival(12), rel=1e-9)
    assert hazard(0) == pytest.approx(math.sqrt(2 / math.pi))
    assert hazard(-50) == pytest.approx(0)
    assert log_survival(-50) == pytest.approx(0)
    assert hazard(1e6) == pytest.approx(1e6 + 1e-6, rel=1e-15)
    assert log_survival(0) == pytest.approx(math.log(0.5))


def test_estimate_has_the_moments_of_the_lognormal() -> None:
    estimate = LengthEstimate(mu=2.0, sigma=0.5, num_samples=1.0)
    draws = np.exp(np.random.default_rng(0).normal(2.0, 0.5, 200_000))
    assert estimate.mean_tokens == pytest.approx(draws.mean(), rel=0.01)
    assert estimate.relative_spread == pytest.approx(draws.std() / draws.mean(), rel=0.02)
