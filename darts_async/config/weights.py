"""Weights from the learner to the generators."""

from typing import Annotated, Literal

from pydantic import Field

from darts_async.config.section import Seconds, Section


class WeightsConfig(Section):
    """Weights from the learner to the generators while generation goes on."""

    backend: Literal["gloo", "nccl"] = "gloo"
    """Backend of torch.distributed."""
    bucket_bytes: Annotated[int, Field(ge=1 << 12)] = 16 << 20
    """Bytes of one broadcast."""
    deadline_s: Seconds = 30.0
    """A member that has not answered a phase of an update by then is dropped from the epoch."""
