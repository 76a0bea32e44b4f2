"""What becomes of a process that dies or hangs."""

from typing import Literal, Self

from pydantic import model_validator

from darts_async.config.section import Fraction, NonNegative, Positive, Seconds, Section


class BackoffConfig(Section):
    """How long to wait before a process is started again: doubled with each death in a row."""

    initial_s: Seconds = 0.5
    """After the first death."""
    max_s: Seconds = 30.0
    """At most, before jitter."""
    jitter: Fraction = 0.2
    """Each wait is drawn within this share around its value, so that replicas do not come back in step."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_s < self.initial_s:
            raise ValueError(f"max_s ({self.max_s}) is below initial_s ({self.initial_s})")
        return self


class IntensityConfig(Section):
    """How many deaths of one process are too many."""

    max: Positive = 6
    """Restarts of one process, or of the learner, within the window. One more death exhausts it."""
    window_s: Seconds = 600.0
    """Length of the window; a process that lived that long starts over with the first back-off."""


class RestartConfig(Section):
    """What becomes of a process that dies or hangs. The ranks of the learner come back together, from the last
    checkpoint, and the shaper from its journal; without the learner or the shaper the run ends."""

    when: Literal["always", "on_failure", "never"] = "always"
    """`on_failure`: one that leaves with exit code 0 is not started again."""
    backoff: BackoffConfig = BackoffConfig()
    intensity: IntensityConfig = IntensityConfig()
    on_exhausted: Literal["degrade", "fail_run"] = "degrade"
    """`degrade`: the run goes on without the process, above `min_healthy`."""
    min_healthy: NonNegative = 1
    """With fewer processes of the role that run or may come back, the run has failed."""
    silent_after_s: Seconds = 30.0
    """A process that has not reported for this long hangs: it is killed."""
    stalled_after_s: Seconds = 120.0
    """A generator that holds samples and decodes no token for this long hangs: it is killed."""

    def absence_s(self, start_timeout_s: float) -> float:
        """A process that is to come back is away no longer than this: every start that the intensity allows, each with
        the longest back-off before it."""
        return (self.intensity.max + 1) * (self.backoff.max_s * (1 + self.backoff.jitter) + start_timeout_s)
