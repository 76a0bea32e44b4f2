"""Settings of the generators (inference workers) and their engines."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from darts_async.config.engines import BuiltIn, capabilities_of
from darts_async.config.section import NonNegative, Positive, Seconds, Section, named
from darts_async.extensions import ENGINE


class ScriptConfig(Section):
    """The scripted engine draws response lengths and models the time of a decode step; it has no model."""

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
    """Batch size that doubles the time of a step: b samples take token_latency_s * (1 + b / this)."""
    update_stall_s: Annotated[float, Field(ge=0)] = 0.0
    """Pause at each weight update."""


class VllmConfig(Section):
    """Settings of the vLLM engine."""

    tensor_parallel_size: Positive = 1
    """GPUs over which one generator shards its model."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of each GPU's memory for weights, activations and the KV cache. Ignored on CPUs."""
    kv_cache_bytes: Positive | None = None
    """Memory of the KV cache on each GPU, or on the CPU. Default: what `gpu_memory_utilization` leaves; on CPUs, what
    the slots need."""
    kv_tokens_per_sample: Positive | None = None
    """Expected tokens of a prompt and its response. The number of slots is what then fits into the KV cache, and at
    most `num_slots`. Default: `max_context_tokens`, with which vLLM never preempts a sample. A smaller number decodes
    more samples at once; vLLM preempts and recomputes some when they do not fit."""
    block_size: Positive | None = None
    """Tokens in a block of the KV cache. A group shares only complete blocks of its prompt. Default: that of vLLM, 16
    on GPUs and 128 on CPUs."""
    max_num_batched_tokens: Positive | None = None
    """Most prompt and response tokens in one step; at least `num_slots`. Default: that of vLLM; on CPUs 4096, or
    `max_context_tokens` if that is more."""
    enforce_eager: bool = False
    """Use neither compiled kernels nor CUDA graphs: the engine starts sooner and decodes slower. Always so on CPUs."""
    start_deadline_s: Seconds = 600.0
    """A start that takes longer has failed."""
    step_deadline_s: Seconds = 120.0
    """An engine that yields no token and answers no call for this long counts as dead."""


class GeneratorConfig(Section):
    """Settings of the generators (inference workers)."""

    engine: Annotated[str, named(ENGINE)] = "embedded"
    """`embedded`: continuous batching on CPUs. `vllm`: vLLM on GPUs or CPUs. `scripted`: no model, but seeded lengths
    at a modelled speed. `module:name`: an engine of yours."""
    num_slots: Positive = 64
    """Samples that one generator decodes at once."""
    max_queued: NonNegative = 16
    """Samples that may wait in a generator for a slot, so that a freed slot is never idle."""
    max_context_tokens: Positive = 1024
    """Most tokens of a prompt and its response together."""
    flush_every_steps: Positive = 4
    """Engine steps whose tokens are sent in one message."""
    vllm: VllmConfig = VllmConfig()
    script: ScriptConfig | None = None
    """Settings of the scripted engine."""

    @property
    def capabilities(self) -> BuiltIn:
        """What the engine can do, as far as it is known without an import."""
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
                f"generator.vllm.max_num_batched_tokens is {limit}, but a step decodes one token for each of the "
                f"{self.num_slots} generator.num_slots: leave it out, or set at least {self.num_slots}"
            )
        return self
