"""What is measured and reported."""

from typing import Annotated, Literal

from pydantic import Field

from darts_async.config.section import Seconds, Section


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
