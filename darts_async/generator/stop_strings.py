"""Stop strings: a response ends as soon as its text holds one of them, with any engine.

Engines draw tokens and know no text, so this filters what an engine reports. The token that completes a stop string is
the last of the response. The engine is told to cancel the sample; what it decodes until then is dropped and counted.

A string of n bytes is completed within its last n tokens that have text, so only the last few tokens of a response are
decoded at each step.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from darts_async.generator.engine import SampleEnd, StepEvents
from darts_async.protocol import Generate

_MARGIN_TOKENS = 4
"""The first tokens of a window may be parts of a character, or lose a space."""


@dataclass(slots=True)
class _Response:
    num_tokens: int
    tail: list[int]
    """Its last tokens."""


class StopStrings:
    """Ends responses at stop strings. Pure: its owner reports what happens, and does what it says. Neither `strings`
    nor any of them is empty; `tokenizer` is that of the model.

    Example:
        >>> stopping = StopStrings(("</answer>",), tokenizer)  # doctest: +SKIP
        >>> stopping.start(request)  # doctest: +SKIP
        >>> events = stopping.sift(await engine.step())  # doctest: +SKIP
        >>> for sample_id in stopping.take_stopped(): engine.cancel(sample_id)  # doctest: +SKIP
    """

    def __init__(self, strings: tuple[str, ...], tokenizer: Tokenizer) -> None:
        self._strings = strings
        self._tokenizer = tokenizer
        self._window = max(len(string.encode()) for string in strings) + _MARGIN_TOKENS
        self._running: dict[int, _Response] = {}
        self._stopped: set[int] = set()
        """These have ended here, and the engine still has them."""
        self._to_cancel: list[int] = []
        self.num_tokens_dropped = 0
        """Decoded after a stop string, before the engine cancelled the sample."""

    def start(self, request: Generate) -> SampleEnd | None:
        """The end of a sample whose prefix already holds a stop string; None: decode it."""
        prefix = request.prefix_tokens[-self._window :].tolist()
        response = _Response(len(request.prefix_tokens), prefix)
        if self._holds_stop(response):
            return SampleEnd(request.sample_id, response.num_tokens, "stop")
        self._running[request.sample_id] = response
        return None

    def sift(self, events: StepEvents) -> StepEvents:
        """The part of an engine's events that is reported."""
        is_kept = np.ones(len(events.sample_ids), np.bool_)
        ended: list[SampleEnd] = []
        for row, (sample_id, token_id) in enumerate(
            zip(events.sample_ids.tolist(), events.token_ids.tolist(), strict=True)
        ):
            if sample_id in self._stopped:
                is_kept[row] = False
                self.num_tokens_dropped += 1
            elif (response := self._running.get(sample_id)) is not None and self._is_stopped_by(response, token_id):
                ended.append(SampleEnd(sample_id, response.num_tokens, "stop"))
                self._stopped.add(sample_id)
        ended += [end for end in events.ended if end.sample_id not in self._stopped]
        gone = {end.sample_id for end in events.ended} | {sample_id for sample_id, _ in events.rejected}
        self._to_cancel += [end.sample_id for end in ended if end.sample_id in self._stopped - gone]
        self._stopped -= gone
        for sample_id in gone | {end.sample_id for end in ended}:
            self._running.pop(sample_id, None)
        return StepEvents(
            events.sample_ids[is_kept],
            events.token_ids[is_kept],
            events.logprobs[is_kept],
            tuple(ended),
            events.rejected,
        )

    def take_stopped(self) -> list[int]:
        """Samples that the engine is to cancel, once each."""
        stopped, self._to_cancel = self._to_cancel, []
        return stopped

    def _is_stopped_by(self, response: _Response, token_id: int) -> bool:
        response.num_tokens += 1
        response.tail.append(token_id)
        del response.tail[: -self._window]
        return self._holds_stop(response)

    def _holds_stop(self, response: _Response) -> bool:
        text = self._tokenizer.decode(response.tail, skip_special_tokens=False)
        return any(string in text for string in self._strings)
