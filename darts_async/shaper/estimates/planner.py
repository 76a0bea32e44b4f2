"""What earlier visits to a prompt mean for the next: how many samples it is launched with, and which of its tail are
aborted. Composes `history`, `redundancy` and `hazard`; pure like them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from msgspec import Struct

from darts_async.config import RunConfig
from darts_async.shaper.estimates.decode_elasticity import DecodePace
from darts_async.shaper.estimates.hazard import GroupProgress, HazardRule, hazard_prunes, tail_of
from darts_async.shaper.estimates.history import History, Tercile
from darts_async.shaper.estimates.redundancy import Allocator, mean_redundancy, reward_aware_value
from darts_async.shaper.group import RUNNING, Group, Sample, Stage
from darts_async.shaper.rules.custom import UserRule
from darts_async.shaper.rules.length_rules import DualEnd
from darts_async.shaper.rules.selection import SelectionRule, Survivor, selection_rule, shortest_only


class Learnt(Struct, frozen=True):
    """What a `Planner` knows. The pace is not part of it: a new process measures that again."""

    history: History
    allocator: Allocator
    rule: bytes
    """What a rule of the user's remembers."""


class Planner:
    """Decides on a prompt before, during and after a visit."""

    def __init__(self, config: RunConfig, learnt: Learnt | None = None) -> None:
        """`learnt`: what `to_state` gave in an earlier process of the run."""
        self._shaping = config.shaping
        self._curriculum = config.prompts.curriculum
        self._seed = config.seed
        self._rule = selection_rule(config.shaping, config.seed)
        if isinstance(self._rule, UserRule) and learnt:
            self._rule.state = learnt.rule
        self._saturated_rule = shortest_only(config.shaping)
        budget, keep = config.shaping.redundancy, config.shaping.keep
        self.history = learnt.history if learnt else History()
        self._allocator = learnt.allocator if learnt else Allocator(keep, 2 * keep, budget.split, config.seed)
        self.pace = DecodePace() if budget.total == "utility" and budget.latency_elasticity is None else None
        """Watches the generators, where that has a use."""
        pruning = config.shaping.pruning
        self._pruning = pruning.mode
        self._hazard = HazardRule(
            keep=config.shaping.keep,
            shortest=config.shaping.shortest,
            threshold=pruning.threshold,
            spare_probability=pruning.spare_probability,
            max_tokens=config.sampling.max_new_tokens,
        )

    @property
    def batch(self) -> int:
        """Prompts that `num_samples` is asked about at once."""
        return 1 if self._shaping.redundancy.total == "off" else self._shaping.redundancy.batch

    def num_samples(self, prompt_ids: Sequence[int]) -> list[int]:
        """How many samples each of the next prompts is launched with (R)."""
        if self._shaping.redundancy.total == "off":
            return [self._shaping.launch] * len(prompt_ids)
        return self._allocator.allocate([self._value(prompt_id) for prompt_id in prompt_ids], self._mean_target())

    def passes_over(self, prompt_id: int, place: int) -> bool:
        """Whether the curriculum leaves out a prompt that the source brings as its number `place`."""
        mean = self.history.mean_reward(prompt_id)
        if self._curriculum is None or mean is None or self._curriculum.lowest <= mean <= self._curriculum.highest:
            return False
        drawn = float(np.random.default_rng((self._seed, place)).random())
        return drawn >= self._curriculum.revisit_share

    def baseline(self, prompt_id: int) -> float | None:
        """The prompt's pass rate so far, where that is the baseline."""
        return self.history.pass_rate(prompt_id) if self._shaping.baseline == "history" else None

    def rule(self, group: Group) -> SelectionRule:
        """The selection rule of a group. Where saturation prunes and its redundancy is saturated, at 2M, only the M
        shortest are kept, and the rest are aborted."""
        if self._pruning == "saturation" and len(group.samples) >= 2 * self._shaping.keep:
            return self._saturated_rule
        return self._rule

    def tail_to_prune(self, group: Group) -> list[Sample]:
        """Running samples whose expected remainder is not worth waiting for; may spare one of them for good."""
        if self._pruning != "hazard" or group.num_finished < self._hazard.shortest:
            return []
        samples = [s for s in group.samples if s.sample_id != group.spared]
        finished = [s for s in samples if s.stage in (Stage.FINISHED, Stage.SCORED)]
        running = {s.sample_id: s.num_tokens for s in samples if s.stage in RUNNING}
        finished_tokens = sorted(s.num_tokens for s in finished)
        if not tail_of(running, finished_tokens, self._hazard.shortest):
            return []
        progress = GroupProgress(
            group_id=group.group_id,
            estimate=self.history.estimate_with(group.prompt.prompt_id, *_lengths(group, group.hazard_candidates)),
            difficulty=self.tercile(group),
            typical_tokens=self.history.typical_length.mean_tokens,
            num_launched=len(group.samples),
            finished_tokens=finished_tokens,
            finished_rewards=[s.reward for s in finished if s.reward is not None],
            running=running,
            num_candidates=len(group.hazard_candidates),
        )
        choice = hazard_prunes(self._hazard, progress, self._seed)
        group.hazard_candidates |= {sample_id: running[sample_id] for sample_id in choice.prune}
        if choice.spare is not None:
            group.spared = choice.spare
            group.hazard_candidates[choice.spare] = running[choice.spare]
        return [s for s in samples if s.sample_id in choice.prune]

    def weighed(self, group: Group, kept: Sequence[tuple[Sample, float]]) -> list[tuple[Sample, float]]:
        """The kept samples, the spared one with the inverse of its probability."""
        factor = self._hazard.weight_of_spared(len(group.samples)) if group.spared is not None else 1.0
        return [(s, weight * factor if s.sample_id == group.spared else weight) for s, weight in kept]

    def tercile(self, group: Group) -> Tercile | None:
        """The difficulty of the group's prompt as far as it is known."""
        return self.history.difficulty_tercile(group.prompt.prompt_id)

    def observe(self, group: Group) -> None:
        """A visit is over: remember lengths, those that were cut short as such, and rewards."""
        scored = [s for s in group.samples if s.reward is not None]
        rewards = [s.reward for s in scored if s.reward is not None]
        counts = [self.represented_by(group, s) for s in scored]
        self.history.observe(group.prompt.prompt_id, *_lengths(group), rewards, counts)

    def counts(self, group: Group) -> dict[int, float] | None:
        """By the id of each scored sample how many launched ones it represents. None where samples were cut for being
        long, without a draw: no scored one represents them."""
        rule, scored = self.rule(group), [sample for sample in group.samples if sample.reward is not None]
        if isinstance(rule, DualEnd) and rule.early_stop and len(scored) < len(group.samples):
            return None
        return {sample.sample_id: self.represented_by(group, sample) for sample in scored}

    def represented_by(self, group: Group, sample: Sample) -> float:
        """Launched samples that a scored one represents, itself included: its inverse inclusion probability."""
        if sample.sample_id == group.spared:
            return self._hazard.weight_of_spared(len(group.samples))
        rule = self.rule(group)
        return rule.stands_for(group) if isinstance(rule, Survivor) and rule.survived(sample) else 1.0

    def metrics(self) -> dict[str, float]:
        """What the total rests on, where it is the utility rule's."""
        if self._shaping.redundancy.total != "utility":
            return {}
        return {
            "redundancy/target": self._mean_target(),
            "redundancy/elasticity": self._elasticity,
            "redundancy/typical_spread": self.history.typical_length.relative_spread,
        }

    def to_state(self) -> Learnt:
        """To be encoded at once: it shares its parts with the planner."""
        rule = self._rule.state if isinstance(self._rule, UserRule) else b""
        return Learnt(self.history, self._allocator, rule)

    @property
    def _elasticity(self) -> float:
        if self.pace is not None:
            return self.pace.elasticity
        given = self._shaping.redundancy.latency_elasticity
        return 1.0 if given is None else given

    def _value(self, prompt_id: int) -> float:
        """What the split looks at."""
        spread = self.history.length(prompt_id).relative_spread
        match self._shaping.redundancy.split:
            case "uniform":
                return 1.0
            case "reward_aware":
                return reward_aware_value(spread, self.history.reward_variance(prompt_id))
            case "paper" | "shuffled":
                return spread

    def _mean_target(self) -> float:
        if self._shaping.redundancy.total == "fixed":
            return self._shaping.launch
        spread = self.history.typical_length.relative_spread
        return mean_redundancy(spread, self._shaping.keep, elasticity=self._elasticity)


def _lengths(group: Group, cut_at: Mapping[int, int] = MappingProxyType({})) -> tuple[list[int], list[int]]:
    """Tokens of the samples that ended by themselves, and of those still running, aborted or cut at the cap.

    `cut_at`: samples that count as aborted with so many tokens, whatever has become of them since.
    """
    samples = [s for s in group.samples if s.sample_id not in cut_at]
    ended = [s.num_tokens for s in samples if s.finish_reason == "stop"]
    others = [s.num_tokens for s in samples if s.finish_reason != "stop" and s.num_tokens > 0]
    return ended, [*others, *cut_at.values()]
