"""What is measured and reported."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from darts_async.config.section import NonNegative, Seconds, Section, named
from darts_async.extensions import SINK


class EvaluationConfig(Section):
    """Fresh, un-aborted samples of the held-out prompts: before the first and after the last step, with nothing beside
    them, and in between while training goes on."""

    samples_per_prompt: Annotated[int, Field(ge=0, le=1024)] = 4
    """Samples of each held-out prompt. 0 switches the evaluation off."""
    every_steps: NonNegative = 0
    """An evaluation is due when every so-many-th version is published; one that is due while another is under way is
    skipped, and counted. 0: only before the first and after the last step."""
    max_slot_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the generators' slots that held-out samples take while training goes on, at most; but always those of
    one prompt. Inside a generator they queue as any other sample. A larger share ends an evaluation sooner, so that its
    tokens are of fewer versions."""

    @model_validator(mode="after")
    def _something_is_evaluated(self) -> Self:
        if self.every_steps and not self.samples_per_prompt:
            raise ValueError(
                f"evaluation.every_steps is {self.every_steps}, but evaluation.samples_per_prompt is 0, so nothing is "
                "evaluated; raise the second or remove the first"
            )
        return self


class TelemetryConfig(Section):
    """What is reported, how often."""

    status_every_s: Seconds = 0.5
    """Interval of the status of each process."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """Level of the logs in the run directory."""
    no_progress_timeout_s: Seconds = 1800.0
    """A run without a step or an evaluation for this long has failed, however alive its processes look."""
    no_space_timeout_s: Seconds = 86400.0
    """A run that waits for room on a full disk for this long has failed. Until then it goes on by itself as soon as
    there is room; what waits for that does not count as deaths."""
    log_max_mb: Annotated[float, Field(ge=0.1)] = 64.0
    """Largest log of each process, in MB, and as much of what it prints; the oldest half goes first."""
    sinks: tuple[Annotated[str, named(SINK)], ...] = Field((), strict=False)
    """Where else metrics go, each a `module:name`: called with every line that is written to `metrics.jsonl`."""
    trace: bool = True
    """Whether each process writes down what it did and when, for `darts-launch trace`; what that costs does not
    show."""
    trace_samples: bool = True
    """Whether traces tell of each sample where it was and when: arrows from the shaper to a generator, its reward and
    back. About 100 bytes of the shaper's trace per sample, by which its bound is reached sooner."""
    trace_max_mb: Annotated[float, Field(ge=0.1)] = 32.0
    """Largest trace of each start of a process, in MB; the oldest half goes first."""
