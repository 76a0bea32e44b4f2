"""The loss: which surrogate, over which tokens, divided by what.

`kind` fills in every setting that is not given with the value of its paper, so the resolved file shows all numbers. A
setting that the kind does not use is null, and is refused if given. `learner/losses/` has the formulas.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.section import NonNegative, Section, named
from darts_async.extensions import LOSS

Aggregate = Literal["token_mean", "sequence_mean", "constant"]
Importance = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Proximal = Literal["step_start", "interpolated"]

_PRESETS: dict[str, dict[str, Any]] = {
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregate": "token_mean"},
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "sequence_mean"},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "constant", "normalise_advantage": False},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean", "importance": "none"},
    "cispo": {"clip_low": None, "clip_high": 4.0, "aggregate": "token_mean", "importance": "none"},
    "decoupled_ppo": {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "token_mean", "proximal": "interpolated"},
    "reinforce": {"clip_low": None, "clip_high": None, "aggregate": "constant", "normalise_advantage": False},
}
_PRESET_OF_OTHERS = {"clip_low": None, "clip_high": None, "importance": "none"}
_CLIPPED: tuple[str, ...] = ("dapo", "grpo", "dr_grpo")
_IMPORTANCE: dict[str, tuple[Importance, ...]] = {
    **dict.fromkeys(_CLIPPED, ("none", "token_truncate", "token_mask", "sequence_mask")),
    "gspo": ("none", "sequence_mask"),
    "cispo": ("none", "token_mask", "sequence_mask"),
}
"""What may bound the ratio, per kind. Absent kinds accept every value; kinds with a bound accept no second cap."""


class LossConfig(Section):
    """The training loss. Ratios are to the behaviour policy: the log-probabilities that the generator reported."""

    kind: Annotated[str, named(LOSS)] = "dapo"
    """`dapo`, `grpo`, `dr_grpo`: clipped token ratios. `gspo`: clipped sequence ratios. `cispo`: a clipped weight on
    the log-probability. `decoupled_ppo`: clipping against a proximal policy. `reinforce`: the weighted log-probability;
    with `shaping.baseline: leave_one_out` it is RLOO. `module:name`: a loss of yours, which reads the settings that it
    needs."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """Lower clip (epsilon): the ratio is clipped at 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] | None = 0.28
    """Upper clip: the ratio is clipped at 1 + clip_high. A value above clip_low is DAPO's clip-higher. `cispo`: the cap
    of the weight."""
    proximal: Proximal | None = None
    """`decoupled_ppo`: the proximal policy is that at the start of the step, or is interpolated by age from the policy
    one step earlier."""
    importance: Importance = "token_truncate"
    """What bounds the ratio to the behaviour policy. It applies per token, or per sequence (the product over tokens).
    `truncate` caps the ratio at importance_high. `mask` leaves out ratios outside importance_low to importance_high
    (IcePop)."""
    importance_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A mask leaves out smaller ratios."""
    importance_high: Annotated[float, Field(gt=1)] | None = 2.0
    """A truncation caps the ratio here; a mask leaves out larger ratios."""
    aggregate: Aggregate = "token_mean"
    """Divisor of the step's sum. `token_mean`: its tokens. `sequence_mean`: the length of each sample, and the number
    of samples. `constant`: the number of samples times sampling.max_new_tokens."""
    normalise_advantage: bool = True
    """Divide a group's advantages by the standard deviation of its rewards. Groups with rare rewards then count more.
    This biases what `shaping.weight_power: 1` makes unbiased, except with `shaping.baseline: history`, which has a
    deviation of its own."""
    max_token_staleness: NonNegative | None = None
    """Tokens that are more versions old are left out of the loss. Training uses the other tokens of their samples."""
    overlong_filter: bool = False
    """Leave samples that reached sampling.max_new_tokens out of the loss; their rewards stay in the baseline."""
    overlong_buffer_tokens: NonNegative = 0
    """Over this many tokens before sampling.max_new_tokens the reward falls linearly, by up to overlong_penalty."""
    overlong_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Reward that a sample loses when it reaches sampling.max_new_tokens."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from a frozen reference model (beta). With 0 no reference is loaded."""
    kl_unbiased: bool = True
    """Weight each token's divergence by its ratio to the behaviour policy, which makes the gradient unbiased."""
    reference_path: str | None = None
    """The reference model. Default: `model.path`, as it was before training."""
    entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus per token."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_kind(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = _PRESETS.get(str(given.get("kind", "dapo")), _PRESET_OF_OTHERS)
        importance = str(given.get("importance", preset.get("importance", "token_truncate")))
        low, high = (0.5, 5.0) if importance.endswith("mask") else (None, None if importance == "none" else 2.0)
        return {"importance_low": low, "importance_high": high} | preset | given

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Self:
        if self.kind not in LOSS.built_in:
            return self
        self._check_use("kind", "clip_low", used=self.kind not in ("cispo", "reinforce"))
        self._check_use("kind", "clip_high", used=self.kind != "reinforce")
        self._check_use("kind", "proximal", used=self.kind == "decoupled_ppo")
        fitting = _IMPORTANCE.get(self.kind)
        if fitting is not None and self.importance not in fitting:
            raise ValueError(
                f"learner.loss.kind is {self.kind!r}, which cannot be combined with learner.loss.importance "
                f"{self.importance!r}; use one of {', '.join(fitting)}"
            )
        return self

    @model_validator(mode="after")
    def _bounds_fit_the_importance(self) -> Self:
        self._check_use("importance", "importance_low", used=self.importance.endswith("mask"))
        self._check_use("importance", "importance_high", used=self.importance != "none")
        cap, reach = self.importance_high, 1 + (self.clip_high or 0.0)
        if self.kind in _CLIPPED and self.importance == "token_truncate" and (cap or 0.0) <= reach:
            raise ValueError(
                f"learner.loss.importance_high ({cap}) caps ratios before they reach 1 + learner.loss.clip_high "
                f"({reach:g}), so clip_high would have no effect; raise importance_high"
            )
        return self

    @model_validator(mode="after")
    def _references_are_used(self) -> Self:
        if self.reference_path is not None and not self.kl_weight:
            raise ValueError(
                f"learner.loss.reference_path is {self.reference_path!r}, but learner.loss.kl_weight is 0, so it would "
                "never be used; set a weight or remove the path"
            )
        return self

    def _check_use(self, deciding: str, name: str, *, used: bool) -> None:
        value = getattr(self, name)
        if (value is not None) != used:
            raise ValueError(
                f"learner.loss.{deciding} is {getattr(self, deciding)!r}, which {'needs' if used else 'does not use'} "
                f"learner.loss.{name}, but that is {value!r}"
            )
