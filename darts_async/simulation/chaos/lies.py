"""Well-formed invalid messages, which a process may send before its own, and which a boundary must refuse.

There is no lie here that could be the truth, because nothing can refuse it: another token of the vocabulary with
another log-probability, a wrong reward, a response that ends early, a version that the generator could have, a
checkpoint that was not written, a prompt that is not the one of the group. Checksums and probes find some of these.
"""

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
    TokensDecoded: (
        {"num_tokens": 4096},  # more tokens than any response may have
        {"policy_version": FAR},
        {"policy_version": -1},
        {"sample_ids": NEVER_ASKED},
        {"token_ids": -5},
        {"logprobs": _NAN},
        {"logprobs": 3.0},
    ),
    TrainGroup: (
        {"step": FAR},
        {"group_id": -1},
        {"versions": FAR},
        {"versions": -1},
        {"token_ids": -5},
        {"rewards": _NAN},
        {"weights": 0.0},
    ),
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
"""What is changed in a message. Of an array, its first element."""


def lie_instead_of(message: Message, rng: Random) -> Message | None:
    """What a process may say that could have said this; None if nothing of it can be refused."""
    if isinstance(message, GroupsCommitted):
        return GroupsCommitted(rng.choice((message.step, FAR)), message.group_ids + FAR)
    choices = _LIES.get(type(message))
    if choices is None:
        return None
    values = rng.choice(choices)
    if isinstance(message, TokensDecoded) and "num_tokens" in values:
        return _more_tokens(message, values["num_tokens"])
    return msgspec.structs.replace(message, **{name: _put(getattr(message, name), v) for name, v in values.items()})


def _put(old: Any, value: Any) -> Any:
    if not isinstance(old, np.ndarray):
        return value
    changed = old.copy()
    changed[0] = value
    return changed


def _more_tokens(message: TokensDecoded, extra: int) -> TokensDecoded:
    return msgspec.structs.replace(
        message,
        num_tokens=_put(message.num_tokens, int(message.num_tokens[0]) + extra),
        token_ids=np.concatenate((np.zeros(extra, np.int32), message.token_ids)),
        logprobs=np.concatenate((np.zeros(extra, np.float32), message.logprobs)),
    )
