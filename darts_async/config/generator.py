"""The inference engine."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from darts_async.config.engines import Capabilities, capabilities_of
from darts_async.config.section import NonNegative, Positive, Seconds, Section, named
from darts_async.extensions import ENGINE


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


class VllmConfig(Section):
    """The engine vLLM."""

    tensor_parallel_size: Positive = 1
    """GPUs that one generator spreads its model over."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of each GPU's memory for weights, activations and keys and values. CPUs ignore it."""
    kv_cache_bytes: Positive | None = None
    """Memory for keys and values on each GPU, or on the CPU. Without it: what `gpu_memory_utilization` leaves; on CPUs
    what the slots need."""
    kv_tokens_per_sample: Positive | None = None
    """Tokens to expect of prompt and response: so many slots are offered as fit into the memory for keys and values,
    `num_slots` at most. Without it `max_context_tokens`: nothing is ever computed twice. A smaller number lets more
    samples decode at once where few are long; when they do not fit, vLLM takes some out and computes them again."""
    block_size: Positive | None = None
    """Tokens in a block of keys and values; only whole blocks of a prompt are shared within a group. Without it vLLM's
    own: 16 on GPUs, 128 on CPUs."""
    max_num_batched_tokens: Positive | None = None
    """Prompt and response tokens in one step, at most: `num_slots` or more. Without it vLLM's own; on CPUs 4096, and
    never less than `max_context_tokens`."""
    enforce_eager: bool = False
    """Do without compiled kernels and CUDA graphs: starts sooner, decodes slower. On CPUs always so."""
    start_deadline_s: Seconds = 600.0
    """A start that takes longer has failed."""
    step_deadline_s: Seconds = 120.0
    """An engine that brings no token and answers no call for so long is taken for dead."""


class GeneratorConfig(Section):
    """The inference engine."""

    engine: Annotated[str, named(ENGINE)] = "embedded"
    """`embedded`: continuous batching on CPUs. `vllm`: vLLM on GPUs or CPUs. `scripted`: seeded lengths at a modelled
    speed, no model. `module:name`: an engine of yours."""
    num_slots: Positive = 64
    """Samples decoded at once by one generator."""
    max_queued: NonNegative = 16
    """Samples that may wait in a generator for a slot, so that a freed one is never idle."""
    max_context_tokens: Positive = 1024
    """Prompt and response together."""
    flush_every_steps: Positive = 4
    """Engine steps whose tokens are sent in one message."""
    vllm: VllmConfig = VllmConfig()
    script: ScriptConfig | None = None
    """Settings of the scripted engine."""

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do."""
        return capabilities_of(self.engine)

    @model_validator(mode="after")
    def _scripted_has_script(self) -> Self:
        if not self.capabilities.has_model and self.script is None:
            raise ValueError(f"generator.engine is {self.engine}, which needs the section generator.script")
        return self

    @model_validator(mode="after")
    def _step_holds_every_slot(self) -> Self:
        limit = self.vllm.max_num_batched_tokens
        if self.capabilities.has_workers and limit is not None and limit < self.num_slots:
            raise ValueError(
                f"generator.vllm.max_num_batched_tokens is {limit}, but a step brings a token for each of "
                f"generator.num_slots {self.num_slots}: leave it out, or give {self.num_slots} or more"
            )
        return self
