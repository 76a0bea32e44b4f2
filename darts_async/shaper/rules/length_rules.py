"""Rules that select by length: the ends of a group's length distribution, with or without the rewards.

Short and long are counted in tokens, or by the order of completion. The two agree only where samples start together and
decode at one speed: completion prefers samples that started early or ran on a fast replica. Ties go by launch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from darts_async.shaper.group import RUNNING, Group, Sample, Stage
from darts_async.shaper.rules.signal_guard import keep_signal, split_by_reward

Order = Literal["tokens", "completion"]
Kept = list[tuple[Sample, float]]


@dataclass(frozen=True, slots=True)
class DualEnd:
    """The K shortest and the L longest; samples cut at the length cap only fill up what is missing.

    With `early_stop` the first M finishers are kept instead and the rest cancelled at once. With `guard` the innermost
    sample of the larger end gives way where a kind of reward is missing: for K > L the K-th shortest, for the shortest
    of that kind in the middle. So the smaller end, of which one sample is a larger part, stays as it is.

    What it pays for length (see `length_pay`): without a long end (`shortest`) long samples that fail are not trained
    on. Where long answers are more often wrong, the pressure on length that plain GRPO has is gone. A long end brings
    it back, the larger the more: length costs where the longest are wrong, and pays where they are right. `early_stop`
    makes every such rule one without a long end.
    """

    shortest: int
    longest: int
    exclude_capped: bool
    early_stop: bool
    order: Order = "tokens"
    guard: bool = False

    def to_cancel(self, group: Group) -> list[Sample]:
        """With `early_stop`: the samples that still run when M have finished that may have a reward."""
        keep = self.shortest + self.longest
        if not self.early_stop or group.num_finished < keep or len(group.at(Stage.FINISHED, Stage.SCORED)) < keep:
            return []
        return group.at(*RUNNING)

    def select(self, group: Group) -> Kept:
        """Both ends of the scored samples, each with weight 1. O(R log R)."""
        line = by_length(group, self.order)
        if len(line) <= self.shortest + self.longest:
            return in_launch_order(line)
        free = [s for s in line if not self._is_excluded(s)]
        capped = [s for s in line if self._is_excluded(s)]
        kept, gives_way = self._ends(free, capped)
        if self.guard:
            kept = keep_signal(kept, free + capped, gives_way, num_preferred=len(free))
        return in_launch_order(kept)

    def _is_excluded(self, sample: Sample) -> bool:
        return self.exclude_capped and sample.finish_reason == "length"

    def _ends(self, free: list[Sample], capped: list[Sample]) -> tuple[list[Sample], Sample]:
        """The kept samples, and the one of them that is the nearest to being left out."""
        num_filled = self.shortest + self.longest - len(free)
        if num_filled >= 0:
            kept = free + capped[:num_filled]
            return kept, kept[-1]
        first_long = len(free) - self.longest
        innermost = self.shortest - 1 if self.shortest >= self.longest else first_long
        return free[: self.shortest] + free[first_long:], free[innermost]


@dataclass(frozen=True, slots=True)
class Quadrants:
    """QLPO (arXiv 2607.21793): right and wrong samples in the proportion of the pool, the right ones mostly short and
    the wrong ones mostly long, so that the advantages push length down from both sides.

    Of n scored samples G+ are right. N+ = round(M |G+| / n), half to even, and N- = M - N+ are kept:
    ceil(N+ / (1 + alpha)) of the shortest right and ceil(N- / (1 + alpha)) of the longest wrong ones, the rest from
    the other ends. N+ <= |G+| and N- <= |G-| because M <= n. With `guard` neither is rounded to 0 where its kind
    exists, which exchanges one sample.

    Length always costs (see `length_pay`): that is its purpose.
    """

    keep: int
    alpha: float
    order: Order = "tokens"
    guard: bool = False

    def to_cancel(self, group: Group) -> list[Sample]:
        """None: right or wrong is only known at the end."""
        return []

    def select(self, group: Group) -> Kept:
        """The four quadrants, each sample with weight 1. O(R log R)."""
        line = by_length(group, self.order)
        if len(line) <= self.keep:
            return in_launch_order(line)
        right, wrong = split_by_reward(line)
        num_right = round(self.keep * len(right) / len(line))
        if self.guard and right and wrong:
            num_right = min(max(num_right, 1), self.keep - 1)
        kept = self._mostly_first(right, num_right)
        return in_launch_order(kept + self._mostly_first(wrong[::-1], self.keep - num_right))

    def _mostly_first(self, line: list[Sample], num_kept: int) -> list[Sample]:
        # The margin: a whole quotient may come out of the division a little above itself.
        num_first = math.ceil(num_kept / (1 + self.alpha) - 1e-9)
        return line[:num_first] + line[len(line) - (num_kept - num_first) :]


def by_length(group: Group, order: Order) -> list[Sample]:
    """The scored samples, the shortest first."""
    return sorted(group.at(Stage.SCORED), key=_rank if order == "completion" else _tokens)


def in_launch_order(samples: list[Sample]) -> Kept:
    """As launched, each with weight 1."""
    return [(sample, 1.0) for sample in sorted(samples, key=lambda s: s.sample_id)]


def _tokens(sample: Sample) -> tuple[int, int]:
    return sample.num_tokens, sample.sample_id


def _rank(sample: Sample) -> tuple[int, int]:
    assert sample.finish_rank is not None, sample.sample_id
    return sample.finish_rank, sample.sample_id
