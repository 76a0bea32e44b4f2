"""The result of a simulated run, and the statistics of its groups."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from darts_async.advantage import Decoded, group_advantages
from darts_async.config import ShapingConfig
from darts_async.protocol import RunFinished, TrainGroup
from darts_async.simulation.demand import Draw


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """One run. Times are virtual seconds."""

    makespan_s: float
    step_s: tuple[float, ...]
    """Time between one optimiser step and the one before; the first from the start."""
    generator_s: dict[str, float]
    """Generator time by state (`decode`, `stall`, `idle`), summed over generators."""
    idle_until_step_s: tuple[float, ...]
    """Generator time in the state `idle` before each step."""
    learner_s: dict[str, float]
    """Learner time by state (`train`, `idle`)."""
    slot_use: float
    """Share of all slots, over the whole time, that decoded."""
    num_tokens_decoded: int
    """As the engines count them."""
    tokens_by_outcome: dict[str, int]
    """As the shaper counts them."""
    samples_by_outcome: dict[str, int]
    tokens_by_staleness: dict[int, int]
    """Trained tokens by the age of the version that decoded them."""
    group_s: tuple[float, ...]
    """Of each trained group, from its opening to its last reward."""
    launched: dict[int, int]
    """{number of samples: training groups that were opened with so many}"""
    num_trained_groups: int
    zero_advantage_share: float
    """Trained groups whose kept rewards are all equal."""
    length_drift: float
    """First-order change of the mean length per unit step: the mean over trained groups of
    `mean_i(A_i l_i) / E[l]` over the kept samples, with A_i the learner's own normalised advantages, weights included,
    and E[l] the mean full length of all that were launched for the prompt. Negative shortens. It holds for the policy
    as it is, which here never moves."""
    num_events: int
    """Messages that the shaper handled."""

    @property
    def num_samples(self) -> int:
        """Samples launched."""
        return sum(self.samples_by_outcome.values())

    @property
    def generated_per_trained(self) -> float:
        """Tokens decoded per token trained."""
        return self.num_tokens_decoded / self.tokens_by_outcome["trained"]

    @property
    def generator_idle_share(self) -> float:
        """The generator bubble: share of generator time without a sample to decode, stalls included."""
        return 1 - self.generator_s.get("decode", 0.0) / sum(self.generator_s.values())

    @property
    def learner_idle_share(self) -> float:
        """The learner bubble: share of learner time without a group or step to work on."""
        return self.learner_s.get("idle", 0.0) / sum(self.learner_s.values())

    @property
    def staleness_mean(self) -> float:
        """Mean staleness of the trained tokens."""
        return sum(age * n for age, n in self.tokens_by_staleness.items()) / sum(self.tokens_by_staleness.values())

    @property
    def staleness_max(self) -> int:
        """Largest staleness of a trained token."""
        return max(self.tokens_by_staleness)

    def group_percentile_s(self, percentile: float) -> float:
        """Percentile of the group completion times."""
        return float(np.percentile(self.group_s, percentile))


@dataclass(slots=True)
class OpenGroup:
    """A group that has a sample left."""

    opened_s: float
    draws: list[Draw]
    num_left: int
    last_scored_s: float = 0.0

    @property
    def mean_length(self) -> float:
        """Of all launched samples, had they been decoded to the end."""
        return sum(length for length, _ in self.draws) / len(self.draws)


@dataclass(slots=True)
class GroupStatistics:
    """Collects what is known when a group is shipped."""

    shaping: ShapingConfig
    group_s: list[float] = field(default_factory=list)
    launched: Counter[int] = field(default_factory=Counter)
    finished: RunFinished | None = None
    _num_zero: int = 0
    _sum_drift: float = 0.0

    def shipped(self, message: TrainGroup, group: OpenGroup) -> None:
        """A group went to the learner."""
        self.group_s.append(group.last_scored_s - group.opened_s)
        self._num_zero += int(message.rewards.min() == message.rewards.max())
        advantages = group_advantages(
            message.rewards,
            message.weights,
            normalise=True,
            baseline=self.shaping.baseline,
            pass_rate=message.baseline,
            decoded=Decoded.of(self.shaping),
        )
        self._sum_drift += float(advantages @ message.num_tokens) / (len(advantages) * group.mean_length)

    @property
    def zero_advantage_share(self) -> float:
        """Groups without a gradient."""
        return self._num_zero / len(self.group_s)

    @property
    def length_drift(self) -> float:
        """See `SimulationResult`."""
        return self._sum_drift / len(self.group_s)
