"""Estimates response length and pass rate of each prompt, from finished and aborted samples.

Lengths are lognormal within a prompt and their parameters vary between prompts: ln l = mu_i + sigma_i u,
mu_i ~ N(m0, t0^2), ln sigma_i ~ N(r0, tau^2). Two things keep the estimates honest:

* Aborted samples are right-censored, not ignored (see `lognormal`). Otherwise a prompt whose shortest half was kept
looks
  half as variable on its next visit, gets little redundancy, then looks variable again: the budget oscillates.
* Few samples are shrunk to the population (empirical Bayes): a spread from n samples by n / (n + 1 / (2 tau^2)), which
  is .71 at n = 8 and tau = .39. A prompt never seen is the population.

Before each visit the weight of earlier ones is multiplied by `memory`, because the policy has changed since. Censored
samples enter that memory as their expected sufficient statistics under the estimate of their visit.

Pass rates are Beta(a, b) over prompts; a prompt's is the posterior mean given its scored samples. Samples without a
reward are missing, never failures. Rewards are clipped to [0, 1] and may be fractions. A sample that a draw has spared
(survivors, hazard pruning) counts for the cut ones too: over visits the ratio of both sums is that of all launched
samples, long ones included. Where long samples are cut without a draw (`early_stop`, saturation), the pass rate is that
of the short ones: no scored sample represents the others.

The population (m0, t0, r0, tau, a, b) starts from a weak prior and follows the visits with exponential forgetting: each
visit contributes its posterior mean to a running mean, and its posterior variance besides the squared deviation to a
running variance (an online expectation-maximisation step; the variance of shrunk means alone would shrink to nothing).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import astuple

from darts_async.shaper.estimates.lognormal import Fit, LengthEstimate, LogSample, Prior, fit

Tercile = Literal[0, 1, 2]

_RECENT_VISITS = 512
"""Pass rates from which the terciles are taken."""
_TERCILES_EVERY = 16
"""Visits after which they are computed again."""
_VISITS_REMEMBERED = 500.0
"""Weight that the population's running means reach."""


class _Running(Struct):
    """Exponentially weighted mean and variance; starts as `weight` visits of the given mean and variance."""

    weight: float
    mean: float
    variance: float

    def add(self, value: float, uncertainty: float) -> None:
        """One visit: its posterior mean and posterior variance."""
        self.weight = min(self.weight + 1, _VISITS_REMEMBERED)
        share, gap = 1 / self.weight, value - self.mean
        self.mean += share * gap
        self.variance += share * ((1 - share) * gap * gap + uncertainty - self.variance)


@dataclass(frozen=True, slots=True)
class Population:
    """Distribution of prompts."""

    lengths: Prior
    """Of mu_i and sigma_i."""
    pass_alpha: float
    pass_beta: float
    """Beta distribution of the pass rate."""


class _PromptRecord(Struct, array_like=True):
    """Everything remembered about a prompt."""

    num_visits: int
    seen: LogSample
    length: LengthEstimate
    successes: float = 0.0
    trials: float = 0.0


class _PopulationRunning(Struct):
    """The running statistics; their initial values are the weak prior."""

    mu: _Running = field(default_factory=lambda: _Running(0.1, math.log(256.0), 1.0))
    """A tenth of a visit: any length is as likely as any other."""
    log_sigma: _Running = field(default_factory=lambda: _Running(4.0, math.log(0.3), 0.4**2))
    pass_rate: _Running = field(default_factory=lambda: _Running(4.0, 0.5, 1 / 12))


class History(Struct, dict=True):
    """Length and reward statistics by prompt id; encoded as it is. `observe` takes tens of microseconds, and look-ups
    are O(1)."""

    memory: float = 0.7
    """Weight of what earlier visits said, once per visit, in [0, 1]."""
    prompts: dict[int, _PromptRecord] = {}
    running: _PopulationRunning = field(default_factory=_PopulationRunning)
    recent: list[float] = []
    """Pass rates of the latest visits."""
    num_rated: int = 0
    terciles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.memory <= 1, self.memory
        self.population = self._population_now()

    @property
    def typical_length(self) -> LengthEstimate:
        """Length distribution of a typical prompt, and of one never seen."""
        prior = self.population.lengths
        return LengthEstimate(prior.mean, math.exp(prior.log_sigma), 0.0)

    def num_visits(self, prompt_id: int) -> int:
        """Groups of this prompt that were observed."""
        record = self.prompts.get(prompt_id)
        return record.num_visits if record else 0

    def length(self, prompt_id: int) -> LengthEstimate:
        """Length distribution of the prompt, as of its last visit; the population's for a prompt never seen."""
        record = self.prompts.get(prompt_id)
        return self.typical_length if record is None else record.length

    def pass_rate(self, prompt_id: int) -> float:
        """Posterior mean of the probability that a finished response is right, in (0, 1)."""
        alpha, beta = self._pass_posterior(prompt_id)
        return alpha / (alpha + beta)

    def mean_reward(self, prompt_id: int) -> float | None:
        """Mean of the prompt's own rewards, clipped to [0, 1], earlier visits with less weight; None without any."""
        record = self.prompts.get(prompt_id)
        return record.successes / record.trials if record is not None and record.trials else None

    def reward_variance(self, prompt_id: int) -> float:
        """Posterior mean of p (1 - p): what a group of this prompt is expected to teach, in (0, 1/4)."""
        alpha, beta = self._pass_posterior(prompt_id)
        return alpha * beta / ((alpha + beta) * (alpha + beta + 1))

    def difficulty_tercile(self, prompt_id: int) -> Tercile | None:
        """0 for the third of prompts that fail most, 2 for the third that pass most; None while that is not known."""
        record = self.prompts.get(prompt_id)
        if record is None or not record.trials or self.terciles is None:
            return None
        rate, (low, high) = self.pass_rate(prompt_id), self.terciles
        return 0 if rate < low else 2 if rate > high else 1

    def estimate_with(
        self, prompt_id: int, finished_lengths: Sequence[int], censored_lengths: Sequence[int]
    ) -> LengthEstimate:
        """`length` after a visit that has not ended, and is not recorded. `censored_lengths`: tokens so far of the
        samples that run, were aborted or cut at the length cap."""
        return _estimate(self._fit(prompt_id, finished_lengths, censored_lengths))

    def observe(
        self,
        prompt_id: int,
        finished_lengths: Sequence[int],
        censored_lengths: Sequence[int],
        rewards: Sequence[float],
        counts: Sequence[float] | None = None,
    ) -> None:
        """A visit is over.

        Args:
            finished_lengths: tokens of the samples that ended by themselves, trained or not. Positive.
            censored_lengths: tokens of those aborted or cut at the length cap. A sample aborted before its first
                token says nothing and is ignored.
            rewards: of all samples that were scored.
            counts: how many launched samples each of these represents, inverse inclusion probabilities; 1 each if not
                given.
        """
        counts = [1.0] * len(rewards) if counts is None else counts
        visit = self._fit(prompt_id, finished_lengths, censored_lengths)
        record = self.prompts.get(prompt_id)
        if record is None:
            record = self.prompts[prompt_id] = _PromptRecord(0, visit.completed, _estimate(visit))
        record.num_visits += 1
        record.seen, record.length = visit.completed, _estimate(visit)
        successes = sum(count * min(max(r, 0.0), 1.0) for r, count in zip(rewards, counts, strict=True))
        record.successes = self.memory * record.successes + successes
        record.trials = self.memory * record.trials + sum(counts)
        if finished_lengths:  # otherwise the visit tells only that the population was believed
            self.running.mu.add(visit.mu, visit.mu_variance)
            self.running.log_sigma.add(math.log(visit.sigma), visit.log_sigma_variance)
        if rewards:
            self._follow_pass_rate(prompt_id)
        self.population = self._population_now()

    def validate(self) -> None:
        """Invariants: everything is finite and in its range. O(number of prompts)."""
        for prompt_id, record in self.prompts.items():
            assert record.num_visits > 0, prompt_id
            numbers = *astuple(record.seen), *astuple(record.length), record.successes, record.trials
            assert all(map(math.isfinite, numbers)), (prompt_id, record)
            assert record.length.sigma > 0, (prompt_id, record)
            assert record.seen.scatter >= 0, (prompt_id, record)
            assert 0 <= record.successes <= record.trials, (prompt_id, record)
        for running in (self.running.mu, self.running.log_sigma, self.running.pass_rate):
            assert running.weight > 0, self.running
            assert running.variance >= 0, self.running
        assert self.terciles is None or self.terciles[0] <= self.terciles[1], self.terciles
        assert self.population == self._population_now()

    def _fit(self, prompt_id: int, finished: Sequence[int], censored: Sequence[int]) -> Fit:
        record = self.prompts.get(prompt_id)
        seen = LogSample.of([math.log(tokens) for tokens in finished])
        if record is not None:
            seen = record.seen.weighted(self.memory).plus(seen)
        beyond = [math.log(tokens) for tokens in censored if tokens > 0]
        return fit(seen, beyond, self.population.lengths)

    def _pass_posterior(self, prompt_id: int) -> tuple[float, float]:
        alpha, beta = self.population.pass_alpha, self.population.pass_beta
        record = self.prompts.get(prompt_id)
        if record is None:
            return alpha, beta
        return alpha + record.successes, beta + record.trials - record.successes

    def _follow_pass_rate(self, prompt_id: int) -> None:
        alpha, beta = self._pass_posterior(prompt_id)
        rate = alpha / (alpha + beta)
        self.running.pass_rate.add(rate, rate * (1 - rate) / (alpha + beta + 1))
        self.recent.append(rate)
        del self.recent[:-_RECENT_VISITS]
        self.num_rated += 1
        if self.num_rated % _TERCILES_EVERY == 0:
            rates = sorted(self.recent)
            third = len(rates) // 3
            self.terciles = (rates[third - 1] + rates[third]) / 2, (rates[-third - 1] + rates[-third]) / 2

    def _population_now(self) -> Population:
        running = self.running
        rate = min(max(running.pass_rate.mean, 0.01), 0.99)
        strength = rate * (1 - rate) / max(running.pass_rate.variance, 1e-6) - 1
        strength = min(max(strength, 0.1), 100.0)
        lengths = Prior(
            mean=running.mu.mean,
            mean_sd=max(math.sqrt(running.mu.variance), 0.01),
            log_sigma=running.log_sigma.mean,
            log_sigma_sd=min(max(math.sqrt(running.log_sigma.variance), 0.1), 1.0),
        )
        return Population(lengths, pass_alpha=strength * rate, pass_beta=strength * (1 - rate))


def _estimate(visit: Fit) -> LengthEstimate:
    return LengthEstimate(visit.mu, visit.sigma, visit.mean_information)
