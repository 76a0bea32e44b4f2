"""What earlier visits to a prompt mean for the next: how many samples it is launched with, and which of its tail is
aborted. Composes `history`, `redundancy` and `pruning` for `state`; pure like them."""

from collections.abc import Sequence

from darts_async.config import RunConfig
from darts_async.shaper.group import RUNNING, Group, Sample, Stage
from darts_async.shaper.history import History, Tercile
from darts_async.shaper.pruning import GroupProgress, HazardRule, hazard_prunes, saturation_mode
from darts_async.shaper.redundancy import Allocator, Utility, mean_redundancy, reward_aware_value
from darts_async.shaper.selection import SelectionRule, selection_rule, shortest_only


class Planner:
    """Decides on a prompt before, during and after a visit."""

    def __init__(self, config: RunConfig, history: History) -> None:
        self.history = history
        self._shaping = config.shaping
        self._seed = config.seed
        self._rule = selection_rule(config.shaping)
        self._saturated_rule = shortest_only(config.shaping)
        budget = config.shaping.redundancy
        shuffle_seed = config.seed if budget.split == "shuffled" else None
        self._allocator = Allocator(
            config.shaping.keep, 2 * config.shaping.keep, window=budget.window, shuffle_seed=shuffle_seed
        )
        self._utility = Utility(elasticity=budget.latency_elasticity)
        pruning = config.shaping.pruning
        self._hazard = HazardRule(
            keep=config.shaping.keep,
            shortest=config.shaping.shortest,
            threshold_tokens=pruning.threshold_tokens,
            spare_probability=pruning.spare_probability,
            max_tokens=config.sampling.max_new_tokens,
        )

    def num_samples(self, prompt_id: int) -> int:
        """How many samples the prompt is launched with now (R)."""
        budget = self._shaping.redundancy
        if budget.total == "off":
            return self._shaping.launch
        return self._allocator.allocate(self._value(prompt_id), self._mean_target())

    def baseline(self, prompt_id: int) -> float | None:
        """The prompt's pass rate so far, where that is the baseline."""
        return self.history.pass_rate(prompt_id) if self._shaping.baseline == "history" else None

    def rule(self, group: Group) -> SelectionRule:
        """The selection rule of a group: shortest-only where its redundancy is saturated and that prunes."""
        saturated = self._shaping.pruning.mode == "saturation" and saturation_mode(
            len(group.samples), self._shaping.keep
        )
        return self._saturated_rule if saturated else self._rule

    def tail_to_prune(self, group: Group) -> list[Sample]:
        """Running samples whose expected remainder is not worth waiting for; may spare one of them for good."""
        if self._shaping.pruning.mode != "hazard":
            return []
        samples = [s for s in group.samples if s.sample_id != group.spared]
        finished = [s for s in samples if s.stage in (Stage.FINISHED, Stage.SCORED)]
        running = {s.sample_id: s.num_tokens for s in samples if s.stage in RUNNING}
        if len(finished) < self._hazard.shortest or not running:
            return []
        progress = GroupProgress(
            group_id=group.group_id,
            estimate=self.history.estimate_with(group.prompt.prompt_id, *_lengths(group)),
            difficulty=self.tercile(group),
            num_launched=len(group.samples),
            num_finished=len(finished),
            finished_rewards=[s.reward for s in finished if s.reward is not None],
            running=running,
            num_candidates=group.num_hazard_candidates,
        )
        verdict = hazard_prunes(self._hazard, progress, self._seed)
        group.num_hazard_candidates += len(verdict.prune) + (verdict.spare is not None)
        if verdict.spare is not None:
            group.spared = verdict.spare
        return [s for s in samples if s.sample_id in verdict.prune]

    def weighed(self, group: Group, kept: Sequence[tuple[Sample, float]]) -> list[tuple[Sample, float]]:
        """The kept samples, the spared one with the inverse of its probability."""
        factor = self._hazard.weight_of_spared(len(group.samples)) if group.spared is not None else 1.0
        return [(s, weight * factor if s.sample_id == group.spared else weight) for s, weight in kept]

    def tercile(self, group: Group) -> Tercile | None:
        """The difficulty of the group's prompt as far as it is known."""
        return self.history.difficulty_tercile(group.prompt.prompt_id)

    def observe(self, group: Group) -> None:
        """A visit is over: remember lengths, those that were cut short as such, and rewards."""
        rewards = [s.reward for s in group.samples if s.reward is not None]
        self.history.observe(group.prompt.prompt_id, *_lengths(group), rewards)

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
        spread = self.history.typical_relative_spread
        return mean_redundancy(spread, self._shaping.keep, utility=self._utility)


def _lengths(group: Group) -> tuple[list[int], list[int]]:
    """Tokens of the samples that ended by themselves, and of those still running, aborted or cut at the cap."""
    ended = [s for s in group.samples if s.finish_reason == "stop"]
    others = [s for s in group.samples if s.finish_reason != "stop" and s.num_tokens > 0]
    return [s.num_tokens for s in ended], [s.num_tokens for s in others]
