"""Optimisation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.loss import LossConfig
from darts_async.config.section import Fraction, NonNegative, Positive, Seconds, Section


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): a weight W is trained as W + alpha / rank * B A, where W is frozen."""

    rank: Positive = 16
    """Rows of A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What B A is multiplied with, times the rank."""
    target_modules: tuple[str, ...] = Field((), strict=False)
    """Linear layers that get an adapter, by the ends of their names; all but the output head if empty."""


class LearnerScriptConfig(Section):
    """A learner that takes the time that accelerators would, and learns nothing: see `learner.scripted`."""

    token_s: Annotated[float, Field(ge=0)] = 0.0
    """Forward and backward pass of one token of a response, by all ranks together."""
    step_s: Annotated[float, Field(ge=0)] = 0.0
    """Optimiser step."""
    broadcast_s: Annotated[float, Field(ge=0)] = 0.0
    """From the step until the weights begin to go out: what broadcasting a large model takes longer."""


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
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes on from there until the last step."""
    final_rate_share: Fraction = 0.0
    """`linear`, `cosine`: the rate behind the last step, as a share of the peak rate."""
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    """Decay rates of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: Positive = 5
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run fails, with the batch of
    the last one saved in the run directory."""
    loss: LossConfig = LossConfig()
    lora: LoraConfig | None = None
    """Train adapters instead of the model, which takes the extra `lora`, less memory, and about ten times the rate. The
    others see none of it: weights are merged when they are published or saved."""
    tokens_per_micro_batch: Positive = 8192
    """Packed tokens in one forward and backward pass; small groups that have come meanwhile go together."""
    share_prompts: bool = True
    """Compute a prompt once for all of its samples in a pass, and not once for each."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and compute it again on the way back: less memory, a third more work."""
    compile: bool = False
    """Compile the model's layers with `torch.compile`, for a GPU: fewer and larger kernels, and less time between them,
    for about a minute of compiling at the first steps."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints; one is always written at the end. A learner that dies takes the steps since the last
    one again."""
    keep_checkpoints: Positive = 2
    """Older checkpoints are removed. If the newest one is damaged, training goes on from the one before. For this the
    shaper keeps the groups of all steps since the oldest one in memory: 12 bytes per trained token, of at most
    `(keep_checkpoints + 1) * checkpoint_every` steps. Until there are so many checkpoints, the first model counts as
    one. With 1, a run whose checkpoint is damaged goes on only if you remove it, and then starts over."""
    finish_timeout_s: Seconds = 600.0
    """After the model is written, time for all processes to leave."""
    stop_timeout_s: Seconds = 60.0
    """When a run is stopped early, time for the learner to write a checkpoint, so that no step is taken again when the
    run is resumed."""
    rank_deadline_s: Seconds = 600.0
    """Several ranks: a rank that keeps the others waiting for this long has failed, and the learner with it."""
    script: LearnerScriptConfig | None = None
    """Stand for accelerators that are not there, as `generator.script` does: benchmarks of everything else."""

    def is_saved(self, policy_version: int) -> bool:
        """Whether a checkpoint of this version is written."""
        return policy_version % self.checkpoint_every == 0 or policy_version == self.steps

    @model_validator(mode="after")
    def _steps_outlast_the_warmup(self) -> Self:
        if self.schedule != "constant" and self.warmup_steps >= self.steps:
            raise ValueError(
                f"learner.schedule {self.schedule} decays from the end of learner.warmup_steps ({self.warmup_steps}) "
                f"to the end of learner.steps ({self.steps}), but nothing lies between them"
            )
        return self
