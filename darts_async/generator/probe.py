"""A generator's part of the probe (see `darts_async.weights.probe`): a few samples with negative ids among the others.
The shaper is not told of them."""

from dataclasses import dataclass, field

import numpy as np

from darts_async.generator.engine import Outbox, StepEvents
from darts_async.protocol import Generate, ProbeMeasured, ProbeWeights, SamplingParams

_ONE_TOKEN = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1)
_FIRST = -(1 << 30)
"""These are the first of the waiting samples, so that wrong weights are found soon."""


@dataclass(slots=True)
class _Probe:
    policy_version: int
    sample_ids: list[int]
    drawn: dict[int, tuple[int, float]] = field(default_factory=dict)  # sample id -> token, log-probability
    is_void: bool = False


class Probing:
    """At most one probe at a time: a new one replaces it. Results go to the outbox that is passed."""

    def __init__(self) -> None:
        self._asked: ProbeWeights | None = None
        self._probe: _Probe | None = None
        self._next_id = -1
        self._num_open = 0
        self.num_tokens = 0
        """Decoded for probes so far."""

    def ask(self, message: ProbeWeights) -> None:
        """Begin it at the next step boundary."""
        self._asked = message

    def begin(self, policy_version: int, out: Outbox) -> list[Generate]:
        """The samples to start now, when `policy_version` is in use."""
        asked, self._asked = self._asked, None
        if asked is None:
            return []
        if asked.policy_version != policy_version:
            out.append(_nothing(asked.policy_version))
            return []
        prompts = asked.prompt_tokens.reshape(-1, asked.prompt_length)
        ids = [self._next_id - number for number in range(len(prompts))]
        self._next_id -= len(prompts)
        self._num_open += len(prompts)
        self._probe = _Probe(policy_version, ids)
        prefix = np.empty(0, np.int32)
        return [Generate(i, p, prefix, -i, _ONE_TOKEN, _FIRST) for i, p in zip(ids, prompts, strict=True)]

    def sift(self, events: StepEvents, policy_version: int, out: Outbox) -> StepEvents:
        """Take out what belongs to probes. The step was made under `policy_version`."""
        if not self._num_open:
            return events
        ours = events.sample_ids < 0
        self.num_tokens += int(ours.sum())
        ended = [end.sample_id for end in events.ended if end.sample_id < 0]
        rejected = [sample_id for sample_id, _ in events.rejected if sample_id < 0]
        self._num_open -= len(ended) + len(rejected)
        if self._probe is not None:
            measured = self._measured(self._probe, events, policy_version, set(rejected))
            if measured is not None:
                self._probe = None
                out.append(measured)
        return StepEvents(
            events.sample_ids[~ours],
            events.token_ids[~ours],
            events.logprobs[~ours],
            tuple(end for end in events.ended if end.sample_id >= 0),
            tuple(rejection for rejection in events.rejected if rejection[0] >= 0),
        )

    def _measured(
        self, probe: _Probe, events: StepEvents, policy_version: int, rejected: set[int]
    ) -> ProbeMeasured | None:
        for sample_id in probe.sample_ids:
            for row in np.flatnonzero(events.sample_ids == sample_id).tolist():
                probe.drawn[sample_id] = int(events.token_ids[row]), float(events.logprobs[row])
                probe.is_void |= policy_version != probe.policy_version
        probe.is_void |= not rejected.isdisjoint(probe.sample_ids)
        if probe.is_void:
            return _nothing(probe.policy_version)
        if len(probe.drawn) < len(probe.sample_ids):
            return None
        drawn = [probe.drawn[sample_id] for sample_id in probe.sample_ids]
        tokens, logprobs = zip(*drawn, strict=True)
        return ProbeMeasured(probe.policy_version, np.array(tokens, np.int32), np.array(logprobs, np.float32))


def _nothing(policy_version: int) -> ProbeMeasured:
    return ProbeMeasured(policy_version, np.empty(0, np.int32), np.empty(0, np.float32))
