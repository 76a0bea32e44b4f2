"""Selects the samples of a group to train on, and those to cancel in flight.

M samples are trained on per prompt and R >= M launched (DARTS, arXiv 2605.30859). A rule answers two questions: which
samples to cancel when one has finished, which never depends on a reward; and which to keep when every finished sample
has its reward, at which only the guard and QLPO look.

Invariants, for every rule. Of R >= M scored samples exactly M are kept, in launch order. With R = M all are, with
weight 1, so every rule is plain GRPO bit for bit. R is the group's own: it may differ from prompt to prompt.

A reward may fail. A sample without a reward is missing: rules choose among the scored samples as if only these had been
launched. So K and L shrink only where fewer than M are left, and then all of these are kept, with the same weights. The
reason: let m of the M samples that were decoded have a reward, and let failures not depend on content. Given m, each of
the M is scored with probability m / M, whether it is of the short end or a survivor, so all inclusion probabilities are
multiplied by the same number. A sum over the scored samples, with the weights of a complete group, has m / M times its
complete expectation: its direction is unbiased, and the group counts in its step for the part that is there. A group is
dropped by m alone, which by the same argument favours no sample. Where failures do depend on content (a verifier that
hangs on long responses), no weight is right: that is why they are reported.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from darts_async.config import ShapingConfig
from darts_async.shaper.group import RUNNING, Group, Sample, Stage
from darts_async.shaper.rules.custom import UserRule
from darts_async.shaper.rules.length_rules import DualEnd, Kept, Quadrants, in_launch_order
from darts_async.shaper.rules.signal_guard import keep_signal


class SelectionRule(Protocol):
    """Decides on one group, and changes nothing of it: what is drawn follows from the seed and the group's id."""

    def to_cancel(self, group: Group) -> list[Sample]:
        """Called after each finish and each reward: the samples that will not be needed."""

    def select(self, group: Group) -> Kept:
        """Samples to train with their weights, in launch order; fewer than M if there are not enough."""


@dataclass(frozen=True, slots=True)
class RandomKeep:
    """M at random: the control that samples as much as the others and shapes nothing.

    Every sample is decoded to the end. All R are put in a random order, so that a sample without a reward gives its
    place to the next. With `guard` the last kept one gives way to the next of the kind that is missing.

    It pays nothing for length (see `length_pay`).
    """

    keep: int
    guard: bool = False
    seed: int = 0

    def to_cancel(self, group: Group) -> list[Sample]:
        """None."""
        return []

    def select(self, group: Group) -> Kept:
        """The first M of the order among the scored samples."""
        order = np.random.default_rng((self.seed, group.group_id)).permutation(len(group.samples)).tolist()
        line = [group.samples[i] for i in order if group.samples[i].stage is Stage.SCORED]
        kept = line[: self.keep]
        if self.guard and kept:
            kept = keep_signal(kept, line, kept[-1], num_preferred=len(line))
        return in_launch_order(kept)


@dataclass(frozen=True, slots=True)
class Survivor:
    """When the K-th sample finishes, L of the R - K unfinished ones survive a uniform draw; the rest are cancelled.

    Inclusion probabilities are exact without knowing the length distribution: 1 for the short end and L / (R - K)
    for the tail, so the weights ((R - K) / L) ** gamma of the survivors make a sum over the group unbiased at
    gamma = 1 (Horvitz-Thompson). They are scaled to a sum of M: the group then represents the mean of its R samples,
    times M, and a prompt that was launched with more of them counts no more than another.

    All samples that finish are kept, so there is nothing that a guard could exchange.

    What it pays for length (see `length_pay`): at gamma < 1 long samples count less than short ones. Where long answers
    are more often wrong, they are punished less than by plain GRPO, and length is paid for; where they are more often
    right, it costs. At gamma = 1 neither, up to noise.
    """

    shortest: int
    longest: int
    weight_power: float
    seed: int = 0

    def to_cancel(self, group: Group) -> list[Sample]:
        """The unfinished samples that lose the draw. Once it is made no more than L run."""
        running = group.at(*RUNNING)
        if group.num_finished < self.shortest or len(running) <= self.longest:
            return []
        rng = np.random.default_rng((self.seed, group.group_id))
        spared = set(rng.choice(len(running), self.longest, replace=False).tolist())
        return [sample for i, sample in enumerate(running) if i not in spared]

    def select(self, group: Group) -> Kept:
        """All samples that were not cancelled and have a reward."""
        tail = self.stands_for(group) ** self.weight_power
        scale = (self.shortest + self.longest) / (self.shortest + self.longest * tail)
        return [(s, scale * tail if self.survived(s) else scale) for s in group.at(Stage.SCORED)]

    def survived(self, sample: Sample) -> bool:
        """Whether a sample that finished was one of the tail."""
        return sample.finish_rank is not None and sample.finish_rank >= self.shortest

    def stands_for(self, group: Group) -> float:
        """Samples of the tail that each survivor represents: its inverse inclusion probability."""
        return (len(group.samples) - self.shortest) / self.longest if self.longest else 1.0


def selection_rule(config: ShapingConfig, seed: int = 0) -> SelectionRule:
    """The rule that the configuration names. Raises `ExtensionError` if one of the user's cannot be loaded."""
    match config.rule:
        case "none":  # R = M, so all are kept
            return _ends(config, config.keep, 0, early_stop=False)
        case "random":
            return RandomKeep(config.keep, config.guard, seed)
        case "shortest":
            return _ends(config, config.keep, 0, early_stop=config.early_stop)
        case "longest":
            return _ends(config, 0, config.keep, early_stop=False)
        case "dual_end":
            return _ends(config, config.shortest, config.longest, early_stop=config.early_stop)
        case "survivor":
            return Survivor(config.shortest, config.longest, config.weight_power, seed)
        case "qlpo":
            return Quadrants(config.keep, config.qlpo_alpha, config.order, config.guard)
        case _:
            return UserRule(config, seed)


def shortest_only(config: ShapingConfig) -> SelectionRule:
    """The rule of prompts whose redundancy is saturated: the first M to finish, the rest aborted at once."""
    return _ends(config, config.keep, 0, early_stop=True)


def _ends(config: ShapingConfig, shortest: int, longest: int, *, early_stop: bool) -> DualEnd:
    return DualEnd(shortest, longest, config.exclude_capped, early_stop, config.order, config.guard)
