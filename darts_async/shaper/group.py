"""Groups and samples: the life of each, and the tokens streamed so far.

    WAITING -> DECODING -> FINISHED -> SCORED ------> ENDED(trained | filtered | stale)
       ^          |  |                   |
       |          |  +-> CANCELLING -----|----------> ENDED(cancelled | stale)
       +----------+ (its generator died: goes on elsewhere behind the tokens it has)

A sample ends exactly once, with a fate and a reason, and holds its tokens until then. Token versions never decrease
along a sample.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from darts_async.prompts.source import Prompt
from darts_async.protocol import FinishReason, TrainGroup

Fate = Literal["trained", "cancelled", "filtered", "stale", "lost", "evaluated"]
Purpose = Literal["train", "evaluate"]


class Stage(Enum):
    """Where a sample is."""

    WAITING = auto()  # for room in a generator
    DECODING = auto()
    CANCELLING = auto()  # the engine has not acknowledged yet
    FINISHED = auto()  # and being judged
    SCORED = auto()
    UNSCORABLE = auto()  # its reward failed
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Sample:
    """One response of a group."""

    sample_id: int
    stage: Stage = Stage.WAITING
    generator: str | None = None
    num_tokens: int = 0
    oldest_version: int | None = None
    newest_version: int | None = None
    finish_reason: FinishReason | None = None
    reward: float | None = None
    end_fate: Fate = "cancelled"
    end_reason: str = ""
    """How it will end, once that is decided."""
    chunks: list[tuple[int, NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)

    def append(self, version: int, token_ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> None:
        """Take the next tokens, decoded under `version`."""
        if self.oldest_version is None:
            self.oldest_version = version
        assert self.newest_version is None or version >= self.newest_version, self.sample_id
        self.newest_version = version
        self.num_tokens += len(token_ids)
        self.chunks.append((version, token_ids, logprobs))

    def token_ids(self) -> NDArray[np.int32]:
        """All tokens so far. [num_tokens]"""
        return np.concatenate([chunk[1] for chunk in self.chunks] or [np.empty(0, np.int32)])

    def logprobs(self) -> NDArray[np.float32]:
        """Their behaviour log-probabilities. [num_tokens]"""
        return np.concatenate([chunk[2] for chunk in self.chunks] or [np.empty(0, np.float32)])

    def versions(self) -> NDArray[np.int32]:
        """The version that decoded each. [num_tokens]"""
        versions = np.array([chunk[0] for chunk in self.chunks], np.int32)
        return np.repeat(versions, [len(chunk[1]) for chunk in self.chunks])


@dataclass(slots=True, eq=False)
class Group:
    """One visit to one prompt."""

    group_id: int
    prompt: Prompt
    purpose: Purpose
    samples: list[Sample]
    floor: int = 0
    """No token of it is of an older version than this."""
    opened_s: float = 0.0
    survivors: frozenset[int] = frozenset()
    """Sample ids that a survivor draw spared."""
    kept: list[tuple[Sample, float]] | None = None
    """Samples to train, with their weights, once complete."""
    step: int | None = None
    """The step it was shipped for."""

    def at(self, *stages: Stage) -> list[Sample]:
        """The samples in one of these stages."""
        return [sample for sample in self.samples if sample.stage in stages]

    @property
    def undecided(self) -> bool:
        """Whether a sample may still become trainable."""
        return any(s.stage in (Stage.WAITING, Stage.DECODING, Stage.FINISHED) for s in self.samples)

    @property
    def oldest_kept_version(self) -> int:
        """The version of the oldest token that would be trained."""
        assert self.kept
        return min(sample.oldest_version for sample, _ in self.kept if sample.oldest_version is not None)


def train_group(group: Group) -> TrainGroup:
    """A shipped group as the learner gets it: kept samples in launch order."""
    assert group.kept is not None
    assert group.step is not None
    samples = [sample for sample, _ in group.kept]
    return TrainGroup(
        group_id=group.group_id,
        step=group.step,
        prompt_tokens=group.prompt.token_ids,
        num_tokens=np.array([s.num_tokens for s in samples], np.int32),
        token_ids=np.concatenate([s.token_ids() for s in samples]),
        logprobs=np.concatenate([s.logprobs() for s in samples]),
        versions=np.concatenate([s.versions() for s in samples]),
        rewards=np.array([s.reward for s in samples], np.float32),
        weights=np.array([weight for _, weight in group.kept], np.float32),
    )
