"""Aborting the tail of a group in flight: by hazard, or because its redundancy is saturated.

How much longer will a sample run that has already run for t tokens? For lognormal lengths the expected remainder falls
with t and then rises without bound: it is least at z = .7 for sigma = .5, but at z = 4.4 for sigma = .2. So where
lengths hardly differ, a sample that began late is expected to need more than any straggler, although it need not be
long. A candidate is therefore of the tail by its own tokens: it has run for longer than K complete siblings. With the
normal hazard h and z = (ln t - mu) / sigma,

    E[l | l > t] = exp(mu + sigma^2 / 2) P(u > z - sigma) / P(u > z)  =  t h(z) / h(z - sigma);

the second form, which follows from the first by pdf(z - sigma) / pdf(z) = exp(z sigma - sigma^2 / 2), has no underflow
in the upper tail, where the question is asked.

The lost samples are not random: they are the long ones. An aborted sample is *missing*, never a failure, and its length
is only known to exceed t. So that the tail stays represented, a candidate for pruning is spared with probability rho
and then carries the weight 1 / rho (Horvitz-Thompson). At most one per group is spared: one number u, uniform in [0,
1), is drawn per group by a seeded hash, and candidate number k = 0, 1, ... of the group is spared if and only if k rho
<= u < (k + 1) rho. That has probability rho for each k as long as rho times the number of candidates is at most 1, in
whatever order and number they come. For any summand f,

    E[ sum of f over samples never candidates + sum of f / rho over the spared one ]  =  sum of f over all,

provided that candidacy does not depend on u. Hence a spared sample is from then on left out of every decision on its
group: the others are treated as if it had been pruned. So is the estimate of lengths, in which candidates, pruned or
spared, count as aborted with the tokens that they had when they became candidates.

Two guards. A group of middle or unknown difficulty is not touched while its rewards so far are all equal: its tail may
hold the only contrast. And at least M others stay alive, or the group itself would be lost.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from darts_async.shaper.estimates.lognormal import LengthEstimate, hazard, log_survival

_MIDDLE = 1


def expected_length_given_beyond(mu: float, sigma: float, tokens: float) -> float:
    """E[l | l > tokens] for ln l ~ N(mu, sigma^2), sigma > 0. In tokens."""
    if tokens <= 0:
        return math.exp(mu + sigma**2 / 2)
    z = (math.log(tokens) - mu) / sigma
    if z > 0:
        return tokens * hazard(z) / hazard(z - sigma)
    return math.exp(mu + sigma**2 / 2 + log_survival(z - sigma) - log_survival(z))


def expected_remaining(estimate: LengthEstimate, tokens: float, max_tokens: float = math.inf) -> float:
    """E[min(l, max_tokens) - tokens | l > tokens]: the tokens that a running sample is expected to need still, after
    `tokens` and with a cap on the length."""
    if tokens >= max_tokens:
        return 0.0
    beyond = _mean_residual(estimate, tokens)
    if math.isinf(max_tokens):
        return beyond
    log_ratio = _log_survival_of(estimate, max_tokens) - _log_survival_of(estimate, tokens)
    return max(0.0, beyond - math.exp(log_ratio) * _mean_residual(estimate, max_tokens))


def tail_of(running: Mapping[int, int], finished_tokens: Sequence[int], shortest: int) -> dict[int, int]:
    """Running samples that are known to be longer than K siblings (`shortest`), with their tokens so far.
    `finished_tokens`: of the finished siblings, the shortest first."""
    if len(finished_tokens) < shortest:
        return {}
    beyond = finished_tokens[shortest - 1] if shortest else 0
    return {sample_id: tokens for sample_id, tokens in running.items() if tokens > beyond}


@dataclass(frozen=True, slots=True)
class HazardRule:
    """Settings of hazard pruning."""

    keep: int
    """M: samples that must stay alive."""
    shortest: int
    """K: siblings that must have finished before anything is pruned."""
    threshold: float
    """tau: a sample that is expected to need more than this many typical responses is a candidate."""
    spare_probability: float
    """rho, in [0, 1]."""
    max_tokens: float = math.inf
    """Cap on the response length."""

    def spare_probability_of(self, num_launched: int) -> float:
        """rho for a group of this size: at most one over its candidates, so that the weights stay exact."""
        return min(self.spare_probability, 1 / max(1, num_launched - self.shortest))

    def weight_of_spared(self, num_launched: int) -> float:
        """1 / rho."""
        return 1 / self.spare_probability_of(num_launched)


@dataclass(frozen=True, slots=True)
class GroupProgress:
    """What the decision looks at. A spared sample is left out of everything but `num_candidates`."""

    group_id: int
    estimate: LengthEstimate
    """Of the prompt; best with the siblings counted in (`History.estimate_with`)."""
    difficulty: int | None
    """Tercile: 0 hard, 1 middle, 2 easy, None unknown."""
    typical_tokens: float
    """Mean length of the responses to a typical prompt."""
    num_launched: int
    finished_tokens: Sequence[int]
    """Of those that are complete and not known to be without a reward, the shortest first."""
    finished_rewards: Sequence[float]
    """Of those that are scored."""
    running: Mapping[int, int]
    """Sample id to tokens so far, of those that wait or decode."""
    num_candidates: int = 0
    """Samples pruned or spared before."""


@dataclass(frozen=True, slots=True)
class PruningChoice:
    """What to do with the tail of a group."""

    prune: tuple[int, ...] = ()
    """Samples to abort."""
    spare: int | None = None
    """A sample to leave alone and out of later decisions; it weighs `HazardRule.weight_of_spared`."""


def hazard_prunes(rule: HazardRule, group: GroupProgress, seed: int) -> PruningChoice:
    """Which running samples are aborted now, the worst first. O(R log R)."""
    num_finished = len(group.finished_tokens)
    awaits_contrast = group.difficulty in (None, _MIDDLE) and len(set(group.finished_rewards)) < 2
    if num_finished < rule.shortest or awaits_contrast:
        return PruningChoice()
    num_expendable = num_finished + len(group.running) - rule.keep
    candidates = _candidates(rule, group)[: max(0, num_expendable)]
    draw = _uniform(seed, group.group_id) if candidates else 0.0
    rho = rule.spare_probability_of(group.num_launched)
    spared = [s for k, s in enumerate(candidates, group.num_candidates) if k * rho <= draw < (k + 1) * rho]
    return PruningChoice(tuple(s for s in candidates if s not in spared), spared[0] if spared else None)


def _candidates(rule: HazardRule, group: GroupProgress) -> list[int]:
    """Running samples of the tail that are expected to need too long, the worst first."""
    tail = tail_of(group.running, group.finished_tokens, rule.shortest)
    remaining = {s: expected_remaining(group.estimate, tokens, rule.max_tokens) for s, tokens in tail.items()}
    most = rule.threshold * group.typical_tokens
    too_long = [(-expected, s) for s, expected in remaining.items() if expected > most]
    return [s for _, s in sorted(too_long)]


def _mean_residual(estimate: LengthEstimate, tokens: float) -> float:
    return expected_length_given_beyond(estimate.mu, estimate.sigma, tokens) - tokens


def _log_survival_of(estimate: LengthEstimate, tokens: float) -> float:
    return log_survival((math.log(tokens) - estimate.mu) / estimate.sigma) if tokens > 0 else 0.0


def _uniform(seed: int, group_id: int) -> float:
    """In [0, 1), the same for a group whenever it is asked about."""
    digest = hashlib.blake2b(f"hazard pruning {seed} {group_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48
