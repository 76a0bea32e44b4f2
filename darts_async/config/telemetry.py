"""Settings of evaluation, logs, traces and timeouts of the run."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from darts_async.config.prompts import EvaluationSetConfig
from darts_async.config.section import NonNegative, Seconds, Section, named
from darts_async.extensions import SINK

Name = Annotated[str, Field(min_length=1)]


class EvaluationConfig(Section):
    """Evaluation on held-out prompts. Nothing else runs during the evaluations before the first and after the last
    step. Training continues during those in between."""

    samples_per_prompt: Annotated[int, Field(ge=0, le=1024)] = 4
    """Samples of each held-out prompt. 0 switches the evaluation off."""
    every_steps: NonNegative = 0
    """Policy versions between evaluations. One that is due while another is running is skipped and counted. 0: only
    before the first and after the last step."""
    max_slot_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Largest share of the generators' slots that an evaluation uses during training; the samples of one prompt may
    always run. A larger share ends an evaluation sooner, so that fewer policy versions contribute to it."""

    sets: tuple[EvaluationSetConfig, ...] = Field((), strict=False, max_length=64)
    """Further sets of prompts to evaluate on, beside those that `prompts` holds out. Each has a `name`, under which its
    numbers are in the metrics, and the settings of `prompts` that say where records come from."""
    pass_above: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    """A sample passes, for pass@k, if its reward is above this."""

    @model_validator(mode="after")
    def _something_is_evaluated(self) -> Self:
        if self.every_steps and not self.samples_per_prompt:
            raise ValueError(
                f"evaluation.every_steps is {self.every_steps}, but evaluation.samples_per_prompt is 0, so nothing is "
                "evaluated; raise the second or remove the first"
            )
        return self


class WandbConfig(Section):
    """Weights & Biases, the sink `wandb` (extra `wandb`)."""

    project: Name | None = None
    """Left out: the variable WANDB_PROJECT, or `darts-async`."""
    entity: Name | None = None
    """User or team. Left out: the variable WANDB_ENTITY, or your own default."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes a directory that `wandb sync` uploads later. Left out: the variable WANDB_MODE, or online."""


class TensorBoardConfig(Section):
    """TensorBoard, the sink `tensorboard` (extra `tensorboard`)."""

    path: Name | None = None
    """Directory in which each run has one of its own. Left out: `tensorboard/` in the run directory, which
    `tensorboard --logdir runs` finds too."""


class TrackioConfig(Section):
    """trackio, the sink `trackio` (extra `trackio`)."""

    project: Name = "darts-async"
    """Project, which is a database of this machine. The variable TRACKIO_DIR says where they are."""


class MlflowConfig(Section):
    """MLflow, the sink `mlflow` (extra `mlflow`)."""

    tracking_uri: Name | None = None
    """Address of the server, or `sqlite:///FILE`. Left out: the variable MLFLOW_TRACKING_URI, or MLflow's default."""
    experiment: Name | None = None
    """Left out: the variable MLFLOW_EXPERIMENT_NAME, or `darts-async`."""


class TelemetryConfig(Section):
    """What is reported, and when a run without progress fails."""

    status_every_s: Seconds = 0.5
    """Interval at which each process reports its status."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """Level of the logs in the run directory."""
    no_progress_timeout_s: Seconds = 1800.0
    """A run without a step or an evaluation for this long has failed, even if its processes seem alive."""
    no_space_timeout_s: Seconds = 86400.0
    """A run that waits for this long for space on a full disk has failed. Until then it continues as soon as there is
    space, and processes that wait for it do not count as dead."""
    log_max_mb: Annotated[float, Field(ge=0.1)] = 64.0
    """Largest log of each process, in MB, and largest file of what it prints. The oldest half is removed first."""
    sample_groups: Annotated[int, Field(ge=0, le=1 << 20)] = 4
    """Groups of each step whose samples are kept in `samples/` of the run directory, with text, log-probabilities and
    versions, beside those of every evaluation. The groups are chosen by their number alone, so each step has about so
    many, as long as any. 0 keeps none."""
    samples_max_mb: Annotated[float, Field(ge=0.1)] = 256.0
    """Largest size of `samples/`, in MB. The oldest training steps are removed first, and then the oldest evaluations.
    """
    sinks: tuple[Annotated[str, named(SINK)], ...] = Field((), strict=False)
    """Where metrics go beside `metrics.jsonl`: `wandb`, `tensorboard`, `trackio`, `mlflow`, or your own `module:name`.
    Each gets every line from a process of its own, so a sink never fails or delays a run."""
    wandb: WandbConfig = WandbConfig()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    trackio: TrackioConfig = TrackioConfig()
    mlflow: MlflowConfig = MlflowConfig()
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of 127.0.0.1 at which the launcher serves the newest metrics for Prometheus, at `/metrics`. 0: none."""
    trace: bool = True
    """Whether each process records what it does and when, for `darts-launch trace`. The cost is negligible."""
    trace_samples: bool = True
    """Whether traces show the way of each sample: from the shaper to a generator, to its reward and back. This adds
    about 100 bytes per sample to the shaper's trace."""
    trace_max_mb: Annotated[float, Field(ge=0.1)] = 32.0
    """Largest trace of each start of a process, in MB. The oldest half is removed first."""

    @field_validator("sinks")
    @classmethod
    def _each_once(cls, sinks: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({name for name in sinks if sinks.count(name) > 1})
        if repeated:
            raise ValueError(f"telemetry.sinks names {repeated[0]!r} {sinks.count(repeated[0])} times; name it once")
        return sinks
