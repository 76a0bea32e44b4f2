"""How responses are judged."""

from typing import Annotated

from pydantic import Field

from darts_async.config.section import Positive, Seconds, Section, named
from darts_async.extensions import REWARD

Size = Annotated[float, Field(gt=0)]


class RewardLimitsConfig(Section):
    """What each worker may use, with all the processes that a reward function starts; `null` is no limit. A response
    at which a limit is exceeded has no reward."""

    memory_gib: Size | None = 32.0
    """Memory of the worker and its processes together. Measured several times a second."""
    processes: Positive | None = 256
    """Processes at a time, the worker among them. Measured several times a second."""
    file_gib: Size | None = 16.0
    """Size of a single file that is written."""
    output_mib: Size | None = 16.0
    """What may be printed for one item. It goes to the log of the reward process."""


class RewardConfig(Section):
    """How responses are judged."""

    function: Annotated[str, named(REWARD)] = "darts_async.quickstart.task:reward"
    """`math`, `exact_match`, or `module:name`; the default is the quickstart's verifier."""
    workers: Positive = 1
    """Worker processes of each reward process."""
    deadline_s: Seconds = 10.0
    """An item that takes longer is reported as failed and its worker is replaced."""
    start_deadline_s: Seconds = 60.0
    """The same for a new worker: to import the function, and for its first item, at which functions load what they
    need."""
    limits: RewardLimitsConfig = RewardLimitsConfig()
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The run ends with an error when more than this share of the last 200 items failed."""
