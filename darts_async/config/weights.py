"""Settings of weight synchronisation: how the learner sends weights to the generators."""

from typing import Annotated, Literal

from pydantic import Field

from darts_async.config.section import Seconds, Section


class WeightsConfig(Section):
    """How the learner sends weights to the generators while they generate."""

    backend: Literal["gloo", "nccl"] = "gloo"
    """Backend of torch.distributed. With gloo, the learner and each generator listen on a free port of their node's
    address. That port has no authentication, and accepts connections only while a group forms."""
    bucket_bytes: Annotated[int, Field(ge=1 << 12)] = 16 << 20
    """Bytes of one broadcast."""
    deadline_s: Seconds = 30.0
    """A member that does not answer a phase of an update within this time is dropped from the epoch."""
    receive: Literal["staged", "direct"] = "staged"
    """`staged`: receive beside the model while decoding continues; decoding pauses only to copy. `direct`: receive into
    the model itself, without a second copy; decoding pauses for the complete update. Only vLLM supports `direct`."""
    torn_limit_s: Seconds = 600.0
    """A generator whose direct update broke half-way decodes nothing and waits this long for a complete update, then
    ends. The launcher ends it sooner if it holds samples and `roles.generator.restart.stalled_after_s` is shorter."""
    probe: bool = True
    """After each update, compare the generator's log-probabilities of a few tokens with the learner's."""
    probe_tolerance_nats: Annotated[float, Field(gt=0)] | None = None
    """A generator that differs by more, in the root mean square over the tokens, is ended. Default by `model.dtype`:
    0.01 for float32, 0.15 for float16, 0.35 for bfloat16."""
    reprefill: bool = False
    """Recompute the KV cache under the new weights, instead of decoding on with the old one. Only vLLM."""
