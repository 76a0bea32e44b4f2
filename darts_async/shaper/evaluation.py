"""Held-out prompts: every sample is decoded to the end, judged and reported, and none is trained."""

import numpy as np
from msgspec import Struct

from darts_async.protocol import EvaluationCompleted
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.workload import Workload


class EvaluationState(Struct, frozen=True):
    """What `Evaluation` has collected."""

    evaluated: list[tuple[int, Sample]]


class Evaluation:
    """Collects the samples of one evaluation after the other."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._evaluated: list[tuple[int, Sample]] = []

    def decide(self, group: Group) -> None:
        """A sample of a held-out group has finished, failed or got its reward."""
        if group.undecided:
            return
        for sample in group.samples:
            if sample.stage is Stage.SCORED:
                self._evaluated.append((group.prompt.prompt_id, sample))
                self._work.end(sample, "evaluated", "held_out")
            else:
                self._work.end(sample, "filtered", sample.end_reason)

    def close(self, policy_version: int) -> EvaluationCompleted | None:
        """The report on all that was evaluated since the last one, if anything was."""
        evaluated = sorted(self._evaluated, key=lambda pair: pair[1].sample_id)
        self._evaluated = []
        if not evaluated:
            return None
        return EvaluationCompleted(
            policy_version=policy_version,
            prompt_ids=np.array([prompt_id for prompt_id, _ in evaluated], np.int64),
            rewards=np.array([s.reward for _, s in evaluated], np.float32),
            num_tokens=np.array([s.num_tokens for _, s in evaluated], np.int32),
        )

    def to_state(self) -> EvaluationState:
        """For `restore`."""
        return EvaluationState(self._evaluated)

    def restore(self, state: EvaluationState) -> None:
        """Go on where `to_state` was taken."""
        self._evaluated = state.evaluated
