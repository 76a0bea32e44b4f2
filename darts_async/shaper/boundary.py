"""What the shaper takes from its peers: an invalid message is refused before the state sees it.

Types do not say that a message is true: a generator can claim tokens of a sample that it does not hold, or a version
that no learner has made. Each claim is compared with what the shaper itself has asked for, so `ShaperState` and its
parts may rely on it: an `assert` there is about a mistake of ours.

A late message is not invalid. A peer that was silent, or that answers while its command is being withdrawn, says what
was true then; such messages pass, and the state ignores them. So a message is refused only if no order of honest
messages could have led to it.

A refused message is not taken, so it is not in the journal, and a replay needs no refusals. Whether a message is
refused follows from the state and the message alone: a shaper that comes back and is sent it again refuses it again.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.protocol import (
    GeneratorReady,
    GroupsCommitted,
    LearnerReady,
    RewardReady,
    SampleCancelled,
    SampleFinished,
    SampleRejected,
    SampleScored,
    ScoreFailed,
    TokensDecoded,
    VersionPublished,
    VersionSaved,
    WeightsApplied,
    group_id_of,
)
from darts_async.shaper.durable.replayable_state import MAX_SHARED_BYTES
from darts_async.shaper.group import Sample, Stage
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import Incoming, ShaperState
from darts_async.token_checks import NUM_INT32, not_logprobs, not_tokens

LARGEST_REWARD = float(np.finfo(np.float32).max)
"""Rewards travel to the learner in float32."""
MAX_GROUPS = 1 << 48
"""A run has fewer: their ids and those of their samples are 64-bit numbers."""


class Boundary:
    """Compares messages with a state. `run_dir` is named in the user's advice; `vocab_size` is None where the engine
    has no model."""

    def __init__(self, config: RunConfig, run_dir: Path, vocab_size: int | None = None) -> None:
        self._config = config
        self._run_dir = run_dir
        self._num_token_ids = NUM_INT32 if vocab_size is None else vocab_size

    def refusal(self, state: ShaperState, peer: str, message: Incoming) -> str | None:
        """Why a message is invalid; None if it is to be taken."""
        if not state.greeting(peer):
            return f"a {type(message).__name__} before it was greeted"
        match message:
            case TokensDecoded():
                values = not_tokens(message.token_ids, self._num_token_ids) or not_logprobs(message.logprobs)
                return values or self._tokens(state, peer, message)
            case SampleFinished() | SampleCancelled() | SampleRejected():
                return _end_of_sample(state, peer, message)
            case SampleScored() | ScoreFailed():
                return self._answer(state, message)
            case WeightsApplied():
                return _weights_applied(state, peer, message)
            case GeneratorReady():
                return self._generator_ready(state, peer, message)
            case RewardReady():
                return None if message.num_workers >= 1 else f"it has {message.num_workers} workers"
            case LearnerReady():
                return self._learner_ready(state, message)
            case GroupsCommitted():
                return _committed(state, message, self._config.learner.groups_per_step)
            case VersionPublished() | VersionSaved():
                return _version_made(state, message)

    def _answer(self, state: ShaperState, message: SampleScored | ScoreFailed) -> str | None:
        if isinstance(message, SampleScored):
            if not all(abs(number) <= LARGEST_REWARD for number in (message.reward, *message.parts)):
                return f"a reward of {message.reward} for sample {message.sample_id}"
            if len(message.parts) != len(labels := self._config.reward.labels):
                return f"{len(message.parts)} parts of a reward, and there are {len(labels)} reward functions"
        return _unknown(state, [message.sample_id])

    def _generator_ready(self, state: ShaperState, peer: str, message: GeneratorReady) -> str | None:
        newest, asked = state.greeting(peer), self._config.generator.num_slots
        if not 1 <= message.greeting <= newest:
            return f"it answers greeting {message.greeting}, and the newest one is {newest}"
        if message.greeting == newest and state.work.generators.seats.get(peer) is not None:
            return f"it answers greeting {newest} twice"
        if not 1 <= message.num_slots <= asked:
            return f"it has {message.num_slots} slots, and generator.num_slots is {asked}"
        return None if message.max_context_tokens >= 1 else f"its context is of {message.max_context_tokens} tokens"

    def _tokens(self, state: ShaperState, peer: str, message: TokensDecoded) -> str | None:
        work, version = state.work, message.policy_version
        if (reason := _version(state, version)) is not None:
            return reason
        sample_ids, counts = message.sample_ids.tolist(), message.num_tokens.tolist()
        longest = self._config.sampling.max_new_tokens
        if (most := max(counts, default=0)) > longest:
            return f"{most} tokens of one sample, and max_new_tokens is {longest}"
        if (seat := work.generators.seats.get(peer)) is None or state.is_ending:
            return _unknown(state, sample_ids)
        if version < seat.policy_version:
            return f"tokens of version {version} after it had applied version {seat.policy_version}"
        if len(set(sample_ids)) < len(sample_ids):
            return "tokens of one sample in two places of a message"
        for sample_id, sample, count in zip(sample_ids, work.all_owned(peer, sample_ids), counts, strict=True):
            if sample is None:
                return f"tokens of sample {sample_id}, which it does not hold"
            if sample.num_tokens + count > longest:
                return f"{sample.num_tokens + count} tokens of sample {sample_id}, and max_new_tokens is {longest}"
            if sample.newest_version is not None and version < sample.newest_version:
                return f"tokens of version {version} after some of version {sample.newest_version} in one sample"
        return None

    def _learner_ready(self, state: ShaperState, message: LearnerReady) -> str | None:
        version = message.policy_version
        if not 0 <= version <= self._config.learner.steps:
            return f"it is at version {version} of {self._config.learner.steps}"
        if len(message.shaper_state) > MAX_SHARED_BYTES:
            return f"a shaper state of {len(message.shaper_state)} bytes, and {MAX_SHARED_BYTES} is the most"
        if not 0 <= message.next_group_id < MAX_GROUPS:
            return f"it has had groups up to {message.next_group_id}"
        if state.phase is RunPhase.FINISHED or state.may_start_over or not state.feed.committed.can_rewind(version):
            return None
        try:
            state.feed.unheard(version)
        except DataError as error:
            return f"{error}; end the run and take it up again: darts-launch resume --from-checkpoint {self._run_dir}"
        return None


def _version_made(state: ShaperState, message: VersionPublished | VersionSaved) -> str | None:
    version, position = message.policy_version, state.feed.committed.position
    if isinstance(message, VersionSaved) and not 0 <= message.oldest_kept <= version:
        return f"the oldest of its checkpoints is of version {message.oldest_kept}, and the newest of {version}"
    if isinstance(message, VersionSaved) or state.is_ending:
        return _version(state, version)
    return None if 0 <= version <= position else f"it published version {version} and is at {position}"


def _version(state: ShaperState, version: int) -> str | None:
    """Of a version that a learner is said to have made: it needs every group of the steps before."""
    newest = state.feed.num_filled_steps
    if 0 <= version <= newest:
        return None
    return f"version {version}, and the groups that were shipped are enough for {newest}"


def _weights_applied(state: ShaperState, peer: str, message: WeightsApplied) -> str | None:
    seat = state.work.generators.seats.get(peer)
    if seat is not None and message.policy_version < seat.policy_version:
        return f"it went back from version {seat.policy_version} to {message.policy_version}"
    if not 0 <= message.stall_s < math.inf:
        return f"it stalled for {message.stall_s} s"
    return _version(state, message.policy_version)


def _unknown(state: ShaperState, sample_ids: Iterable[int]) -> str | None:
    """Of samples that a peer may have had before."""
    for sample_id in sample_ids:
        if not 0 <= group_id_of(sample_id) < state.work.next_group_id:
            return f"sample {sample_id}, which has never existed"
    return None


def _end_of_sample(
    state: ShaperState, peer: str, message: SampleFinished | SampleCancelled | SampleRejected
) -> str | None:
    sample = state.work.owned(peer, message.sample_id)
    if sample is not None:
        return _end_of_owned(sample, message)
    if state.work.generators.seats.get(peer) is None or state.is_ending:
        return _unknown(state, [message.sample_id])
    return f"the end of sample {message.sample_id}, which it does not hold"


def _end_of_owned(sample: Sample, message: SampleFinished | SampleCancelled | SampleRejected) -> str | None:
    match message:
        case SampleRejected():
            return None
        case SampleCancelled() if sample.stage is not Stage.CANCELLING:
            return f"it cancelled sample {sample.sample_id}, which was not asked of it"
        case SampleFinished(num_tokens=0):
            return f"sample {sample.sample_id} has finished without a token"
        case _ if message.num_tokens != sample.num_tokens:
            num_sent, num_claimed = sample.num_tokens, message.num_tokens
            return f"sample {sample.sample_id} has ended with {num_claimed} tokens, and {num_sent} were sent"
    return None


def _committed(state: ShaperState, message: GroupsCommitted, groups_per_step: int) -> str | None:
    """A step that was taken before may be reported again. Any other is the next one, of exactly the groups shipped for
    it; but the learner may have trained on groups that a stop has given up."""
    feed, step = state.feed, message.step
    position, group_ids = feed.committed.position, message.group_ids.tolist()
    if 0 <= step < position:
        return None
    expected = feed.groups_of(step)
    if state.is_ending and step >= position and not expected and not feed.committed.is_behind:
        return None if 0 <= step < feed.num_filled_steps else f"it took step {step}, which was never filled"
    if step != position:
        return f"it took step {step}, and the next one is {position}"
    if sorted(group_ids) != sorted(expected) or len(expected) != groups_per_step:
        return f"groups {sorted(group_ids)} are in step {step}, and {sorted(expected)} were shipped for it"
    return None
