"""Batches the tokens to the shaper over a few engine steps, with one policy version per message."""

import numpy as np

from darts_async.generator.engine import StepEvents
from darts_async.protocol import GeneratorToShaper, SampleCancelled, SampleFinished, SampleRejected, TokensDecoded


class Outgoing:
    """Collects step events. A sample's tokens always leave before its end does."""

    def __init__(self, flush_every_steps: int) -> None:
        self._flush_every_steps = flush_every_steps
        self._steps: list[StepEvents] = []

    def add(self, events: StepEvents) -> None:
        """Collect what one step brought."""
        if len(events.sample_ids) or events.ended or events.rejected:
            self._steps.append(events)

    @property
    def is_due(self) -> bool:
        """Whether to flush now: after enough steps, or after an end, which the shaper waits for."""
        if not self._steps:
            return False
        last = self._steps[-1]
        return len(self._steps) >= self._flush_every_steps or bool(last.ended or last.rejected)

    def flush(self, policy_version: int) -> list[GeneratorToShaper]:
        """All that was collected, decoded under `policy_version`."""
        steps, self._steps = self._steps, []
        messages: list[GeneratorToShaper] = []
        if any(len(step.sample_ids) for step in steps):
            messages.append(_tokens(steps, policy_version))
        for step in steps:
            messages += [SampleRejected(sample_id, error) for sample_id, error in step.rejected]
            for end in step.ended:
                if end.finish_reason is None:
                    messages.append(SampleCancelled(end.sample_id, end.num_tokens))
                else:
                    messages.append(SampleFinished(end.sample_id, end.finish_reason, end.num_tokens))
        return messages


def _tokens(steps: list[StepEvents], policy_version: int) -> TokensDecoded:
    """Sort by sample; the order of steps is kept within each."""
    ids = np.concatenate([step.sample_ids for step in steps])
    order = np.argsort(ids, kind="stable")
    sample_ids, num_tokens = np.unique(ids, return_counts=True)
    return TokensDecoded(
        policy_version=policy_version,
        sample_ids=sample_ids,
        num_tokens=num_tokens.astype(np.int32),
        token_ids=np.concatenate([step.token_ids for step in steps])[order],
        logprobs=np.concatenate([step.logprobs for step in steps])[order],
    )
