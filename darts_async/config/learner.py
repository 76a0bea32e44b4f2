"""Settings of the learner (trainer): optimiser, batches, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.loss import LossConfig
from darts_async.config.section import Fraction, NonNegative, Positive, Seconds, Section


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): a weight W is trained as W + alpha / rank * B A, where W is frozen."""

    rank: Positive = 16
    """Rows of A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """B A is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = Field((), strict=False)
    """Linear layers that get an adapter, given by the ends of their names. Empty: all but the output head."""


class LearnerScriptConfig(Section):
    """A scripted learner takes the time that accelerators would take, and trains nothing: see `ScriptedObjective`."""

    token_s: Annotated[float, Field(ge=0)] = 0.0
    """Time of the forward and backward pass of one response token, by all ranks together."""
    step_s: Annotated[float, Field(ge=0)] = 0.0
    """Time of an optimiser step."""
    broadcast_s: Annotated[float, Field(ge=0)] = 0.0
    """Delay between the step and the start of the broadcast: the extra time that a large model would take."""


class LearnerConfig(Section):
    """Settings of the learner (trainer)."""

    steps: NonNegative = 100
    """Optimiser steps of the run. With 0 it only evaluates, once, and writes no model."""
    groups_per_step: Positive = 16
    """Groups in the gradient of one step (B)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate from the warm-up to the last step."""
    final_rate_share: Fraction = 0.0
    """`linear`, `cosine`: the learning rate after the last step, as a share of the peak."""
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    """Decay rates of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    max_skipped_steps: Positive = 5
    """A step whose loss or gradient is not finite is skipped. After this many in a row the run fails and saves the last
    batch in the run directory."""
    loss: LossConfig = LossConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model. This needs the extra `lora`, takes less memory, and wants about ten
    times the learning rate. Published and saved weights are merged."""
    tokens_per_micro_batch: Positive = 8192
    """Packed tokens in one forward and backward pass. Small groups that have arrived share a pass."""
    share_prompts: bool = True
    """Compute a prompt once for all of its samples in a pass, instead of once for each sample."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer, and recompute the rest in the backward pass: less memory, more work."""
    compile: bool = False
    """Compile the model's layers with `torch.compile`, for a GPU: faster steps after about a minute of compiling."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints. The last step always writes one. A learner that dies repeats the steps since the last
    checkpoint."""
    keep_checkpoints: Positive = 2
    """Checkpoints to keep. If the newest is damaged, training continues from the one before. For this the shaper keeps
    in memory the groups of all steps since the oldest checkpoint: 12 bytes per trained token, over at most
    `(keep_checkpoints + 1) * checkpoint_every` steps. The first model counts as a checkpoint until there are enough.
    With 1, a run whose checkpoint is damaged continues only if you remove it, and then starts over."""
    finish_timeout_s: Seconds = 600.0
    """Time for all processes to exit after the model is written."""
    stop_timeout_s: Seconds = 60.0
    """Time for the learner to write a checkpoint when a run is stopped early. Without one, a resumed run repeats
    steps."""
    rank_deadline_s: Seconds = 600.0
    """With several ranks, a rank that keeps the others waiting for this long has failed, and the learner with it."""
    script: LearnerScriptConfig | None = None
    """Model the time of absent accelerators, as `generator.script` does, to benchmark everything else."""

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
