"""Checks the messages of the shaper, the generators and the other ranks. An invalid one is refused before it changes
anything.

A late message is valid: the coordinator ignores answers to an old epoch or to an earlier learner. The shaper is the
authority on versions: it knows for how many steps groups were shipped, hence which versions any learner can have made.
If a generator could claim a later one, all others would wait for it forever.
"""

import math

import numpy as np

from darts_async.config import RunConfig
from darts_async.protocol import (
    NUM_BINS,
    SAMPLES_PER_GROUP_LIMIT,
    CatchUp,
    GeneratorToLearner,
    Greet,
    MemberJoined,
    PartSaved,
    ProbeMeasured,
    RankReady,
    RankToLeader,
    ShaperSnapshot,
    ShaperToLearner,
    StepTallied,
    StoreValue,
    TrainGroup,
    UpdateApplied,
)
from darts_async.token_checks import NUM_INT32, not_logprobs, not_tokens

_HISTOGRAM_BYTES = NUM_BINS * 8


class Boundary:
    """Compares messages with the settings of the run. `vocab_size` is None where there is no model."""

    def __init__(self, config: RunConfig, vocab_size: int | None = None) -> None:
        self._config = config
        self._num_steps = config.learner.steps
        self._num_token_ids = NUM_INT32 if vocab_size is None else vocab_size
        settings = config.generator
        self._max_ranks = settings.vllm.tensor_parallel_size if settings.capabilities.has_workers else 1

    def of_shaper(self, message: ShaperToLearner) -> str | None:
        """Why a message of the shaper is invalid; None if it is valid."""
        match message:
            case TrainGroup():
                return self._group(message)
            case CatchUp(policy_version=version, newest_version=newest):
                return None if 0 <= version <= newest <= self._num_steps else f"versions {version} and {newest}"
            case ShaperSnapshot(policy_version=version):
                return None if 0 <= version <= self._num_steps else f"version {version} of {self._num_steps}"
            case Greet(number=number):
                return None if number >= 1 else f"greeting {number}"

    def of_generator(self, message: GeneratorToLearner, *, newest_version: int, newest_epoch: int) -> str | None:
        """The same of a generator. `newest_version` is the newest that any learner of the run can have made,
        `newest_epoch` the newest that this one has formed."""
        match message:
            case MemberJoined(policy_version=version, num_ranks=num_ranks):
                if not -1 <= version <= newest_version:
                    return f"it holds version {version}, and none after {newest_version} can have been made"
                return None if num_ranks <= self._max_ranks else f"it has {num_ranks} ranks, of {self._max_ranks}"
            case ProbeMeasured():
                return None  # the `Examiner` checks it
            case UpdateApplied(stall_s=stall_s) if not 0 <= stall_s < math.inf:
                return f"it paused for {stall_s} s"
            case _ if message.epoch > newest_epoch:
                return f"epoch {message.epoch}, and the newest one is {newest_epoch}"
        return None

    def of_rank(self, message: RankToLeader) -> str | None:
        """The same of another rank."""
        match message:
            case StoreValue():
                return None
            case RankReady(policy_version=version) | PartSaved(policy_version=version):
                return None if 0 <= version <= self._num_steps else f"version {version} of {self._num_steps}"
            case StepTallied():
                return self._tally(message)

    def _tally(self, message: StepTallied) -> str | None:
        if not 0 <= message.step < self._num_steps:
            return f"step {message.step} of {self._num_steps}"
        if message.sums.keys() != message.counts.keys():
            return f"sums and counts of different names: {sorted(message.sums.keys() ^ message.counts.keys())[:5]}"
        sizes = {len(histogram) for histogram in message.histograms.values()}
        return f"histograms of {sorted(sizes)} bytes, not {_HISTOGRAM_BYTES}" if sizes - {_HISTOGRAM_BYTES} else None

    def _group(self, group: TrainGroup) -> str | None:
        reason = self._shape(group) or self._tokens(group)
        return None if reason is None else f"group {group.group_id}: {reason}"

    def _shape(self, group: TrainGroup) -> str | None:
        if not 0 <= group.step < self._num_steps or group.group_id < 0:
            return f"step {group.step} of {self._num_steps}"
        longest, counts = self._config.sampling.max_new_tokens, group.num_tokens
        if not 1 <= len(counts) <= SAMPLES_PER_GROUP_LIMIT or not len(group.prompt_tokens):
            return f"{len(counts)} samples of a prompt of {len(group.prompt_tokens)} tokens"
        if counts.min() < 1 or counts.max() > longest:
            return f"responses of {counts.min()} to {counts.max()} tokens, and max_new_tokens is {longest}"
        if not (np.isfinite(group.rewards).all() and np.isfinite(group.weights).all() and (group.weights > 0).all()):
            return f"rewards {group.rewards.tolist()} with weights {group.weights.tolist()}"
        lacks_baseline = group.baseline is None and self._config.shaping.baseline == "history"
        return f"a baseline of {group.baseline}" if lacks_baseline or not math.isfinite(group.baseline or 0.0) else None

    def _tokens(self, group: TrainGroup) -> str | None:
        oldest, newest = int(group.versions.min()), int(group.versions.max())
        if oldest < max(0, group.step - self._config.staleness.max_staleness) or newest > group.step:
            return (
                f"tokens of versions {oldest} to {newest} in step {group.step}, and max_staleness is "
                f"{self._config.staleness.max_staleness}"
            )
        tokens = np.concatenate((group.prompt_tokens, group.token_ids))
        return not_tokens(tokens, self._num_token_ids) or not_logprobs(group.logprobs)
