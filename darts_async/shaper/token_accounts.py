"""Where every token went: generated = trained + cancelled + filtered + stale + lost (+ evaluated), by construction
of exactly one end per sample; and the statistics of each step.

Statistics of the kept samples say little about the policy: selection alone shortens them. So the pool, everything that
was scored before the rule chose, is reported beside them. A sample that a draw has left in for others counts for these
too: on average the pool's means are those of all launched samples.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.rules.length_pay import LengthTerms, Lot, length_terms
from darts_async.topology.outcomes import SampleOutcome

DIFFICULTIES = ("hard", "middle", "easy")
_VISITS_CORRELATED = 1024
"""Latest second visits over which the autocorrelation of redundancy is taken."""


class RewardCounts(Struct, eq=False):
    """Rewards of the run, and those that failed."""

    num_scored: int = 0
    num_by_kind: dict[str, int] = {}
    first_by_kind: dict[str, str] = {}
    """What was said at the first failure of each kind."""
    last: str = ""
    """What was said at the last failure."""

    def failed(self, kind: str, error: str) -> bool:
        """A reward failed; returns whether it is the first one of this kind."""
        self.num_by_kind[kind] = self.num_by_kind.get(kind, 0) + 1
        self.last = f"{kind}: {error}"
        is_first = kind not in self.first_by_kind
        self.first_by_kind.setdefault(kind, error)
        return is_first

    @property
    def num_failed(self) -> int:
        """Of all kinds."""
        return sum(self.num_by_kind.values())

    def describe(self) -> str:
        """For an error."""
        num = self.num_scored + self.num_failed
        return f"{self.num_failed} of {num} rewards failed, the last one with {self.last}"


class Totals(Struct, eq=False):
    """Counts over the run; encoded as they are. A key that is not there counts as 0."""

    tokens_by_outcome: dict[str, int] = {}
    samples_by_outcome: dict[str, int] = {}
    tokens_by_staleness: dict[int, int] = {}
    num_tokens_received: int = 0
    tokens_by_generator: dict[str, dict[int, int]] = {}
    """{generator: {incarnation: tokens received of it}}; those of earlier lives of the run are incarnation 0."""
    rewards: RewardCounts = field(default_factory=RewardCounts)

    def __post_init__(self) -> None:
        self.tokens_by_outcome, self.samples_by_outcome = (
            Counter(self.tokens_by_outcome),
            Counter(self.samples_by_outcome),
        )
        self.tokens_by_staleness = Counter(self.tokens_by_staleness)
        by_generator = ((name, Counter(counts)) for name, counts in self.tokens_by_generator.items())
        self.tokens_by_generator = defaultdict(Counter, by_generator)

    def ended(self, outcome: SampleOutcome, num_tokens: int) -> None:
        """A sample ended."""
        self.tokens_by_outcome[outcome] += num_tokens
        self.samples_by_outcome[outcome] += 1

    def trained(self, sample: Sample, step: int) -> None:
        """A sample entered the gradient of `step`: count its tokens by staleness."""
        for version, token_ids, _ in sample.chunks:
            self.tokens_by_staleness[step - version] += len(token_ids)

    def end_of_life(self) -> None:
        """All processes are new: their incarnations may have the numbers of others that are forgotten."""
        for counts in self.tokens_by_generator.values():
            num_tokens = sum(counts.values())
            counts.clear()
            counts[0] = num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """A group when it was complete, before anything was filtered."""

    rewards: NDArray[np.float64]  # [num_scored]
    num_tokens: NDArray[np.float64]  # [num_scored]
    counts: NDArray[np.float64]  # [num_scored], launched samples that each stands for
    num_launched: int
    num_failed: int
    """Samples whose reward failed."""
    length: LengthTerms
    parts: tuple[tuple[float, ...], ...] = ()
    """What each of several reward functions gave, for each of `rewards`."""

    @property
    def mean_reward(self) -> float:
        """Of all that were launched."""
        return float(np.average(self.rewards, weights=self.counts))


class StepStatistics(Struct, eq=False):
    """Collects complete groups; `close` gives the metrics of one step, and of the run so far where it says `run/`.
    Encoded as it is."""

    pools: dict[int, _Pool] = {}
    launched_before: dict[int, int] = {}
    launches: list[tuple[int, int]] = []
    num_complete: dict[str, int] = {}
    num_dropped: dict[str, int] = {}
    num_samples: dict[str, int] = {}
    num_censored: dict[str, int] = {}
    length: LengthTerms = field(default_factory=LengthTerms)
    """Of all steps so far."""

    def __post_init__(self) -> None:
        self.num_complete, self.num_dropped = Counter(self.num_complete), Counter(self.num_dropped)
        self.num_samples, self.num_censored = Counter(self.num_samples), Counter(self.num_censored)

    def completed(
        self, group: Group, tercile: int | None, counts: Mapping[int, float] | None = MappingProxyType({})
    ) -> None:
        """Remember the pool of a group, before the rule's choice is carried out.

        `counts`: by the id of a scored sample the launched samples that it stands for, 1 where it is not given; None if
        nothing scored stands for the others.
        """
        scored = [s for s in group.at(Stage.SCORED) if s.reward is not None]
        rewards = np.array([s.reward for s in scored], np.float64)
        lengths = np.array([s.num_tokens for s in scored], np.float64)
        standing_for = np.array([(counts or {}).get(s.sample_id, 1.0) for s in scored], np.float64)
        terms = LengthTerms() if counts is None else _length_terms(group, counts)
        self.pools[group.group_id] = _Pool(
            rewards,
            lengths,
            standing_for,
            len(group.samples),
            group.num_unscorable,
            terms,
            tuple(s.reward_parts for s in scored),
        )
        self._visit(group.prompt.prompt_id, len(group.samples))
        name = _difficulty(tercile)
        self.num_complete[name] += 1
        self.num_samples[name] += len(group.samples)
        self.num_censored[name] += sum(s.finish_reason is None for s in group.samples)

    def dropped(self, group_id: int, tercile: int | None) -> None:
        """A group came to nothing, complete or not."""
        self.num_dropped[_difficulty(tercile)] += 1
        if self.pools.pop(group_id, None) is not None:
            self.num_complete[_difficulty(tercile)] -= 1

    def reopened(self) -> None:
        """No group is open: what was complete and not trained on has ended with a stop, and is asked again."""
        self.pools.clear()

    def close(self, step: int, groups: Sequence[Group], labels: Sequence[str] = ()) -> dict[str, float]:
        """Metrics of one step over its groups. `labels`: the names of several reward functions."""
        kept = [group.kept or [] for group in groups]
        rewards = [np.array([sample.reward for sample, _ in pairs], np.float64) for pairs in kept]
        lengths = [np.array([sample.num_tokens for sample, _ in pairs], np.float64) for pairs in kept]
        weights = [np.array([weight for _, weight in pairs]) for pairs in kept]
        pools = [self.pools.pop(group.group_id) for group in groups]
        return {
            **_kept_metrics(rewards, lengths),
            **_pool_metrics(pools),
            **part_metrics(
                labels, [part for p in pools for part in p.parts], np.concatenate([p.counts for p in pools])
            ),
            **_staleness(step, [sample for pairs in kept for sample, _ in pairs]),
            "groups/baseline_shift": _mean([r.mean() - p.mean_reward for r, p in zip(rewards, pools, strict=True)]),
            "groups/kept_mean": _mean([len(pairs) for pairs in kept]),
            "weights/effective_share": _mean([w.sum() ** 2 / (len(w) * (w**2).sum()) for w in weights]),
            **self._redundancy(pools),
            **self._survival(),
            **self._pay(pools),
        }

    def _visit(self, prompt_id: int, num_launched: int) -> None:
        before = self.launched_before.get(prompt_id)
        if before is not None:
            self.launches.append((before, num_launched))
            del self.launches[:-_VISITS_CORRELATED]
        self.launched_before[prompt_id] = num_launched

    def _redundancy(self, pools: Sequence[_Pool]) -> dict[str, float]:
        """Samples launched per prompt, and how those of a visit go with those of the visit before."""
        launched = [pool.num_launched for pool in pools]
        metrics = {f"redundancy/launched_{n}": float(count) for n, count in sorted(Counter(launched).items())}
        metrics["redundancy/mean"] = _mean(launched)
        before, now = np.array(self.launches, np.float64).reshape(-1, 2).T
        if len(now) > 2 and before.std() > 0 and now.std() > 0:
            metrics["run/redundancy_autocorrelation"] = float(np.corrcoef(before, now)[0, 1])
        return metrics

    def _pay(self, pools: Sequence[_Pool]) -> dict[str, float]:
        """What length is worth, and what the selection pays for it on top: see `length_pay`."""
        step = LengthTerms().plus(pool.length for pool in pools)
        self.length = self.length.plus([step])
        values = {
            "selection/length_slope": step.slope,
            "selection/pays_for_length": step.pay,
            "run/pays_for_length": self.length.pay,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _survival(self) -> dict[str, float]:
        """Shares by difficulty: groups that were completed, samples that were cut short."""
        metrics = {}
        for name in (*DIFFICULTIES, "unknown"):
            num_complete, num_dropped = self.num_complete[name], self.num_dropped[name]
            if num_complete + num_dropped:
                metrics[f"run/survival_{name}"] = num_complete / (num_complete + num_dropped)
            if self.num_samples[name]:
                metrics[f"run/censored_{name}"] = self.num_censored[name] / self.num_samples[name]
        return metrics


def _length_terms(group: Group, counts: Mapping[int, float]) -> LengthTerms:
    scored = [(sample, counts.get(sample.sample_id, 1.0)) for sample in group.at(Stage.SCORED)]
    return length_terms(_lot(scored), _lot(group.kept or []))


def _lot(pairs: Sequence[tuple[Sample, float]]) -> Lot:
    rewards = [s.reward for s, _ in pairs if s.reward is not None]
    return Lot(rewards, [s.num_tokens for s, _ in pairs], [weight for _, weight in pairs])


def _kept_metrics(rewards: Sequence[NDArray[np.float64]], lengths: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """Of the kept samples, both [num_kept] for each group."""
    all_lengths = np.concatenate(lengths)
    # Advantages in a group sum to zero, so to first order length falls if and only if this is negative.
    gains = np.concatenate([r - r.mean() for r in rewards]) * all_lengths
    median, p99 = np.percentile(all_lengths, (50, 99))
    return {
        "reward/mean": float(np.concatenate(rewards).mean()),
        "length/mean": float(all_lengths.mean()),
        "length/p50": float(median),
        "length/p99": float(p99),
        "reward/length_covariance": float(gains.mean()),
        "groups/zero_advantage_share": _mean([bool((r == r[0]).all()) for r in rewards]),
    }


def _pool_metrics(pools: Sequence[_Pool]) -> dict[str, float]:
    rewards = np.concatenate([pool.rewards for pool in pools])
    lengths = np.concatenate([pool.num_tokens for pool in pools])
    counts = np.concatenate([pool.counts for pool in pools])
    median, p99 = np.percentile(lengths, (50, 99), weights=counts, method="inverted_cdf")
    num_failed = sum(pool.num_failed for pool in pools)
    return {
        "reward/pool_mean": float(np.average(rewards, weights=counts)),
        "reward/failed_share": num_failed / (num_failed + len(rewards)),
        "length/pool_mean": float(np.average(lengths, weights=counts)),
        "length/pool_p50": float(median),
        "length/pool_p99": float(p99),
        "groups/pool_zero_advantage_share": _mean([bool((p.rewards == p.rewards[0]).all()) for p in pools]),
    }


def part_metrics(
    labels: Sequence[str], parts: Sequence[tuple[float, ...]], counts: NDArray[np.float64] | None = None
) -> dict[str, float]:
    """Mean and standard deviation of what each reward function gave, before it was weighted.

    Args:
        labels: names of the functions; empty for a single function.
        parts: of each sample a number for each function, [num_samples][num_functions].
        counts: how much each sample counts, [num_samples]; 1 where it is not given.

    Example:
        >>> part_metrics(["right", "brief"], [(1.0, 0.25), (0.0, 0.75)])["rewards/brief/mean"]
        0.5
    """
    metrics = {}
    for label, values in zip(labels, np.array(parts, np.float64).T if labels else (), strict=True):
        mean = np.average(values, weights=counts)
        metrics[f"rewards/{label}/mean"] = float(mean)
        metrics[f"rewards/{label}/std"] = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    return metrics


def _staleness(step: int, samples: Sequence[Sample]) -> dict[str, float]:
    staleness = [step - s.oldest_version for s in samples if s.oldest_version is not None]
    return {"staleness/mean": _mean(staleness), "staleness/max": float(max(staleness))}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _difficulty(tercile: int | None) -> str:
    return "unknown" if tercile is None else DIFFICULTIES[tercile]
