"""The interface of an inference engine: start, cancel, step, take part in weight updates, close.

One task owns an engine and makes every call from the event loop; an engine that computes hands the work of `step` to a
thread of its own, so the loop stays free. Between two steps the owner may start and cancel samples and swap weights in;
samples continue afterwards with the KV cache that they have.

    events = await engine.step()        # decode one token for every running sample, or wait for work
    engine.start(request)               # takes a slot now or queues for one
    engine.cancel(sample_id)            # the slot is free at the next step, whose events acknowledge it
    engine.weight_transfer(...)         # where weights arrive, and how they come into use between two steps
"""

from typing import TYPE_CHECKING, Protocol

from darts_async.config.engines import Capabilities
from darts_async.generator.events import StepEvents
from darts_async.protocol import Generate

if TYPE_CHECKING:  # these need torch, which an engine that models another does not
    from darts_async.config import WeightsConfig
    from darts_async.generator.engine_pause import Hold
    from darts_async.weights.receiving.transfer import Transfer


class Engine(Protocol):
    """An inference engine, made as `NAME(config=RunConfig)`. `EngineError` from any call means that it is dead.

    Example, what its owner does:
        >>> async def decode(engine: Engine, requests: list[Generate]) -> int:
        ...     for request in requests:
        ...         engine.start(request)
        ...     while engine.num_unfinished:
        ...         events = await engine.step()
        ...     return engine.num_tokens_decoded
    """

    @property
    def num_slots(self) -> int:
        """Samples decoded at once."""

    @property
    def max_context_tokens(self) -> int:
        """Prompt and response together."""

    @property
    def num_unfinished(self) -> int:
        """Samples started and not ended, waiting ones included."""

    @property
    def num_tokens_decoded(self) -> int:
        """Tokens ever decoded, those of cancelled samples included."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do. Settings that ask for more are refused when the engine is made."""

    def start(self, request: Generate) -> None:
        """Accept a sample. Ids are unique among unfinished samples."""

    def cancel(self, sample_id: int) -> None:
        """Stop a sample, running or waiting. The events of the next step carry its end. Unknown ids: no-op."""

    async def step(self) -> StepEvents:
        """Decode one token for every running sample; an engine that decodes by itself waits for tokens instead, and
        brings all that have arrived. Returns at once, with nothing, if there is no work."""

    def weight_transfer(self, hold: "Hold", interface: str, config: "WeightsConfig") -> "Transfer":
        """Where weights arrive for this engine. `hold` keeps its owner from making steps, `interface` is the local
        address that the collective's sockets bind to."""

    async def close(self) -> None:
        """Free everything. Idempotent."""
