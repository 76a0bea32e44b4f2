"""The interface of an inference engine: start, cancel, step, apply weights, close.

One task owns an engine and makes every call from the event loop; an engine that computes hands the work of
`step` to a thread of its own, so the loop stays free. Between two steps the owner may start and cancel
samples and swap weights in; samples go on afterwards from the keys and values they have.

    events = await engine.step()        # decode one token for every running sample, or wait for work
    engine.start(request)               # takes a slot now or queues for one
    engine.cancel(sample_id)            # the slot is free at the next step, whose events acknowledge it
    await engine.apply_weights(...)     # swaps staged weights in; no step runs meanwhile
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from darts_async.protocol import FinishReason, Generate


@dataclass(frozen=True, slots=True)
class SampleEnd:
    """A sample left the engine; `num_tokens` counts its whole response, prefix included."""

    sample_id: int
    num_tokens: int
    finish_reason: FinishReason | None
    """None: it was cancelled."""


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What one step brought: at most one token per sample, in flat arrays, and the samples that ended.

    A sample that ended in this step has its last token (the end-of-sequence token) in the arrays.
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

    def start(self, request: Generate) -> None:
        """Accept a sample. Ids are unique among unfinished samples."""

    def cancel(self, sample_id: int) -> None:
        """Stop a sample, running or waiting. The events of the next step carry its end. Unknown ids: no-op."""

    async def step(self) -> StepEvents:
        """Decode one token for every running sample. Returns at once, with nothing, if there is no work."""

    async def apply_weights(self, tensors: "dict[str, object]", policy_version: int) -> None:
        """Swap weights in between two steps; `tensors` maps parameter names to torch tensors (host or device)."""

    async def close(self) -> None:
        """Free everything. Idempotent."""
