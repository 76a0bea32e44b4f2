"""Where every token went: generated = trained + cancelled + filtered + stale + lost (+ evaluated), by construction
of exactly one end per sample; and the statistics of each step."""

from collections import Counter

import numpy as np

from darts_async.shaper.group import Fate, Group, Sample, Stage

FATES: tuple[Fate, ...] = ("trained", "cancelled", "filtered", "stale", "lost", "evaluated")


class Totals:
    """Counts over the run."""

    def __init__(self) -> None:
        self.tokens_by_fate: Counter[str] = Counter()
        self.samples_by_fate: Counter[str] = Counter()
        self.tokens_by_staleness: Counter[int] = Counter()
        self.num_tokens_received = 0

    def ended(self, fate: Fate, num_tokens: int) -> None:
        """A sample ended."""
        self.tokens_by_fate[fate] += num_tokens
        self.samples_by_fate[fate] += 1

    def trained(self, sample: Sample, step: int) -> None:
        """A sample entered the gradient of `step`: count its tokens by staleness."""
        for version, token_ids, _ in sample.chunks:
            self.tokens_by_staleness[step - version] += len(token_ids)


def pool_statistics(group: Group) -> tuple[list[float], list[int]]:
    """Rewards and lengths of all scored samples of a group, before anything is selected."""
    scored = group.at(Stage.SCORED)
    return [s.reward for s in scored if s.reward is not None], [s.num_tokens for s in scored]


class StepStatistics:
    """Collects the groups of the steps under way; `close` gives the metrics of one."""

    def __init__(self) -> None:
        self._pools: dict[int, tuple[list[float], list[int]]] = {}

    def completed(self, group: Group) -> None:
        """Remember the pool of a group, before the rule's choice."""
        self._pools[group.group_id] = pool_statistics(group)

    def close(self, step: int, groups: list[Group]) -> dict[str, float]:
        """Metrics of one step over its groups."""
        kept = [sample for group in groups for sample, _ in group.kept or []]
        pools = [self._pools.pop(group.group_id) for group in groups]
        pool_rewards = [r for rewards, _ in pools for r in rewards]
        pool_lengths = [n for _, lengths in pools for n in lengths]
        staleness = [step - s.oldest_version for s in kept if s.oldest_version is not None]
        return {
            "reward/mean": float(np.mean([s.reward for s in kept])),
            "reward/pool_mean": float(np.mean(pool_rewards)),
            "length/mean": float(np.mean([s.num_tokens for s in kept])),
            "length/pool_mean": float(np.mean(pool_lengths)),
            "length/pool_p99": float(np.percentile(pool_lengths, 99)),
            "staleness/mean": float(np.mean(staleness)),
            "staleness/max": float(max(staleness)),
            "groups/zero_advantage_share": float(np.mean([_all_equal(group) for group in groups])),
        }


def _all_equal(group: Group) -> bool:
    return len({sample.reward for sample, _ in group.kept or []}) <= 1
