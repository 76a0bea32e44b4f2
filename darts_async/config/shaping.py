"""Which samples of a group are launched, kept and trained, and how old they may be."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.section import Fraction, NonNegative, Positive, Seconds, Section, named
from darts_async.extensions import RULE

Baseline = Literal["group", "history", "leave_one_out"]
Split = Literal["uniform", "paper", "shuffled", "reward_aware"]


class RedundancyConfig(Section):
    """How many samples each prompt is launched with, between `shaping.keep` and twice that."""

    total: Literal["off", "fixed", "utility"] = "off"
    """`off`: `shaping.launch` for every prompt. `fixed`: `shaping.launch` on average. `utility`: on average as many as
    pay for themselves at the present spread of lengths; none beyond `shaping.keep` where lengths hardly differ."""
    split: Split = "paper"
    """Who gets them. `uniform`: all alike. `paper`: by the spread of the prompt's lengths. `shuffled`: the same numbers
    handed out by lot, a placebo. `reward_aware`: by spread times what a group of the prompt is expected to teach."""
    batch: Positive = 32
    """Prompts that a budget is split among: the next so many to be asked."""
    latency_elasticity: Fraction | None = None
    """`utility`: by how many per cent decoding slows when one per cent more samples are decoded; 1 where generators are
    full. Unset: measured from the tokens that they report."""


class PruningConfig(Section):
    """Which running samples are aborted because waiting for them does not pay."""

    mode: Literal["off", "saturation", "hazard"] = "off"
    """`saturation`: prompts launched with twice `shaping.keep` keep only the shortest, and stop when these have
    finished. `hazard`: a sample that has run for longer than `shaping.shortest` siblings in all is aborted when its
    expected remaining length exceeds `threshold`."""
    threshold: Annotated[float, Field(gt=0)] = 0.25
    """`hazard`: what a sample may still be expected to need (tau), in mean lengths of a typical prompt's responses."""
    spare_probability: Fraction = 0.1
    """`hazard`: share of the aborted tail that is let run and weighed by the inverse (rho)."""


class ShapingConfig(Section):
    """Distribution-aware shaping: which of the launched samples are decoded to the end, and which are trained.

    A setting that the rule does not name is not read, so that arms of an experiment differ in `rule` alone.
    """

    rule: Annotated[str, named(RULE)] = "dual_end"
    """`none`: plain GRPO, `launch` must equal `keep`. `random`: `keep` of the finished by lot. `shortest`, `longest`:
    that end alone. `dual_end`: the `shortest` shortest and the `longest` longest. `survivor`: once `shortest` have
    finished, `longest` of the others survive a uniform draw. `qlpo`: mostly short right and mostly long wrong ones.
    `module:name`: a rule of yours.

    A choice by length is a reward for it as well. Where long answers are more often wrong, `shortest` and `survivor`
    below `weight_power: 1` pay for length, `dual_end` costs a little, and `qlpo` much; `none`, `random` and `survivor`
    at 1 pay nothing. The plan (`--dry-run`) says how much that was on a real log, and each step reports
    `selection/pays_for_length`."""
    keep: Annotated[int, Field(gt=0, le=1024)] = 8
    """Samples trained per prompt (M)."""
    launch: Annotated[int, Field(gt=0, le=2048)] = 10
    """Samples launched per prompt (R): the redundant exploration space."""
    min_keep: Positive | None = None
    """A group in which rewards failed is trained on the samples that it has left, if these are at least so many. Below
    that it is dropped and its prompt is asked again. Unset: half of `keep`, at least 2."""
    shortest: NonNegative = 7
    """`dual_end`, `survivor`: samples kept from the short end (K). Pruning by hazard: see there."""
    longest: NonNegative = 1
    """`dual_end`, `survivor`: samples kept from the long end (L)."""
    order: Literal["tokens", "completion"] = "tokens"
    """`shortest`, `longest`, `dual_end`, `qlpo`: what makes a sample short, few tokens or an early finish."""
    exclude_capped: bool = True
    """`shortest`, `longest`, `dual_end`: samples cut at the length cap are kept only where there are too few others."""
    early_stop: bool = False
    """`shortest`, `dual_end`: stop a group as soon as `keep` samples have finished, and cancel the rest in flight."""
    guard: bool = False
    """Where the finished samples have rewards on both sides of their mean, so have the kept: one is exchanged if need
    be. Changes nothing where all finished samples are kept (`none`, `survivor`, `early_stop`)."""
    qlpo_alpha: Annotated[float, Field(ge=0)] = 1 / 3
    """`qlpo`: 1 / (1 + this) of the right ones are the shortest, as of the wrong ones the longest."""
    weight_power: Fraction = 0.0
    """`survivor`: inverse inclusion probabilities enter the loss to this power (gamma). Below 1 long answers count for
    less than they are: where they are more often wrong, length is paid for. 1 is unbiased, with baseline `history` or
    `leave_one_out` and `learner.loss.normalise_advantage` off: dividing by the group's own deviation costs that."""
    overcommit: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Tail batching: this many times the groups that the staleness window admits are opened. Whichever complete first
    are trained; the others are cancelled when their time is up, and their prompts asked again, then without rivals."""
    redundancy: RedundancyConfig = RedundancyConfig()
    pruning: PruningConfig = PruningConfig()
    baseline: Baseline = "group"
    """What a reward is compared with. `group`: the mean of the kept. `history`: the prompt's pass rate on earlier
    visits, of all that was scored; survivors and spared samples count for those that they stand for. `leave_one_out`:
    the mean of its siblings, those that were cancelled included by their weights."""

    @property
    def smallest_group(self) -> int:
        """The fewest samples that a group is trained on."""
        return self.min_keep or min(self.keep, max(2, (self.keep + 1) // 2))

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.rule == "none" and self.launch != self.keep:
            raise ValueError(
                f"shaping.rule none trains every sample, but launch is {self.launch} and keep is {self.keep}; "
                "set them equal or choose another rule"
            )
        if self.rule in ("dual_end", "survivor") and self.shortest + self.longest != self.keep:
            raise ValueError(
                f"shaping.shortest ({self.shortest}) + shaping.longest ({self.longest}) is "
                f"{self.shortest + self.longest}, but shaping.keep is {self.keep}"
            )
        if self.launch < self.keep:
            raise ValueError(f"shaping.launch ({self.launch}) is below shaping.keep ({self.keep})")
        if self.min_keep is not None and self.min_keep > self.keep:
            raise ValueError(f"shaping.min_keep ({self.min_keep}) is above shaping.keep ({self.keep})")
        if self.rule == "survivor" and self.shortest == 0:
            raise ValueError(
                "shaping.rule survivor draws when the first shaping.shortest samples have finished, but that is 0; "
                "set at least 1, or rule random"
            )
        return self

    @model_validator(mode="after")
    def _redundancy_has_a_use(self) -> Self:
        if self.redundancy.total == "off":
            return self
        if self.rule == "none":
            raise ValueError(
                f"shaping.redundancy.total is {self.redundancy.total!r}, but shaping.rule none launches what it "
                "trains; choose another rule"
            )
        if self.launch > 2 * self.keep:
            raise ValueError(
                f"shaping.launch ({self.launch}) is above twice shaping.keep ({self.keep}), the most that "
                "shaping.redundancy gives to a prompt"
            )
        return self

    @model_validator(mode="after")
    def _pruning_has_a_use(self) -> Self:
        if self.pruning.mode == "off":
            return self
        if self.rule == "none":
            raise ValueError(
                f"shaping.pruning.mode is {self.pruning.mode!r}, but shaping.rule none trains every sample; choose "
                "another rule"
            )
        if self.pruning.mode == "saturation" and self.redundancy.total == "off" and self.launch < 2 * self.keep:
            raise ValueError(
                f"shaping.pruning.mode saturation acts on prompts launched with twice shaping.keep ({self.keep}), but "
                f"shaping.redundancy.total is off and shaping.launch is {self.launch}"
            )
        if self.pruning.mode == "hazard" and self.shortest > self.keep:
            raise ValueError(
                f"shaping.pruning.mode hazard waits until shaping.shortest ({self.shortest}) samples have finished, "
                f"but shaping.keep ({self.keep}) is less"
            )
        if self.pruning.mode == "hazard" and self.rule == "survivor" and self.weight_power > 0:
            raise ValueError(
                "shaping.pruning.mode hazard aborts survivors, whose inclusion probabilities shaping.weight_power "
                f"({self.weight_power}) relies on; set it to 0 or choose another rule"
            )
        if self.pruning.mode == "hazard" and self.baseline == "leave_one_out" and self.pruning.spare_probability > 0:
            raise ValueError(
                "shaping.pruning.mode hazard spares at most one sample of a tail, which weighs for all of it, and "
                "shaping.baseline leave_one_out would compare that one with siblings that weigh likewise: there are "
                "none. Use baseline group or history, or set shaping.pruning.spare_probability to 0 "
                f"(it is {self.pruning.spare_probability:g})"
            )
        return self

    @model_validator(mode="after")
    def _one_sample_has_no_sibling(self) -> Self:
        if self.keep == 1 and self.guard:
            raise ValueError("shaping.guard keeps rewards of both kinds, but shaping.keep is 1; set at least 2")
        if self.keep == 1 and self.baseline == "leave_one_out":
            raise ValueError("shaping.baseline leave_one_out compares siblings, but shaping.keep is 1; set at least 2")
        if self.min_keep == 1 and self.baseline == "leave_one_out":
            raise ValueError(
                "shaping.baseline leave_one_out compares siblings, but shaping.min_keep is 1; set at least 2"
            )
        return self

    @model_validator(mode="after")
    def _baseline_fits_weights(self) -> Self:
        if self.rule != "survivor" or self.weight_power == 0:
            return self
        if self.longest == 0:
            raise ValueError(
                f"shaping.weight_power is {self.weight_power}, but shaping.longest is 0: nothing that could be "
                "weighted stands for the cancelled samples"
            )
        if self.baseline == "group" and self.weight_power == 1:
            raise ValueError(
                "shaping.weight_power 1 is meant to be unbiased, but with shaping.baseline group, the group's own "
                "mean, it is not; use baseline history or leave_one_out, or a power below 1"
            )
        if self.baseline == "leave_one_out" and self.weight_power < 1:
            raise ValueError(
                f"shaping.baseline leave_one_out needs the inclusion probabilities themselves, but "
                f"shaping.weight_power is {self.weight_power}; set 0 or 1"
            )
        if self.baseline == "leave_one_out" and self.longest == 1:
            raise ValueError(
                "shaping.baseline leave_one_out with weight_power 1 needs shaping.longest of at least 2, but it is 1: "
                "a lone survivor has no sibling that could stand for the rest of the tail"
            )
        return self


class StalenessConfig(Section):
    """The bound on off-policyness."""

    max_staleness: NonNegative = 2
    """Hard bound: at the step that consumes a token, current version minus the version that decoded it.
    0 is the synchronous, on-policy mode."""
    cut_after_s: Seconds | None = None
    """A group that alone has kept the learner waiting for this long is cancelled and its prompt asked again. Unset:
    four times as long as the longest of the latest groups took, and at least a minute, so that no answer is cut for
    being long."""
