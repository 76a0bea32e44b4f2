"""How responses are judged."""

from typing import Annotated

from pydantic import Field

from darts_async.config.section import Positive, Seconds, Section


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
