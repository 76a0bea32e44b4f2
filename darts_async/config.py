"""Every setting of a run: frozen, typed, unknown keys refused; one docstring per field.

A process reads the resolved file that the launcher wrote; nothing else configures it. Bounds that follow from
settings are properties here, with their proof, so that no two places can disagree about them.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True)


class NetworkConfig(Section):
    """Where the processes of a run listen."""

    host: str = "127.0.0.1"
    """Address that every socket binds to. Loopback unless the run spans machines; never a wildcard."""
    base_port: Annotated[int, Field(ge=0, le=65000)] = 0
    """First of a block of ports, one per link. 0 takes free ones."""


class TransportConfig(Section):
    """The reliable links between processes."""

    window: Positive = 256
    """Messages that a receiver lets a peer have outstanding (credit)."""
    max_outbox: Positive = 100_000
    """Messages kept for one peer until acknowledged; more is an error that names the peer."""
    max_message_bytes: Positive = 64 << 20
    """Larger messages are refused on both sides."""
    heartbeat_s: Seconds = 1.0
    """Interval of keep-alives, on the socket and on the link."""
    dead_after_s: Seconds = 10.0
    """A peer that was silent for this long is down."""
    resend_after_s: Seconds = 2.0
    """Unacknowledged messages are sent again after this long without progress."""
    linger_s: Seconds = 2.0
    """How long a closing link waits for its last acknowledgements."""

    @model_validator(mode="after")
    def _silence_outlasts_heartbeats(self) -> Self:
        if self.dead_after_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"dead_after_s ({self.dead_after_s}) must be at least three times heartbeat_s ({self.heartbeat_s})"
            )
        return self


class RoleConfig(Section):
    """How many processes of a role, and what each may use."""

    replicas: Positive = 1
    """Processes of this role."""
    threads: Positive = 1
    """Threads of numerical libraries in each."""
    start_timeout_s: Seconds = 120.0
    """A process that has not reported by then has failed to start."""


class RolesConfig(Section):
    """The processes of a run. There is one shaper and one learner; the others scale out."""

    shaper: RoleConfig = RoleConfig()
    generator: RoleConfig = RoleConfig()
    reward: RoleConfig = RoleConfig()
    learner: RoleConfig = RoleConfig()

    @model_validator(mode="after")
    def _single_roles(self) -> Self:
        for role in ("shaper", "learner"):
            replicas = getattr(self, role).replicas
            if replicas != 1:
                raise ValueError(f"roles.{role}.replicas is {replicas}, but there is exactly one {role}")
        return self


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "quickstart"
    """A local directory in Hugging Face format, a hub id, or `quickstart`: the small model that is shipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in learner and generator."""


class PromptsConfig(Section):
    """Where prompts come from. Training and held-out prompts never overlap."""

    source: Literal["chain", "jsonl", "parquet"] = "chain"
    """`chain`: the quickstart's arithmetic, made by code. Otherwise a file of records."""
    path: str | None = None
    """File of training records (jsonl, parquet)."""
    held_out_path: str | None = None
    """File of held-out records; without it `held_out` records are taken off the training file."""
    prompt_field: str = "prompt"
    """Field that holds the prompt: a text, or a list of {role, content} messages."""
    answer_field: str = "answer"
    """Field that holds the reference answer."""
    chat_template: bool = True
    """Render the prompt with the tokenizer's chat template, if it has one."""
    system_prompt: str | None = None
    """Put in front as a system message when the chat template is used."""
    num_train: Positive | None = None
    """Training prompts: how many the task makes (`chain`), or how many records are taken at most."""
    held_out: Positive = 128
    """Held-out prompts, fixed by the seed."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are refused when the data set is loaded."""
    on_too_long: Literal["error", "skip"] = "error"
    """What to do with a prompt longer than `max_prompt_tokens`."""

    @model_validator(mode="after")
    def _files_have_paths(self) -> Self:
        if self.source != "chain" and self.path is None:
            raise ValueError(f"prompts.source is {self.source!r}, which needs prompts.path")
        return self


class SamplingConfig(Section):
    """How tokens are drawn during training and evaluation.

    Behaviour log-probabilities are those of the truncated distribution, the learner's those of the whole one: with
    `top_p` or `top_k` the importance weight of a fresh token is the share of probability that truncation kept.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits. The learner uses the same value."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; 1 switches it off."""
    top_k: NonNegative = 0
    """Only the k likeliest tokens; 0 switches it off."""
    max_new_tokens: Positive = 256
    """Cap on the response length."""


Baseline = Literal["group", "history", "leave_one_out"]


class RedundancyConfig(Section):
    """How many samples each prompt is launched with, between `shaping.keep` and twice that."""

    total: Literal["off", "fixed", "utility"] = "off"
    """`off`: `shaping.launch` for every prompt. `fixed`: `shaping.launch` on average. `utility`: on average as many as
    pay for themselves at the present spread of lengths; none beyond `shaping.keep` where lengths hardly differ."""
    split: Literal["uniform", "paper", "shuffled", "reward_aware"] = "paper"
    """Who gets them. `uniform`: all alike. `paper`: by the spread of the prompt's lengths. `shuffled`: the same numbers
    handed out by lot, a placebo. `reward_aware`: by spread times what a group of the prompt is expected to teach."""
    window: Positive = 128
    """Latest prompts over which the split is solved."""
    latency_elasticity: Fraction = 1.0
    """`utility`: by how many per cent a decode step slows when the batch grows by one; 1 where generators are full."""


class PruningConfig(Section):
    """Which running samples are aborted because waiting for them does not pay."""

    mode: Literal["off", "saturation", "hazard"] = "off"
    """`saturation`: prompts launched with twice `shaping.keep` keep only the shortest, and stop when these have
    finished. `hazard`: a sample is aborted when its expected remaining length exceeds `threshold_tokens`, once
    `shaping.shortest` siblings have finished."""
    threshold_tokens: Annotated[float, Field(gt=0)] = 100.0
    """`hazard`: tokens that a sample may still be expected to need (tau)."""
    spare_probability: Fraction = 0.1
    """`hazard`: share of the aborted tail that is let run and weighed by the inverse (rho)."""


class ShapingConfig(Section):
    """Distribution-aware shaping: which of the launched samples are decoded to the end, and which are trained.

    A setting that the rule does not name is not read, so that arms of an experiment differ in `rule` alone.
    """

    rule: Literal["none", "random", "shortest", "longest", "dual_end", "survivor", "qlpo"] = "dual_end"
    """`none`: plain GRPO, `launch` must equal `keep`. `random`: `keep` of the finished by lot. `shortest`, `longest`:
    that end alone. `dual_end`: the `shortest` shortest and the `longest` longest. `survivor`: once `shortest` have
    finished, `longest` of the others survive a uniform draw. `qlpo`: mostly short right and mostly long wrong ones."""
    keep: Annotated[int, Field(gt=0, le=1024)] = 8
    """Samples trained per prompt (M)."""
    launch: Annotated[int, Field(gt=0, le=2048)] = 10
    """Samples launched per prompt (R): the redundant exploration space."""
    shortest: NonNegative = 7
    """`dual_end`, `survivor`: samples kept from the short end (K)."""
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
    """`survivor`: inverse inclusion probabilities enter the loss to this power (gamma). 1 is unbiased."""
    overcommit: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Tail batching: this many times the groups that the staleness window admits are opened. Whichever complete first
    are trained; the others are cancelled when their time is up, and their prompts asked again, then without rivals."""
    redundancy: RedundancyConfig = RedundancyConfig()
    pruning: PruningConfig = PruningConfig()
    baseline: Baseline = "group"
    """What a reward is compared with. `group`: the mean of the kept. `history`: the prompt's pass rate on earlier
    visits. `leave_one_out`: the mean of its siblings, those that were cancelled included by their weights."""

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
        if self.pruning.mode == "hazard" and self.rule == "survivor" and self.weight_power > 0:
            raise ValueError(
                "shaping.pruning.mode hazard aborts survivors, whose inclusion probabilities shaping.weight_power "
                f"({self.weight_power}) relies on; set it to 0 or choose another rule"
            )
        return self

    @model_validator(mode="after")
    def _one_sample_has_no_sibling(self) -> Self:
        if self.keep == 1 and self.guard:
            raise ValueError("shaping.guard keeps rewards of both kinds, but shaping.keep is 1; set at least 2")
        if self.keep == 1 and self.baseline == "leave_one_out":
            raise ValueError("shaping.baseline leave_one_out compares siblings, but shaping.keep is 1; set at least 2")
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
    cut_after_s: Seconds = 60.0
    """A group that alone has kept the learner waiting for this long is cancelled and its prompt asked again."""


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
    script: "ScriptConfig | None" = None
    """Settings of the scripted engine."""

    @model_validator(mode="after")
    def _scripted_has_script(self) -> Self:
        if self.engine == "scripted" and self.script is None:
            raise ValueError("generator.engine is scripted, which needs the section generator.script")
        return self


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


class RewardConfig(Section):
    """How responses are judged."""

    function: str = "chain"
    """`chain` (the quickstart's verifier), `math`, `exact_match`, or `module:function`."""
    workers: Positive = 1
    """Worker processes of each reward process."""
    deadline_s: Seconds = 10.0
    """An item that takes longer is reported as failed and its worker is replaced."""
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The run ends with an error when more than this share of the last 200 items failed."""


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


class WeightsConfig(Section):
    """Weights from the learner to the generators while generation goes on."""

    backend: Literal["gloo", "nccl"] = "gloo"
    """Backend of torch.distributed."""
    bucket_bytes: Annotated[int, Field(ge=1 << 12)] = 16 << 20
    """Bytes of one broadcast."""
    deadline_s: Seconds = 30.0
    """A member that has not answered a phase of an update by then is dropped from the epoch."""


class EvaluationConfig(Section):
    """Fresh, un-aborted samples of the held-out prompts, before the first and after the last step."""

    samples_per_prompt: Annotated[int, Field(ge=0, le=1024)] = 4
    """Samples of each held-out prompt. 0 switches the evaluation off."""


class TelemetryConfig(Section):
    """What is reported, how often."""

    status_every_s: Seconds = 0.5
    """Interval of the status of each process."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """Level of the logs in the run directory."""
    no_progress_timeout_s: Seconds = 1800.0
    """A run without a step or an evaluation for this long has failed, however alive its processes look."""


class RunConfig(Section):
    """One YAML file: the cluster and the run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Part of the run directory's name."""
    seed: NonNegative = 0
    """Seeds prompts, sampling and selection."""
    runs_dir: str = "runs"
    """A directory `NAME-TIME` is made in it."""
    network: NetworkConfig = NetworkConfig()
    transport: TransportConfig = TransportConfig()
    roles: RolesConfig = RolesConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    sampling: SamplingConfig = SamplingConfig()
    shaping: ShapingConfig = ShapingConfig()
    staleness: StalenessConfig = StalenessConfig()
    generator: GeneratorConfig = GeneratorConfig()
    reward: RewardConfig = RewardConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _context_holds_a_sample(self) -> Self:
        need = self.prompts.max_prompt_tokens + self.sampling.max_new_tokens
        if need > self.generator.max_context_tokens:
            raise ValueError(
                f"prompts.max_prompt_tokens ({self.prompts.max_prompt_tokens}) + sampling.max_new_tokens "
                f"({self.sampling.max_new_tokens}) is {need}, but generator.max_context_tokens is "
                f"{self.generator.max_context_tokens}"
            )
        return self

    @property
    def max_open_groups(self) -> int:
        """Groups admitted and not yet in a taken step, at most: `B * (max_staleness + 1)`.

        Proof: group number n (counted without dropped ones) is admitted only while
        `n < B * (v + max_staleness + 1)`, where v is the lowest version of a routable generator, and v is at
        most the number of steps taken, whose groups are `B * v`.
        """
        return self.learner.groups_per_step * (self.staleness.max_staleness + 1)
