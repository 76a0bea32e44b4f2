"""Weights from the learner to the generators."""

from typing import Annotated, Literal

from pydantic import Field

from darts_async.config.section import Seconds, Section


class WeightsConfig(Section):
    """Weights from the learner to the generators while generation goes on."""

    backend: Literal["gloo", "nccl"] = "gloo"
    """Backend of torch.distributed. With gloo, the learner and each generator listen for one another on a port of their
    node's address that the system chooses. It has no authentication, and takes connections only while a group forms."""
    bucket_bytes: Annotated[int, Field(ge=1 << 12)] = 16 << 20
    """Bytes of one broadcast."""
    deadline_s: Seconds = 30.0
    """A member that has not answered a phase of an update by then is dropped from the epoch."""
    receive: Literal["staged", "direct"] = "staged"
    """`staged`: into memory beside the model, while decoding goes on; it is held for a copy. `direct`: into the model
    itself, without a second copy of it; decoding is held for the whole update. Only vLLM can do the latter."""
    torn_limit_s: Seconds = 600.0
    """A generator whose direct update broke half-way waits so long for a whole one, decoding nothing; then it ends. The
    launcher ends it sooner where `roles.generator.restart.stalled_after_s` is shorter and it holds samples."""
    probe: bool = True
    """After each update compare a generator's log-probabilities of a few tokens with the learner's."""
    probe_tolerance_nats: Annotated[float, Field(gt=0)] | None = None
    """A generator that is further off is ended. Without it: by `model.dtype`, 0.02 for float32, 0.2 for float16, 0.5
    for bfloat16."""
    reprefill: bool = False
    """Compute keys and values anew under the new weights, instead of decoding on with those there are. Only vLLM."""
