"""Divides a step's sum: a share per token, and one denominator per group.

The loss of a step is `sum over tokens of share * loss / sum over groups of denominator`:

    aggregate      share of a token               denominator of a group
    token_mean     1                              its tokens                                  (DAPO, arXiv 2503.14476)
    sequence_mean  1 / tokens of its sample       its samples                                 (GRPO, 2402.03300)
    constant       1                              its samples * max_new_tokens                (Dr.GRPO, 2503.20783)

Tokens older than `max_token_staleness` are left out, and with `overlong_filter` those of samples that reached
`max_new_tokens` (DAPO, section 3.4). They have share 0; neither they nor a sample of only such tokens count.
"""

import numpy as np
from numpy.typing import NDArray

from darts_async.config import LossConfig
from darts_async.protocol import TrainGroup


def token_shares(group: TrainGroup, config: LossConfig, max_new_tokens: int) -> NDArray[np.float32]:
    """The share of each token of the group: [num_tokens]."""
    trained = _trained(group, config, max_new_tokens)
    if config.aggregate == "sequence_mean":
        counts = _trained_per_sample(group, trained)
        trained = trained / np.repeat(np.maximum(counts, 1), group.num_tokens)
    return trained.astype(np.float32)


def denominator(group: TrainGroup, config: LossConfig, max_new_tokens: int) -> float:
    """What the group adds to the step's denominator; 0 if no token of it is trained on."""
    counts = _trained_per_sample(group, _trained(group, config, max_new_tokens))
    if config.aggregate == "token_mean":
        return float(counts.sum())
    num_samples = float(np.count_nonzero(counts))
    return num_samples * max_new_tokens if config.aggregate == "constant" else num_samples


def _trained(group: TrainGroup, config: LossConfig, max_new_tokens: int) -> NDArray[np.bool_]:
    trained = np.ones(len(group.token_ids), np.bool_)
    if config.max_token_staleness is not None:
        trained &= group.step - group.versions <= config.max_token_staleness
    if config.overlong_filter:
        trained &= np.repeat(group.num_tokens < max_new_tokens, group.num_tokens)
    return trained


def _trained_per_sample(group: TrainGroup, trained: NDArray[np.bool_]) -> NDArray[np.int64]:
    before = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
    ends = np.cumsum(group.num_tokens, dtype=np.int64)
    counts: NDArray[np.int64] = before[ends] - before[ends - group.num_tokens]
    return counts
