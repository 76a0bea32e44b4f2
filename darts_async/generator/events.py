"""What an engine tells after a step: the tokens that it decoded, and the samples that ended; and what is told of it."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darts_async.protocol import FinishReason, GeneratorToShaper, ProbeMeasured

Outbox = list[GeneratorToShaper | ProbeMeasured]
"""What is to be sent, in order: measurements to the learner, all else to the shaper."""


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
    stand in the order in which they were decoded. A sample that ended has its last token (the end-of-sequence token) in
    the arrays.
    """

    sample_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [num_decoded]
    token_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # [num_decoded]
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # [num_decoded]
    ended: tuple[SampleEnd, ...] = ()
    rejected: tuple[tuple[int, str], ...] = ()
    """Samples that cannot be decoded, with the reason."""
