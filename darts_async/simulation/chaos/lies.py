"""Well-formed invalid messages, which a process may send before its own, and which a boundary must refuse.

A lie that could be the truth is told by nothing here, for nothing can refuse it: another token of the vocabulary with
another log-probability, a wrong reward, a response that ends early, a version that the generator could have, a
checkpoint that was not written, and a prompt that is not the one of the group. What of that can be found, checksums and
probes find.
"""

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import numpy as np

from darts_async.protocol import (
    SAMPLES_PER_GROUP_LIMIT,
    CatchUp,
    EpochFormed,
    Generate,
    GeneratorReady,
    Greet,
    GroupsCommitted,
    LearnerReady,
    MemberJoined,
    Message,
    RewardReady,
    SampleCancelled,
    SampleFinished,
    SampleScored,
    ScoreFailed,
    ShaperSnapshot,
    TokensDecoded,
    TrainGroup,
    UpdateApplied,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    VersionPublished,
    VersionSaved,
    WeightsApplied,
)

FAR = 1_000_000
"""No number of a simulated run comes near it."""
NEVER_ASKED = FAR * SAMPLES_PER_GROUP_LIMIT
_NAN = float("nan")

Values = dict[str, Any]

_LIES: dict[type[Message], tuple[Values, ...]] = {
    Greet: ({"number": 0},),
    Generate: ({}, {"sample_id": -1}, {"priority": 7}),  # the first: the same sample twice
    GeneratorReady: ({}, {"greeting": FAR}, {"greeting": 0}, {"num_slots": 0}, {"num_slots": FAR}),
    SampleFinished: ({"num_tokens": 0}, {"num_tokens": FAR}, {"sample_id": NEVER_ASKED}),
    SampleCancelled: ({"num_tokens": FAR}, {"sample_id": NEVER_ASKED}),
    WeightsApplied: ({"policy_version": FAR}, {"policy_version": -1}, {"stall_s": -1.0}, {"stall_s": _NAN}),
    RewardReady: ({"num_workers": 0},),
    SampleScored: ({"reward": _NAN}, {"reward": 1e300}, {"sample_id": NEVER_ASKED}, {"sample_id": -1}),
    ScoreFailed: ({"sample_id": NEVER_ASKED},),
    LearnerReady: ({"policy_version": -1}, {"policy_version": FAR}),
    VersionPublished: ({"policy_version": -1}, {"policy_version": FAR}),
    VersionSaved: ({"policy_version": -1}, {"policy_version": FAR}),
    CatchUp: ({"policy_version": FAR}, {"policy_version": -1}, {"newest_version": FAR}),
    ShaperSnapshot: ({"policy_version": FAR}, {"policy_version": -1}),
    EpochFormed: ({"first_rank": 0}, {"world_size": 1}, {"deadline_s": _NAN}),
    UpdateOffered: ({"policy_version": -1}, {"deadline_s": -1.0}),
    MemberJoined: ({"policy_version": FAR}, {"policy_version": -2}, {"num_ranks": FAR}),
    UpdateReady: ({"epoch": 1 << 61},),
    UpdateStaged: ({"epoch": 1 << 61},),
    UpdateApplied: ({"epoch": 1 << 61}, {"stall_s": _NAN}),
    UpdateFailed: ({"epoch": 1 << 61},),
}


def lie_instead_of(message: Message, rng: Random) -> Message | None:
    """What a process may say that could have said this; None if nothing of it can be refused."""
    match message:
        case TokensDecoded():
            return rng.choice(_LIES_OF_TOKENS)(message)
        case TrainGroup():
            return rng.choice(_LIES_OF_GROUPS)(message)
        case GroupsCommitted():
            group_ids = message.group_ids + FAR
            return GroupsCommitted(rng.choice((message.step, FAR)), group_ids)
    choices = _LIES.get(type(message))
    return None if choices is None else msgspec.structs.replace(message, **rng.choice(choices))


def _first(array: Any, value: Any) -> Any:
    changed = array.copy()
    changed[0] = value
    return changed


def _more_tokens(message: TokensDecoded) -> TokensDecoded:
    """Than any response may have."""
    extra = 4096
    num_tokens = _first(message.num_tokens, int(message.num_tokens[0]) + extra)
    tokens, logprobs = np.zeros(extra, np.int32), np.zeros(extra, np.float32)
    return msgspec.structs.replace(
        message,
        num_tokens=num_tokens,
        token_ids=np.concatenate((tokens, message.token_ids)),
        logprobs=np.concatenate((logprobs, message.logprobs)),
    )


_LIES_OF_TOKENS: tuple[Callable[[TokensDecoded], TokensDecoded], ...] = (
    _more_tokens,
    lambda message: msgspec.structs.replace(message, policy_version=FAR),
    lambda message: msgspec.structs.replace(message, policy_version=-1),
    lambda message: msgspec.structs.replace(message, sample_ids=_first(message.sample_ids, NEVER_ASKED)),
    lambda message: msgspec.structs.replace(message, token_ids=_first(message.token_ids, -5)),
    lambda message: msgspec.structs.replace(message, logprobs=_first(message.logprobs, _NAN)),
    lambda message: msgspec.structs.replace(message, logprobs=_first(message.logprobs, 3.0)),
)

_LIES_OF_GROUPS: tuple[Callable[[TrainGroup], TrainGroup], ...] = (
    lambda group: msgspec.structs.replace(group, step=FAR),
    lambda group: msgspec.structs.replace(group, group_id=-1),
    lambda group: msgspec.structs.replace(group, versions=_first(group.versions, FAR)),
    lambda group: msgspec.structs.replace(group, versions=_first(group.versions, -1)),
    lambda group: msgspec.structs.replace(group, token_ids=_first(group.token_ids, -5)),
    lambda group: msgspec.structs.replace(group, rewards=_first(group.rewards, _NAN)),
    lambda group: msgspec.structs.replace(group, weights=_first(group.weights, 0.0)),
)
