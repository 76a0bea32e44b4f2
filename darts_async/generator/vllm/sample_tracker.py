"""Tracks the samples that vLLM decodes: the engine's decisions, without vLLM and without waiting.

A sample is *unsent*, then *live*, then ended; its end is reported once, after its last token. A live sample that is
cancelled stays live, and its tokens count, until vLLM has confirmed the abort (`confirm_aborted`), or until it ends by
itself. Tokens after its end are dropped: with asynchronous scheduling a step may be under way when a sample leaves.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from darts_async.generator.boundary import why_not
from darts_async.generator.engine import SampleEnd, StepEvents
from darts_async.protocol import FinishReason, Generate


class SampleTracker:
    """The samples of one engine that have not been reported as ended."""

    def __init__(self, max_context_tokens: int, vocab_size: int) -> None:
        self.num_tokens_decoded = 0
        self._max_context_tokens = max_context_tokens
        self._vocab_size = vocab_size
        self._unsent: dict[int, Generate] = {}
        self._live: dict[int, int] = {}  # sample id -> tokens of its response so far
        self._to_abort: set[int] = set()
        self._ended: list[SampleEnd] = []
        self._rejected: list[tuple[int, str]] = []
        self._sample_ids: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []

    @property
    def num_unfinished(self) -> int:
        """Samples started whose end has not been reported."""
        return len(self._unsent) + len(self._live) + len(self._ended) + len(self._rejected)

    @property
    def num_live(self) -> int:
        """Samples that vLLM has."""
        return len(self._live)

    @property
    def has_events(self) -> bool:
        """Whether `take_events` would bring anything."""
        return bool(self._sample_ids or self._ended or self._rejected)

    def start(self, request: Generate) -> None:
        """Queue a sample, or note why it can never be decoded."""
        sample_id = request.sample_id
        assert sample_id not in self._unsent.keys() | self._live.keys(), f"sample {sample_id} started twice"
        if (reason := why_not(request, self._max_context_tokens, self._vocab_size)) is not None:
            self.reject(sample_id, reason)
        else:
            self._unsent[sample_id] = request

    def cancel(self, sample_id: int) -> None:
        """End a sample. Unknown ids: nothing happens."""
        if (request := self._unsent.pop(sample_id, None)) is not None:
            self._ended.append(SampleEnd(sample_id, len(request.prefix_tokens), None))
        elif sample_id in self._live:
            self._to_abort.add(sample_id)

    def take_unsent(self) -> list[Generate]:
        """Samples to hand to vLLM now, in the order they were started."""
        requests, self._unsent = list(self._unsent.values()), {}
        self._live.update((request.sample_id, len(request.prefix_tokens)) for request in requests)
        return requests

    def take_aborts(self) -> list[int]:
        """Samples that vLLM is to drop now."""
        sample_ids, self._to_abort = sorted(self._to_abort), set()
        return sample_ids

    def decoded(
        self,
        sample_id: int,
        token_ids: Sequence[int],  # [num_new]
        logprobs: Sequence[float],  # [num_new]
        finish_reason: FinishReason | None,
    ) -> None:
        """Tokens of one sample, and its end if they are its last."""
        if sample_id not in self._live:
            return
        assert len(token_ids) == len(logprobs), f"{len(token_ids)} tokens with {len(logprobs)} log-probabilities"
        self._sample_ids += [sample_id] * len(token_ids)
        self._token_ids += token_ids
        self._logprobs += logprobs
        self._live[sample_id] += len(token_ids)
        self.num_tokens_decoded += len(token_ids)
        if finish_reason is not None:
            self._end(sample_id, finish_reason)

    def confirm_aborted(self, sample_ids: Iterable[int]) -> None:
        """vLLM has dropped these. Some may have ended by themselves before."""
        for sample_id in sample_ids:
            if sample_id in self._live:
                self._end(sample_id, None)

    def reject(self, sample_id: int, reason: str) -> None:
        """A sample that cannot be decoded."""
        self._live.pop(sample_id, None)
        self._to_abort.discard(sample_id)
        self._rejected.append((sample_id, reason))

    def take_events(self) -> StepEvents:
        """Everything that has happened since the last time."""
        events = StepEvents(
            np.array(self._sample_ids, np.int64),
            np.array(self._token_ids, np.int32),
            np.array(self._logprobs, np.float32),
            tuple(self._ended),
            tuple(self._rejected),
        )
        self._sample_ids, self._token_ids, self._logprobs, self._ended, self._rejected = [], [], [], [], []
        return events

    def _end(self, sample_id: int, reason: FinishReason | None) -> None:
        self._ended.append(SampleEnd(sample_id, self._live.pop(sample_id), reason))
        self._to_abort.discard(sample_id)
