"""Optimisation."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from darts_async.config.section import NonNegative, Positive, Seconds, Section


class LearnerConfig(Section):
    """Optimisation."""

    steps: Positive = 100
    """Optimiser steps of the run."""
    groups_per_step: Positive = 16
    """Groups in the gradient of one step (B)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak rate of AdamW."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises linearly."""
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    """Decay rates of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio to the behaviour policy is clipped at 1 - clip_low..."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """...and at 1 + clip_high (clip-higher)."""
    truncate_ratio: Annotated[float, Field(gt=1)] = 2.0
    """Cap of the per-token importance weight against the behaviour policy."""
    normalise_advantage: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""
    tokens_per_micro_batch: Positive = 8192
    """Packed tokens in one forward and backward pass."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: Positive = 2
    """Older ones are removed."""
    finish_timeout_s: Seconds = 600.0
    """After the last step, time to write the final checkpoint and the model."""

    @model_validator(mode="after")
    def _clips_below_the_cap(self) -> Self:
        if self.truncate_ratio <= 1 + self.clip_high:
            raise ValueError(
                f"learner.truncate_ratio ({self.truncate_ratio}) caps ratios before they reach 1 + learner.clip_high "
                f"({1 + self.clip_high:g}), so nothing would be clipped from above; raise it"
            )
        return self
