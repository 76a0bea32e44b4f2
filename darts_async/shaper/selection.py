"""Which samples of a group are trained, and which are cancelled in flight.

M samples are trained per prompt and R >= M launched; K come from the short end of the length distribution and L from
the long one, K + L = M (DARTS, arXiv 2605.30859). A rule answers two questions, both without looking at rewards:
whom to cancel when a sample has finished, and whom to keep when nothing is undecided any more. With R = M every rule
keeps all samples in their order, so it is plain GRPO bit for bit.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from darts_async.config import ShapingConfig
from darts_async.shaper.group import Group, Sample, Stage

_FINISHED = (Stage.FINISHED, Stage.SCORED, Stage.UNSCORABLE)
_RUNNING = (Stage.WAITING, Stage.DECODING)


class SelectionRule(Protocol):
    """Decides on one group; it may note what it drew on the group."""

    def to_cancel(self, group: Group, seed: int) -> list[Sample]:
        """Called after each finish: the samples that will not be needed."""

    def select(self, group: Group) -> list[tuple[Sample, float]]:
        """Samples to train with their weights, in launch order; fewer than M if there are not enough."""


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Plain GRPO: R = M."""

    def to_cancel(self, group: Group, seed: int) -> list[Sample]:
        """Nobody."""
        return []

    def select(self, group: Group) -> list[tuple[Sample, float]]:
        """Everybody with a reward."""
        return [(sample, 1.0) for sample in group.at(Stage.SCORED)]


@dataclass(frozen=True, slots=True)
class DualEnd:
    """The K shortest and the L longest by tokens; samples cut at the length cap only fill up what is missing.

    With `early_stop` the first M finishers are kept instead and the rest cancelled at once: selection by completion
    order, which equals selection by length only where samples start together and decode at one speed.
    """

    shortest: int
    longest: int
    exclude_capped: bool
    early_stop: bool

    def to_cancel(self, group: Group, seed: int) -> list[Sample]:
        """With `early_stop`: whoever runs when M have finished."""
        enough = self.early_stop and len(group.at(*_FINISHED)) >= self.shortest + self.longest
        return group.at(*_RUNNING) if enough else []

    def select(self, group: Group) -> list[tuple[Sample, float]]:
        """Both ends of the scored samples. O(R log R)."""
        keep = self.shortest + self.longest
        by_length = sorted(group.at(Stage.SCORED), key=lambda s: (s.num_tokens, s.sample_id))
        if len(by_length) > keep:
            by_length = self._both_ends(by_length, keep)
        return [(sample, 1.0) for sample in sorted(by_length, key=lambda s: s.sample_id)]

    def _both_ends(self, by_length: list[Sample], keep: int) -> list[Sample]:
        capped = [s for s in by_length if self.exclude_capped and s.finish_reason == "length"]
        pool = [s for s in by_length if s not in capped]
        if len(pool) <= keep:
            return pool + capped[: keep - len(pool)]
        return pool[: self.shortest] + pool[len(pool) - self.longest :]


@dataclass(frozen=True, slots=True)
class Survivor:
    """When the K-th sample finishes, L of the R - K unfinished ones survive a uniform draw; the rest are cancelled.

    Inclusion probabilities are exact without knowing the length distribution: 1 for the short end and L / (R - K)
    for the tail, so the weights ((R - K) / L) ** gamma of the survivors make a sum over the group unbiased at
    gamma = 1 (Horvitz-Thompson).
    """

    shortest: int
    longest: int
    weight_power: float

    def to_cancel(self, group: Group, seed: int) -> list[Sample]:
        """The unfinished samples that lose the draw, once."""
        running = group.at(*_RUNNING)
        if group.survivors or not running or len(group.at(*_FINISHED)) < self.shortest:
            return []
        rng = np.random.default_rng((seed, group.group_id))
        spared = set(rng.choice(len(running), min(self.longest, len(running)), replace=False).tolist())
        group.survivors = frozenset(running[i].sample_id for i in spared)
        return [sample for i, sample in enumerate(running) if i not in spared]

    def select(self, group: Group) -> list[tuple[Sample, float]]:
        """Everybody who was not cancelled."""
        tail = len(group.samples) - self.shortest
        weight = (tail / self.longest) ** self.weight_power if self.longest else 1.0
        return [(s, weight if s.sample_id in group.survivors else 1.0) for s in group.at(Stage.SCORED)]


def selection_rule(config: ShapingConfig) -> SelectionRule:
    """The rule that the configuration names."""
    match config.rule:
        case "none":
            return KeepAll()
        case "dual_end":
            return DualEnd(config.shortest, config.longest, config.exclude_capped, config.early_stop)
        case "survivor":
            return Survivor(config.shortest, config.longest, config.weight_power)
