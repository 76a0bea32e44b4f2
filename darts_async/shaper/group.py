"""Groups and samples: the life of each, and the tokens streamed so far.

A sample lives like this (`SAMPLE_LIFE`):

    waiting    -> decoding    a generator has room for it
               -> finished    its generator died before it could say that the response is complete
               -> ended       its group does not need it
    decoding   -> finished    its response is complete
               -> cancelling  its group does not need it, and its generator is told
               -> waiting     its generator died: another one continues after the tokens that it has
               -> unscorable  the engine rejected it
               -> ended       the run ends
    cancelling -> ended       its generator has acknowledged, or died
    finished   -> scored      it has its reward
               -> unscorable  its reward failed
               -> ended       its group is given up, or the run ends
    scored     -> ended       it was trained on, or filtered, or became stale
    unscorable -> ended       its group is decided

A sample ends exactly once, with an outcome and a reason, and holds its tokens until then, or until all of its group
have ended if that is shown. Token versions never decrease along a sample.
"""

from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from operator import itemgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from darts_async.prompts.source import Prompt
from darts_async.protocol import FinishReason, TrainGroup
from darts_async.topology.outcomes import SampleOutcome
from darts_async.transitions import Transitions

Purpose = Literal["train", "evaluate"]


class Stage(Enum):
    """Where a sample is."""

    WAITING = "waiting"  # for room in a generator
    DECODING = "decoding"
    CANCELLING = "cancelling"  # the engine has not acknowledged yet
    FINISHED = "finished"  # and being scored
    SCORED = "scored"
    UNSCORABLE = "unscorable"  # its reward failed, or the engine rejected it
    ENDED = "ended"


SAMPLE_LIFE = Transitions(
    {
        ("waiting", "decoding"): "a generator has room for it",
        ("waiting", "finished"): "its generator died before it could say that the response is complete",
        ("waiting", "ended"): "its group does not need it",
        ("decoding", "finished"): "its response is complete",
        ("decoding", "cancelling"): "its group does not need it, and its generator is told",
        ("decoding", "waiting"): "its generator died: another one continues after the tokens that it has",
        ("decoding", "unscorable"): "the engine rejected it",
        ("decoding", "ended"): "the run ends",
        ("cancelling", "ended"): "its generator has acknowledged, or died",
        ("finished", "scored"): "it has its reward",
        ("finished", "unscorable"): "its reward failed",
        ("finished", "ended"): "its group is given up, or the run ends",
        ("scored", "ended"): "it was trained on, or filtered, or became stale",
        ("unscorable", "ended"): "its group is decided",
    }
)
RUNNING = (Stage.WAITING, Stage.DECODING)
_NO_TOKENS = np.empty(0, np.int32)
_WAITING, _DECODING, _FINISHED = Stage.WAITING, Stage.DECODING, Stage.FINISHED
"""A look-up in an `Enum` costs as much as the rest of `undecided`."""


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
    finish_rank: int | None = None
    """How many of its group had finished before it."""
    reward: float | None = None
    reward_parts: tuple[float, ...] = ()
    """What each of several reward functions gave, before it was weighted."""
    end_outcome: SampleOutcome = "cancelled"
    end_reason: str = ""
    """How it will end, once that is decided."""
    chunks: list[tuple[int, NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)
    earlier: list[Stage] = field(default_factory=list)
    """The stages before this one."""
    decoded_by: list[str] = field(default_factory=list)
    """Every generator that it was given to, in order."""

    def to(self, stage: Stage) -> None:
        """Enter the next stage. Raises `IllegalTransition`, with the story of the sample."""
        SAMPLE_LIFE.check(self.stage.value, stage.value, self.story)
        self.earlier.append(self.stage)
        self.stage = stage

    def story(self) -> str:
        """What it has been through, in one line."""
        stages = ", ".join(stage.value for stage in [*self.earlier, self.stage])
        place = f" in {self.generator}" if self.generator else ""
        return f"sample {self.sample_id} ({stages}{place}; {self.num_tokens} tokens; {self.end_reason or 'no reason'})"

    @property
    def is_lost(self) -> bool:
        """Its reward failed or the engine rejected it: nothing that a rule decided."""
        return self.end_reason.startswith("reward_") or self.end_reason == "rejected_by_engine"

    def append(self, version: int, token_ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> None:
        """Take the next tokens, decoded under `version`."""
        if self.oldest_version is None:
            self.oldest_version = version
        assert self.newest_version is None or version >= self.newest_version, self.sample_id
        self.newest_version = version
        self.num_tokens += len(token_ids)
        self.chunks.append((version, token_ids, logprobs))

    def merge_chunks(self) -> None:
        """One chunk for each version: there are hundreds in a long sample, and each is an array to be encoded."""
        if len(self.chunks) > 1:
            by_version = [list(chunks) for _, chunks in groupby(self.chunks, key=itemgetter(0))]
            self.chunks = [
                (chunks[0][0], np.concatenate([c[1] for c in chunks]), np.concatenate([c[2] for c in chunks]))
                for chunks in by_version
            ]

    def token_ids(self) -> NDArray[np.int32]:
        """All tokens so far. [num_tokens]"""
        if len(self.chunks) == 1:
            return self.chunks[0][1]
        return np.concatenate([chunk[1] for chunk in self.chunks]) if self.chunks else _NO_TOKENS


@dataclass(slots=True, eq=False)
class Group:
    """One visit to one prompt; encoded as it is."""

    group_id: int
    prompt: Prompt
    purpose: Purpose
    samples: list[Sample]
    floor: int = 0
    """No token of it is of an older version than this."""
    opened_s: float = 0.0
    num_finished: int = 0
    """Samples that have ended their response."""
    num_ended: int = 0
    """Samples whose one terminal event has come."""
    spared: int | None = None
    """The sample id that hazard pruning lets run in place of those it aborts."""
    hazard_candidates: dict[int, int] = field(default_factory=dict)
    """Samples that hazard pruning has aborted or spared, with the tokens that each had then."""
    asked_again: bool = False
    """An earlier group of the prompt was cut or dropped: this one keeps its place in the window."""
    baseline: float | None = None
    """The prompt's pass rate before this group was opened; only where the history is the baseline."""
    weights: dict[int, float] | None = None
    """Once complete: of the samples to train on, by id."""
    step: int | None = None
    """The step it was shipped for."""
    is_shown: bool = False
    """Its rollouts are kept, so its samples hold their tokens until the last one has ended."""

    @property
    def kept(self) -> list[tuple[Sample, float]]:
        """Samples to train on, with their weights, in launch order; none before the group is complete."""
        weights = self.weights or {}
        return [(sample, weights[sample.sample_id]) for sample in self.samples if sample.sample_id in weights]

    def at(self, *stages: Stage) -> list[Sample]:
        """The samples in one of these stages."""
        return [sample for sample in self.samples if sample.stage in stages]

    def finish(self, sample: Sample, reason: FinishReason) -> None:
        """The sample has ended its response: it waits for its reward, and has its place in the order of completion."""
        sample.finish_rank, self.num_finished = self.num_finished, self.num_finished + 1
        sample.finish_reason = reason
        sample.to(Stage.FINISHED)

    @property
    def num_unscorable(self) -> int:
        """Samples that were lost: their reward failed, or the engine rejected them."""
        return sum(sample.is_lost for sample in self.samples)

    @property
    def undecided(self) -> bool:
        """Whether a sample may still become trainable."""
        for sample in self.samples:  # asked with every event
            stage = sample.stage
            if stage is _DECODING or stage is _FINISHED or stage is _WAITING:
                return True
        return False

    @property
    def is_given_up(self) -> bool:
        """It came to nothing, and only waits for its samples to end."""
        return self.weights is None and all(sample.stage in (Stage.CANCELLING, Stage.ENDED) for sample in self.samples)

    @property
    def oldest_kept_version(self) -> int:
        """The version of the oldest token that would be trained."""
        return min(sample.oldest_version for sample, _ in self.kept if sample.oldest_version is not None)

    def kept_floor(self, num_steps: int) -> int:
        """The same for the staleness window, which knows of no version before the learner has told of its step; a
        generator may tell of it earlier."""
        return min(self.oldest_kept_version, num_steps)


def train_group(group: Group) -> TrainGroup:
    """A shipped group as the learner gets it: kept samples in launch order."""
    assert group.step is not None
    samples = [sample for sample, _ in group.kept]
    chunks = [chunk for sample in samples for chunk in sample.chunks]
    versions = np.array([version for version, _, _ in chunks], np.int32)
    return TrainGroup(
        group_id=group.group_id,
        step=group.step,
        prompt_tokens=group.prompt.token_ids,
        num_tokens=np.array([s.num_tokens for s in samples], np.int32),
        token_ids=np.concatenate([token_ids for _, token_ids, _ in chunks]),
        logprobs=np.concatenate([logprobs for _, _, logprobs in chunks]),
        versions=np.repeat(versions, [len(token_ids) for _, token_ids, _ in chunks]),
        rewards=np.array([s.reward for s in samples], np.float32),
        weights=np.array([weight for _, weight in group.kept], np.float32),
        baseline=group.baseline,
    )
