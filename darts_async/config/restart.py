"""Settings of restarts: what happens to a process that dies or hangs."""

from typing import Literal, Self

from pydantic import model_validator

from darts_async.config.section import Fraction, NonNegative, Positive, Seconds, Section


class BackoffConfig(Section):
    """Wait before a process is restarted. It doubles with each death in a row."""

    initial_s: Seconds = 0.5
    """Wait after the first death."""
    max_s: Seconds = 30.0
    """Longest wait, before jitter."""
    jitter: Fraction = 0.2
    """Each wait varies at random by up to this share, so that replicas do not restart all at once."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_s < self.initial_s:
            raise ValueError(f"max_s ({self.max_s}) is below initial_s ({self.initial_s})")
        return self


class IntensityConfig(Section):
    """How many deaths of one process are too many."""

    max: Positive = 6
    """Most restarts of one process, or of the learner, within the window. The next death exhausts them."""
    window_s: Seconds = 600.0
    """Length of the window. After a life of this length the back-off starts again at `initial_s`."""


class RestartConfig(Section):
    """What happens to a process that dies or hangs. The ranks of the learner restart together, from the last
    checkpoint. The shaper restarts from its journal. Without the learner or the shaper the run ends."""

    when: Literal["always", "on_failure", "never"] = "always"
    """`on_failure`: a process that leaves with exit code 0 is not restarted."""
    backoff: BackoffConfig = BackoffConfig()
    intensity: IntensityConfig = IntensityConfig()
    on_exhausted: Literal["degrade", "fail_run"] = "degrade"
    """`degrade`: the run continues without the process, unless fewer than `min_healthy` are left."""
    min_healthy: NonNegative = 1
    """The run fails when fewer processes of the role run or may restart."""
    silent_after_s: Seconds = 30.0
    """A process that has not reported for this long hangs: it is killed."""
    stalled_after_s: Seconds = 120.0
    """A generator that holds samples and decodes no token for this long hangs: it is killed."""

    def absence_s(self, start_timeout_s: float) -> float:
        """The longest absence of a process that restarts: every start that the intensity allows, each after the longest
        back-off."""
        return (self.intensity.max + 1) * (self.backoff.max_s * (1 + self.backoff.jitter) + start_timeout_s)
