"""Where every token went, and the statistics of each step.

generated = trained + cancelled + filtered + stale + abandoned (+ evaluated), because each sample ends exactly once.

Statistics of the kept samples say little about the policy: selection alone shortens them. So those of the pool, all
scored samples before the selection, are reported beside them. A sample that a draw has spared counts for the cut ones
too: on average the pool's means are those of all launched samples.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from darts_async.shaper.group import Group, Sample
from darts_async.shaper.rules.length_pay import LengthTerms, Lot, length_terms
from darts_async.topology.outcomes import SampleOutcome

DIFFICULTIES = ("hard", "middle", "easy")
_VISITS_CORRELATED = 1024
"""Latest second visits over which the autocorrelation of redundancy is taken."""


class RewardCounts(Struct, eq=False):
    """Rewards of the run, and those that failed."""

    num_scored: int = 0
    num_by_kind: Counter[str] = field(default_factory=Counter)
    first_by_kind: dict[str, str] = {}
    """What was said at the first failure of each kind."""
    last: str = ""
    """What was said at the last failure."""

    def failed(self, kind: str, error: str) -> bool:
        """A reward failed; returns whether it is the first one of this kind."""
        self.num_by_kind[kind] += 1
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
    """Counts over the run; encoded as they are."""

    tokens_by_outcome: Counter[str] = field(default_factory=Counter)
    samples_by_outcome: Counter[str] = field(default_factory=Counter)
    tokens_by_staleness: Counter[int] = field(default_factory=Counter)
    num_tokens_received: int = 0
    tokens_by_generator: dict[str, Counter[int]] = {}
    """{generator: {incarnation: tokens received of it}}; those of earlier lives of the run are incarnation 0."""
    rewards: RewardCounts = field(default_factory=RewardCounts)

    def received(self, generator: str, incarnation: int, num_tokens: int) -> None:
        """A generator has sent tokens."""
        self.num_tokens_received += num_tokens
        self.tokens_by_generator.setdefault(generator, Counter())[incarnation] += num_tokens

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
class _Lots:
    """The samples of a group that was trained on."""

    kept: Lot
    """With the weights that they are trained with."""
    scored: Lot
    """The pool, before the selection; with the launched samples that each represents."""
    length: LengthTerms
    parts: tuple[tuple[float, ...], ...]
    """What each of several reward functions gave, for each sample of the pool."""

    @classmethod
    def of(cls, group: Group, counts: Mapping[int, float] | None) -> "_Lots":
        """`counts`: by the id of a scored sample the launched samples that it represents, 1 where it is not given; None
        if no scored one represents the others."""
        samples = [s for s in group.samples if s.reward is not None]
        scored, kept = _lot([(s, (counts or {}).get(s.sample_id, 1.0)) for s in samples]), _lot(group.kept)
        length = LengthTerms() if counts is None else length_terms(scored, kept)
        return cls(kept, scored, length, tuple(s.reward_parts for s in samples))


class StepStatistics(Struct, eq=False):
    """Collects complete groups; `close` gives the metrics of one step, and of the run so far where it says `run/`.
    Encoded as it is."""

    launched_before: dict[int, int] = {}
    launches: list[tuple[int, int]] = []
    num_complete: Counter[str] = field(default_factory=Counter)
    num_dropped: Counter[str] = field(default_factory=Counter)
    num_samples: Counter[str] = field(default_factory=Counter)
    num_censored: Counter[str] = field(default_factory=Counter)
    length: LengthTerms = LengthTerms()
    """Of all steps so far."""

    def completed(self, group: Group, tercile: int | None) -> None:
        """A group is complete."""
        self._visit(group.prompt.prompt_id, len(group.samples))
        name = _difficulty(tercile)
        self.num_complete[name] += 1
        self.num_samples[name] += len(group.samples)
        self.num_censored[name] += sum(s.finish_reason is None for s in group.samples)

    def dropped(self, group: Group, tercile: int | None) -> None:
        """A group was given up, complete or not."""
        self.num_dropped[_difficulty(tercile)] += 1
        self.num_complete[_difficulty(tercile)] -= group.weights is not None

    def close(
        self,
        step: int,
        groups: Sequence[Group],
        counts: Sequence[Mapping[int, float] | None],
        labels: Sequence[str] = (),
    ) -> dict[str, float]:
        """Metrics of one step over its groups. `counts` of each: see `_Lots.of`. `labels`: the names of several reward
        functions."""
        lots = [_Lots.of(*each) for each in zip(groups, counts, strict=True)]
        weights = [np.array(each.kept.weights) for each in lots]
        shifts = [_mean(each.kept.rewards) - _mean_of_pool(each.scored) for each in lots]
        return {
            **_kept_metrics([each.kept for each in lots]),
            **_pool_metrics([each.scored for each in lots], sum(group.num_unscorable for group in groups)),
            **part_metrics(
                labels,
                [parts for each in lots for parts in each.parts],
                np.concatenate([each.scored.weights for each in lots]),
            ),
            **_staleness(step, [sample for group in groups for sample, _ in group.kept]),
            "length/capped_share": _capped_share(groups),
            "groups/baseline_shift": _mean(shifts),
            "groups/kept_mean": _mean([len(w) for w in weights]),
            "weights/effective_share": _mean([w.sum() ** 2 / (len(w) * (w**2).sum()) for w in weights]),
            **self._redundancy([len(group.samples) for group in groups]),
            **self._survival(),
            **self._pay([each.length for each in lots]),
        }

    def _visit(self, prompt_id: int, num_launched: int) -> None:
        before = self.launched_before.get(prompt_id)
        if before is not None:
            self.launches.append((before, num_launched))
            del self.launches[:-_VISITS_CORRELATED]
        self.launched_before[prompt_id] = num_launched

    def _redundancy(self, launched: Sequence[int]) -> dict[str, float]:
        """Samples launched per prompt, and their correlation with the visit before."""
        metrics = {f"redundancy/launched_{n}": float(count) for n, count in sorted(Counter(launched).items())}
        metrics["redundancy/mean"] = _mean(launched)
        before, now = np.array(self.launches, np.float64).reshape(-1, 2).T
        if len(now) > 2 and before.std() > 0 and now.std() > 0:
            metrics["run/redundancy_autocorrelation"] = float(np.corrcoef(before, now)[0, 1])
        return metrics

    def _pay(self, lengths: Sequence[LengthTerms]) -> dict[str, float]:
        """What length is worth, and what the selection pays for it: see `length_pay`."""
        step = LengthTerms().plus(lengths)
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


def _lot(pairs: Sequence[tuple[Sample, float]]) -> Lot:
    rewards = [s.reward for s, _ in pairs if s.reward is not None]
    return Lot(rewards, [s.num_tokens for s, _ in pairs], [weight for _, weight in pairs])


def _kept_metrics(lots: Sequence[Lot]) -> dict[str, float]:
    lengths = np.concatenate([lot.num_tokens for lot in lots]).astype(np.float64)
    # Advantages in a group sum to zero, so to first order length falls if and only if this is negative.
    gains = np.concatenate([np.array(lot.rewards) - np.mean(lot.rewards) for lot in lots]) * lengths
    median, p99 = np.percentile(lengths, (50, 99))
    return {
        "reward/mean": float(np.concatenate([lot.rewards for lot in lots]).mean()),
        "length/mean": float(lengths.mean()),
        "length/p50": float(median),
        "length/p99": float(p99),
        "reward/length_covariance": float(gains.mean()),
        "groups/zero_advantage_share": _mean([len(set(lot.rewards)) == 1 for lot in lots]),
    }


def _pool_metrics(pools: Sequence[Lot], num_failed: int) -> dict[str, float]:
    rewards, lengths, counts = (
        np.concatenate([getattr(pool, name) for pool in pools]).astype(np.float64)
        for name in ("rewards", "num_tokens", "weights")
    )
    median, p99 = np.percentile(lengths, (50, 99), weights=counts, method="inverted_cdf")
    return {
        "reward/pool_mean": float(np.average(rewards, weights=counts)),
        "reward/failed_share": num_failed / (num_failed + len(rewards)),
        "length/pool_mean": float(np.average(lengths, weights=counts)),
        "length/pool_p50": float(median),
        "length/pool_p99": float(p99),
        "groups/pool_zero_advantage_share": _mean([len(set(pool.rewards)) == 1 for pool in pools]),
    }


def _capped_share(groups: Sequence[Group]) -> float:
    """Of the scored samples, those that were cut at the length cap."""
    return _mean([s.finish_reason == "length" for group in groups for s in group.samples if s.reward is not None])


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


def _mean_of_pool(pool: Lot) -> float:
    return float(np.average(pool.rewards, weights=pool.weights))


def _staleness(step: int, samples: Sequence[Sample]) -> dict[str, float]:
    staleness = [step - s.oldest_version for s in samples if s.oldest_version is not None]
    return {"staleness/mean": _mean(staleness), "staleness/max": float(max(staleness))}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _difficulty(tercile: int | None) -> str:
    return "unknown" if tercile is None else DIFFICULTIES[tercile]
