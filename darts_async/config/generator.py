"""The inference engine."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.section import NonNegative, Positive, Section


class ScriptConfig(Section):
    """The scripted engine: how long responses are, and how long a decode step takes."""

    median_tokens: Annotated[float, Field(gt=0)] = 100.0
    """Median response length of the lognormal distribution."""
    prompt_sigma: Annotated[float, Field(ge=0)] = 0.4
    """Standard deviation of the log length between prompts."""
    sample_sigma: Annotated[float, Field(ge=0)] = 0.2
    """Standard deviation of the log length within a prompt."""
    trace_path: str | None = None
    """An .npz file with `lengths` [num_prompts, samples_per_prompt]; replaces the distribution."""
    token_latency_s: Annotated[float, Field(ge=0)] = 0.001
    """Time per decode step with one sample in the batch."""
    batch_for_double_latency: Annotated[float, Field(gt=0)] = 64.0
    """A decode step of b samples takes token_latency_s * (1 + b / this)."""
    update_stall_s: Annotated[float, Field(ge=0)] = 0.0
    """Pause at each weight update."""


class GeneratorConfig(Section):
    """The inference engine."""

    engine: Literal["embedded", "scripted"] = "embedded"
    """`embedded`: continuous batching on CPUs. `scripted`: seeded lengths at a modelled speed, no model."""
    num_slots: Positive = 64
    """Samples decoded at once by one generator."""
    max_queued: NonNegative = 16
    """Samples that may wait in a generator for a slot, so that a freed one is never idle."""
    max_context_tokens: Positive = 1024
    """Prompt and response together."""
    flush_every_steps: Positive = 4
    """Engine steps whose tokens are sent in one message."""
    script: ScriptConfig | None = None
    """Settings of the scripted engine."""

    @model_validator(mode="after")
    def _scripted_has_script(self) -> Self:
        if self.engine == "scripted" and self.script is None:
            raise ValueError("generator.engine is scripted, which needs the section generator.script")
        return self
