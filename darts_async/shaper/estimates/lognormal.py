"""Lognormal response lengths: observed lengths, censored lengths, and the expected remaining length.

ln l = mu + sigma * u with u standard normal. A sample that was aborted after t tokens, or cut at the length cap, says
l > t and no more: it is right-censored, and leaving it out makes the spread look about half as wide where half of the
samples were cut. With z = (ln t - mu) / sigma and the normal hazard h(z) = pdf(z) / P(u > z),

    E[u | u > z] = h        E[u^2 | u > z] = 1 + z h        d ln P(u > z) / dz = -h        dh/dz = h (h - z)

are all that is needed. Aborting by any rule that looks only at what has been decoded so far (the m-th sibling has
finished, the expected remainder is too long) leaves this likelihood valid.

The estimate of `fit` solves, with n samples seen, rho = ln sigma and a `Prior`,

    sum (x - mu) / sigma^2 + sum h / sigma                  = (mu - m0) / t0^2                              (mean)
    sum (x - mu)^2 / sigma^2 - n + sum z h + b              = (rho - r0) / tau^2                            (spread)

which is the mode under mu ~ N(m0, t0^2) and rho ~ N(r0, tau^2), except for b, the share of mu that is learnt from this
prompt and not from the prior: the degree of freedom that it costs (restricted likelihood; uncensored with flat priors,
sigma^2 is the familiar sum of squares over n - 1). A log-spread from n samples has sampling variance 1 / (2 n), so the
prior is worth 1 / (2 tau^2) samples; tau = .39 leaves a spread from 8 samples a weight of .71.

Units: lengths are in tokens, mu and sigma are of the natural logarithm of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from msgspec import Struct

_SQRT2 = math.sqrt(2.0)
_SQRT_2_BY_PI = math.sqrt(2.0 / math.pi)
_TAIL_Z = 12.0
"""From here on the continued fraction is used: erfc underflows at 37."""
_MIN_SIGMA = 0.01
"""Below this, whole tokens are coarser than the spread."""
_MAX_SIGMA = 5.0
_MAX_STEPS = 48
_UNDAMPED_STEPS = 12
"""With one or two samples the steps can alternate about the mode."""
_MAX_MOVE = 4.0
_MAX_CORRELATION = 0.95
_TOLERANCE = 1e-3
"""Of the last step, in units of sigma; convergence is quadratic, so what is left is of the order of its square."""


class LengthEstimate(Struct, frozen=True, array_like=True):
    """Length distribution of a prompt's responses."""

    mu: float
    """Mean of the log length."""
    sigma: float
    """Standard deviation of the log length, within the prompt."""
    num_samples: float
    """How many complete samples would tell as much about mu. 0 for a prompt never seen."""

    @property
    def mean_tokens(self) -> float:
        """Expected length."""
        return math.exp(self.mu + self.sigma**2 / 2)

    @property
    def relative_spread(self) -> float:
        """Standard deviation of the length over its mean."""
        return math.sqrt(math.expm1(self.sigma**2))


class LogSample(Struct, frozen=True, array_like=True):
    """Sufficient statistics of log lengths that were seen, possibly down-weighted."""

    count: float = 0.0
    mean: float = 0.0
    scatter: float = 0.0
    """Sum of squared deviations from the mean."""

    @classmethod
    def of(cls, logs: Sequence[float]) -> Self:
        """Of complete samples."""
        if not logs:
            return cls()
        mean = sum(logs) / len(logs)
        return cls(float(len(logs)), mean, sum((x - mean) ** 2 for x in logs))

    def plus(self, other: "LogSample") -> "LogSample":
        """Both together."""
        count = self.count + other.count
        if not count:
            return self
        share = other.count / count
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + self.count * share * gap * gap
        return LogSample(count, self.mean + share * gap, scatter)

    def weighted(self, weight: float) -> "LogSample":
        """Each sample counted `weight` times."""
        return LogSample(weight * self.count, self.mean, weight * self.scatter)


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed about a prompt before its samples are seen."""

    mean: float
    """m0: mean of mu over prompts."""
    mean_sd: float
    """t0: standard deviation of mu between prompts."""
    log_sigma: float
    """r0: mean of ln sigma over prompts."""
    log_sigma_sd: float
    """tau: standard deviation of ln sigma between prompts."""


@dataclass(frozen=True, slots=True)
class Fit:
    """An estimate and how much the samples said about it."""

    mu: float
    sigma: float
    mean_information: float
    """Complete samples that would tell as much about mu."""
    mu_variance: float
    log_sigma_variance: float
    """Posterior variances, each with the other parameter unknown: the censored tail makes them depend on each other."""
    completed: LogSample
    """What was seen, and the censored samples as they are expected to have ended."""


def hazard(z: float) -> float:
    """pdf(z) / P(u > z) of the standard normal (inverse Mills ratio); relative error below 1e-12 for any z."""
    if z < _TAIL_Z:
        return _SQRT_2_BY_PI * math.exp(-0.5 * z * z) / math.erfc(z / _SQRT2)
    tail = z
    for k in range(24, 0, -1):  # Laplace's continued fraction
        tail = z + k / tail
    return tail


def log_survival(z: float) -> float:
    """ln P(u > z) of the standard normal."""
    if z < _TAIL_Z:
        return math.log(0.5 * math.erfc(z / _SQRT2))
    return -0.5 * z * z + math.log(0.5 * _SQRT_2_BY_PI / hazard(z))


def fit(seen: LogSample, beyond: Sequence[float], prior: Prior) -> Fit:
    """The censored estimate of the module docstring, by Newton steps: usually 3 to 5.

    Args:
        seen: log lengths of complete samples.
        beyond: for each censored sample the log of the length that it exceeded.
        prior: belief about the prompt.
    """
    mu, sigma = _start(seen, beyond, prior)
    for step in range(_MAX_STEPS):
        move, stretch = _newton_step(seen, _Tail.of(beyond, mu, sigma), prior, mu, sigma)
        damping = 1.0 if step < _UNDAMPED_STEPS else 0.5
        old_sigma, mu = sigma, mu + sigma * move * damping
        sigma = min(max(sigma * math.exp(stretch * damping), _MIN_SIGMA), _MAX_SIGMA)
        if abs(move) <= _TOLERANCE and (abs(stretch) <= _TOLERANCE or sigma == old_sigma):
            break
    tail = _Tail.of(beyond, mu, sigma)
    info_mean, cross, info_spread = _curvature(seen, tail, prior, mu, sigma)
    determinant = info_mean * info_spread - cross * cross
    return Fit(
        mu,
        sigma,
        mean_information=seen.count + tail.info_mean,
        mu_variance=sigma * sigma * info_spread / determinant,
        log_sigma_variance=info_mean / determinant,
        completed=_completed(seen, tail, mu, sigma),
    )


@dataclass(frozen=True, slots=True)
class _Tail:
    """Sums over the censored samples at one (mu, sigma): derivatives of their log-likelihood, in units of sigma."""

    count: float
    hazards: float
    """Gradient by mu: sum of h."""
    z_hazards: float
    """Gradient by rho: sum of z h."""
    info_mean: float
    info_cross: float
    info_spread: float
    """The negated second derivatives."""

    @classmethod
    def of(cls, beyond: Sequence[float], mu: float, sigma: float) -> "_Tail":
        hazards = z_hazards = info_mean = info_cross = info_spread = 0.0
        for log_length in beyond:
            z = (log_length - mu) / sigma
            h = hazard(z)
            slope = h * (h - z)
            hazards += h
            z_hazards += z * h
            info_mean += slope
            info_cross += h + z * slope
            info_spread += z * (h + z * slope)
        return cls(float(len(beyond)), hazards, z_hazards, info_mean, info_cross, info_spread)


def _completed(seen: LogSample, tail: _Tail, mu: float, sigma: float) -> LogSample:
    """`seen` with each censored sample replaced by its expected sufficient statistics."""
    if not tail.count:
        return seen
    shift = tail.hazards / tail.count  # mean of E[u | u > z]
    scatter = sigma * sigma * (tail.count + tail.z_hazards - tail.count * shift * shift)
    return seen.plus(LogSample(tail.count, mu + sigma * shift, max(0.0, scatter)))


def _start(seen: LogSample, beyond: Sequence[float], prior: Prior) -> tuple[float, float]:
    """Each censored sample is taken to end a typical spread after its length, or after the mean if that is longer."""
    centre = seen.mean if seen.count else prior.mean
    sigma = math.exp(prior.log_sigma)
    both = seen.plus(LogSample.of([max(x, centre) + sigma for x in beyond]))
    if not both.count:
        return prior.mean, sigma
    return both.mean, math.sqrt((both.scatter + sigma * sigma) / (both.count + 1))


def _curvature(seen: LogSample, tail: _Tail, prior: Prior, mu: float, sigma: float) -> tuple[float, float, float]:
    """Negated second derivatives by (mu / sigma, rho): mean, cross and spread, made positive definite."""
    gap = (seen.mean - mu) / sigma
    squares = seen.scatter / sigma**2 + seen.count * gap * gap
    info_mean = seen.count + tail.info_mean + (sigma / prior.mean_sd) ** 2
    info_spread = max(0.0, 2 * squares + tail.info_spread) + 1 / prior.log_sigma_sd**2
    cross = 2 * seen.count * gap + tail.info_cross
    most = _MAX_CORRELATION * math.sqrt(info_mean * info_spread)  # more is far from the mode, where it is not concave
    return info_mean, min(max(cross, -most), most), info_spread


def _newton_step(seen: LogSample, tail: _Tail, prior: Prior, mu: float, sigma: float) -> tuple[float, float]:
    """The change of mu in units of sigma, and of ln sigma: uphill, and not too far."""
    gap, pull = (seen.mean - mu) / sigma, (sigma / prior.mean_sd) ** 2
    learnt = seen.count + tail.info_mean
    slope_mean = seen.count * gap + tail.hazards + pull * (prior.mean - mu) / sigma
    slope_spread = seen.scatter / sigma**2 + seen.count * (gap * gap - 1) + tail.z_hazards + learnt / (learnt + pull)
    slope_spread += (prior.log_sigma - math.log(sigma)) / prior.log_sigma_sd**2
    info_mean, cross, info_spread = _curvature(seen, tail, prior, mu, sigma)
    determinant = info_mean * info_spread - cross * cross
    move = (info_spread * slope_mean - cross * slope_spread) / determinant
    stretch = (info_mean * slope_spread - cross * slope_mean) / determinant
    shorten = max(1.0, abs(move) / _MAX_MOVE, abs(stretch))
    return move / shorten, stretch / shorten
