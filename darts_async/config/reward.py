"""Settings of the reward: how responses are scored."""

from typing import Annotated

from pydantic import Field

from darts_async.config.section import Positive, Seconds, Section, named
from darts_async.extensions import REWARD

Size = Annotated[float, Field(gt=0)]


class RewardLimitsConfig(Section):
    """What each worker may use, together with all processes that the reward function starts. `null` means no limit. A
    response that exceeds a limit has no reward."""

    memory_gib: Size | None = 32.0
    """Memory of the worker and its processes together. Measured several times a second."""
    processes: Positive | None = 256
    """Number of processes at a time, including the worker. Measured several times a second."""
    file_gib: Size | None = 16.0
    """Size of each file that is written."""
    output_mib: Size | None = 16.0
    """Size of what is printed for one item. It goes to the log of the reward process."""


class RewardConfig(Section):
    """How responses are scored."""

    function: Annotated[str, Field(max_length=1_000), named(REWARD)] = "darts_async.quickstart.task:reward"
    """`math`, `exact_match`, or `module:name`; the default is the quickstart's verifier."""
    workers: Positive = 1
    """Worker processes of each reward process."""
    deadline_s: Seconds = 10.0
    """An item that takes longer has failed, and its worker is replaced."""
    start_deadline_s: Seconds = 60.0
    """The same limit for a new worker: for the import of the function, and for the first item, at which many functions
    load what they need."""
    limits: RewardLimitsConfig = RewardLimitsConfig()
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The run fails when more than this share of the last 200 items failed."""
