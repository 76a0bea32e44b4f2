"""The interface of an inference engine: start, cancel, step, take part in weight updates, close.

One task owns an engine and makes every call from the event loop; an engine that computes hands the work of
`step` to a thread of its own, so the loop stays free. Between two steps the owner may start and cancel
samples and swap weights in; samples go on afterwards from the keys and values they have.

    events = await engine.step()        # decode one token for every running sample, or wait for work
    engine.start(request)               # takes a slot now or queues for one
    engine.cancel(sample_id)            # the slot is free at the next step, whose events acknowledge it
    engine.weight_transfer(...)         # where weights arrive, and how they come into use between two steps
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from darts_async.protocol import FinishReason, Generate

if TYPE_CHECKING:  # these need torch, which an engine that models another does not
    from darts_async.config import WeightsConfig
    from darts_async.generator.engine_pause import Hold
    from darts_async.weights.receiving.transfer import Transfer


@dataclass(frozen=True, slots=True)
class SampleEnd:
    """A sample left the engine; `num_tokens` counts its whole response, prefix included."""

    sample_id: int
    num_tokens: int
    finish_reason: FinishReason | None
    """None: it was cancelled."""


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What one step brought: tokens in flat arrays, and the samples that ended.

    One token per sample, or several from an engine that decodes without waiting for its owner; those of one sample
    stand in the order in which they were decoded. A sample that ended has its last token (the end-of-sequence token)
    in the arrays.
    """

    sample_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [num_decoded]
    token_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # [num_decoded]
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # [num_decoded]
    ended: tuple[SampleEnd, ...] = ()
    rejected: tuple[tuple[int, str], ...] = ()
    """Samples that cannot be decoded, with the reason."""


class Engine(Protocol):
    """An inference engine. `EngineError` from any call means that the engine is dead."""

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
    def decodes_by_itself(self) -> bool:
        """Whether it goes on with the next step before that is asked for: what its owner does between two steps then
        costs it no time."""

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
