"""Settings of shaping and staleness: which samples are generated, selected and trained on, and how old they may be."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.section import Fraction, NonNegative, Positive, Seconds, Section, named
from darts_async.extensions import RULE

Baseline = Literal["group", "history", "leave_one_out"]
Split = Literal["uniform", "paper", "shuffled", "reward_aware"]


def _launched(given: Mapping[str, Any]) -> int:
    """How many samples are generated where it is not said. `given`: the settings before it that are valid."""
    keep: int = given.get("keep", 1)
    return keep if given.get("rule") == "none" else -(-keep * 5 // 4)


class RedundancyConfig(Section):
    """How many samples are generated for each prompt, between `shaping.keep` and twice that."""

    total: Literal["off", "fixed", "utility"] = "off"
    """`off`: `shaping.launch` for every prompt. `fixed`: `shaping.launch` on average. `utility`: on average, as many as
    save more time than they cost at the present spread of lengths. Where lengths hardly differ, that is
    `shaping.keep`."""
    split: Split = "paper"
    """How a budget is split. `uniform`: evenly. `paper`: by the spread of the prompt's response lengths. `shuffled`:
    the numbers of `paper`, assigned at random (a placebo). `reward_aware`: by the spread times the expected learning
    signal of the prompt's group."""
    batch: Positive = 32
    """Number of upcoming prompts that share a budget."""
    latency_elasticity: Fraction | None = None
    """`utility`: per cent by which decoding slows when one per cent more samples are decoded; 1 when generators are
    full. Default: measured from the tokens that generators report."""


class PruningConfig(Section):
    """Which running samples are aborted because they are not worth the wait."""

    mode: Literal["off", "saturation", "hazard"] = "off"
    """`saturation`: a prompt with twice `shaping.keep` samples selects only the shortest, and stops when these have
    finished. `hazard`: a sample that is longer than `shaping.shortest` finished siblings is aborted when its expected
    remaining length exceeds `threshold`."""
    threshold: Annotated[float, Field(gt=0)] = 0.25
    """`hazard`: limit of the expected remaining length (tau), in mean response lengths of a typical prompt."""
    spare_probability: Fraction = 0.1
    """`hazard`: share of the aborted tail that runs to its end and is weighted by the inverse of this share (rho)."""


class ShapingConfig(Section):
    """Distribution-aware shaping: which of the generated samples are decoded to the end and selected for training. A
    rule ignores the settings that do not name it, so that arms of an experiment differ in `rule` alone."""

    rule: Annotated[str, named(RULE)] = "none"
    """`none`: plain GRPO; `launch` is `keep`. `random`: `keep` finished samples at random. `shortest`,
    `longest`: the `keep` samples at that end. `dual_end`: the `shortest` shortest and the `longest` longest.
    `survivor`: once `shortest` samples have finished, `longest` of the others are drawn at random and survive. `qlpo`:
    mostly short right samples and mostly long wrong ones. `module:name`: a rule of yours.

    Selection by length also rewards length. Where long answers are more often wrong, `shortest`, and `survivor` with
    `weight_power` below 1, favour long answers; `dual_end` disfavours them a little and `qlpo` a lot. `none`, `random`,
    and `survivor` with 1 do neither. The plan (`--dry-run`) shows the size of the effect on a real log, and each step
    reports it as `selection/pays_for_length`."""
    keep: Annotated[int, Field(gt=0, le=1024)] = 8
    """Samples selected per prompt for training: the group size (M)."""
    launch: Annotated[int, Field(gt=0, le=2048)] = Field(default_factory=_launched)
    """Samples generated per prompt (R), including the redundant ones. Default: `keep` for the rule `none`, a quarter
    more for others."""
    min_keep: Positive | None = None
    """A group in which rewards failed is trained on with its other samples, if at least this many are left. Otherwise
    it is dropped and its prompt is generated again. Default: half of `keep`, at least 2."""
    shortest: NonNegative = 7
    """`dual_end`, `survivor`: samples selected from the short end (K). Pruning by hazard uses it too."""
    longest: NonNegative = 1
    """`dual_end`, `survivor`: samples selected from the long end (L)."""
    order: Literal["tokens", "completion"] = "tokens"
    """`shortest`, `longest`, `dual_end`, `qlpo`: samples are ordered by their tokens, or by when they finished."""
    exclude_capped: bool = True
    """`shortest`, `longest`, `dual_end`: samples cut at the length cap are selected only if others are too few."""
    early_stop: bool = False
    """`shortest`, `dual_end`: stop a group as soon as `keep` samples have finished, and cancel the rest in flight."""
    guard: bool = False
    """Keep a learning signal: if finished samples have rewards on both sides of their mean, selected samples have too.
    One sample is exchanged if necessary. No effect where all finished samples are selected (`none`, `survivor`,
    `early_stop`)."""
    qlpo_alpha: Annotated[float, Field(ge=0)] = 1 / 3
    """`qlpo`: 1 / (1 + this) of the selected right samples are the shortest; of the wrong samples, the longest."""
    weight_power: Fraction = 0.0
    """`survivor`: inverse inclusion probabilities enter the loss to this power (gamma). Below 1 long answers count for
    too little, which favours them where they are more often wrong. 1 is unbiased if `baseline` is `history` or
    `leave_one_out` and `learner.loss.normalise_advantage` is off."""
    overcommit: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Tail batching: open this many times the groups that the staleness window admits. The first to complete are
    trained on. The others are cancelled when they would become stale, and their prompts are generated again, then
    without rivals."""
    redundancy: RedundancyConfig = RedundancyConfig()
    pruning: PruningConfig = PruningConfig()
    baseline: Baseline = "group"
    """What a reward is compared with. `group`: the mean of the selected samples. `history`: the prompt's pass rate on
    earlier visits, over all scored samples, weighted. `leave_one_out`: the weighted mean of the sample's siblings;
    through the weights it includes cancelled siblings."""

    @property
    def smallest_group(self) -> int:
        """The fewest samples with which a group is trained on."""
        return self.min_keep or min(self.keep, max(2, (self.keep + 1) // 2))

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.rule == "none" and self.launch != self.keep:
            raise ValueError(
                f"shaping.rule none trains on every sample, but launch is {self.launch} and keep is {self.keep}; "
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
    def _redundancy_and_pruning_have_a_use(self) -> Self:
        for setting, value in (("redundancy.total", self.redundancy.total), ("pruning.mode", self.pruning.mode)):
            if value != "off" and self.rule == "none":
                raise ValueError(
                    f"shaping.{setting} is {value!r}, but shaping.rule none trains on every sample; choose another rule"
                )
        if self.redundancy.total != "off" and self.launch > 2 * self.keep:
            raise ValueError(
                f"shaping.launch ({self.launch}) is above twice shaping.keep ({self.keep}), the most samples that "
                "shaping.redundancy gives to a prompt; lower it"
            )
        return self

    @model_validator(mode="after")
    def _pruning_fits(self) -> Self:
        if self.pruning.mode == "saturation" and self.redundancy.total == "off" and self.launch < 2 * self.keep:
            raise ValueError(
                f"shaping.pruning.mode saturation acts on prompts with twice shaping.keep ({self.keep}) samples, but "
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
                "shaping.pruning.mode hazard spares at most one sample of a tail, whose weight represents the complete "
                "tail. shaping.baseline leave_one_out would compare it with other samples of the tail, but there are "
                "none. Use baseline group or history, or set shaping.pruning.spare_probability to 0 "
                f"(it is {self.pruning.spare_probability:g})"
            )
        return self

    @model_validator(mode="after")
    def _one_sample_has_no_sibling(self) -> Self:
        if self.keep == 1 and self.guard:
            raise ValueError("shaping.guard keeps rewards of both kinds, but shaping.keep is 1; set at least 2")
        for name in ("keep", "min_keep"):
            if getattr(self, name) == 1 and self.baseline == "leave_one_out":
                raise ValueError(
                    f"shaping.baseline leave_one_out compares siblings, but shaping.{name} is 1; set at least 2"
                )
        return self

    @model_validator(mode="after")
    def _baseline_fits_weights(self) -> Self:
        if self.rule != "survivor" or self.weight_power == 0:
            return self
        if self.longest == 0:
            raise ValueError(
                f"shaping.weight_power is {self.weight_power}, but shaping.longest is 0, so no sample is left that "
                "could be weighted for the cancelled ones; set longest to at least 1"
            )
        if self.baseline == "group" and self.weight_power == 1:
            raise ValueError(
                "shaping.weight_power 1 is meant to be unbiased, but it is biased with shaping.baseline group, the "
                "group's own mean; use baseline history or leave_one_out, or a power below 1"
            )
        if self.baseline == "leave_one_out" and self.weight_power < 1:
            raise ValueError(
                f"shaping.baseline leave_one_out needs the inclusion probabilities themselves, but "
                f"shaping.weight_power is {self.weight_power}; set 0 or 1"
            )
        if self.baseline == "leave_one_out" and self.longest == 1:
            raise ValueError(
                "shaping.baseline leave_one_out with weight_power 1 needs shaping.longest of at least 2, but it is 1: "
                "a lone survivor has no sibling that represents the rest of the tail"
            )
        return self


class StalenessConfig(Section):
    """How off-policy training may be."""

    max_staleness: NonNegative = 2
    """Hard bound on the age of a token when it is trained on: the learner's policy version minus the version that
    decoded the token. 0 is synchronous, on-policy training."""
    cut_after_s: Seconds | None = None
    """A group that alone keeps the learner waiting for this long is cancelled, and its prompt is generated again.
    Default: four times the time that the longest of the latest groups took, and at least a minute, so that no answer is
    cut because it is long."""
