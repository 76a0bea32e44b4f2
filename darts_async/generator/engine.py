"""The interface of an inference engine: start, cancel, step, take part in weight updates, close.

One task owns an engine and makes every call from the event loop. An engine that computes does so in a thread of its
own. Between two steps the owner may start and cancel samples and put weights in use. Running samples continue with the
KV cache that they have.

    events = await engine.step()        # decode one token for every running sample, or wait for work
    engine.start(request)               # takes a slot now or queues for one
    engine.cancel(sample_id)            # the slot is free at the next step, whose events acknowledge it
    engine.weight_transfer(...)         # where weights arrive, and how they come into use between two steps
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from darts_async.config.engines import Capabilities
from darts_async.protocol import FinishReason, Generate, GeneratorToShaper, ProbeMeasured

if TYPE_CHECKING:  # these need torch, which an engine that models another does not
    from darts_async.config import WeightsConfig
    from darts_async.weights.receiving.transfer import Transfer

Outbox = list[GeneratorToShaper | ProbeMeasured]
"""What is to be sent, in order: measurements go to the learner, all other messages to the shaper."""


@dataclass(frozen=True, slots=True)
class SampleEnd:
    """A sample left the engine; `num_tokens` counts its whole response, prefix included."""

    sample_id: int
    num_tokens: int
    finish_reason: FinishReason | None
    """None: it was cancelled."""


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What one step brought: tokens in flat arrays, and the samples that ended. An engine that decodes by itself may
    bring several tokens of a sample, in order. The last one of a sample that stops is the end-of-sequence token."""

    sample_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [num_decoded]
    token_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # [num_decoded]
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # [num_decoded]
    ended: tuple[SampleEnd, ...] = ()
    rejected: tuple[tuple[int, str], ...] = ()
    """Samples that cannot be decoded, with the reason."""


class Pause:
    """A pause of the owner of an engine between two steps, in which another task puts weights in use.

        async with hold() as pause:           # waits for the boundary; tokens decoded so far are on their way
            ...                               # only you call the engine
            pause.policy_version = version    # of the next tokens
        pause.stall_s                         # how long it was

    `deliver` sends what was decoded before it, which is still of the old version. After an `EngineError` in the body
    the owner makes no other step.
    """

    def __init__(self, deliver: Callable[[StepEvents], None]) -> None:
        self.deliver = deliver
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        self.policy_version: int | None = None
        self.stall_s = 0.0


Hold = Callable[[], AbstractAsyncContextManager[Pause]]


class Engine(Protocol):
    """An inference engine, made as `NAME(config=RunConfig)`. `EngineError` from any call means that it is dead.

    Example: what its owner does.
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
        """Decode one token for every running sample, or wait until an engine that decodes by itself has some. Returns
        at once, with nothing, if there is no work."""

    def weight_transfer(self, hold: Hold, interface: str, config: "WeightsConfig") -> "Transfer":
        """Where weights arrive. `hold` pauses the owner, `interface` is the local address for the collective's
        sockets."""

    async def close(self) -> None:
        """Free everything. Idempotent."""
