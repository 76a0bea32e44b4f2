"""Bounds on the ratio to the behaviour policy: truncation and masks, per token or per sequence.

Truncation, `min(w, C)`: IMPALA (arXiv 1802.01561), for the gap between engine and trainer "TIS" (Yao et al., 2025).
Mask, `w if low <= w <= high else 0`: IcePop (Ring-1T, arXiv 2510.18855), where alpha, beta are 0.5 and 5.
The ratio of a sequence is the product over its tokens, what an unbiased weight of a whole sample would be.
"""

import math

from torch import Tensor

from darts_async.config import LossConfig
from darts_async.learner.losses.surrogates import LARGEST_LOG_RATIO
from darts_async.learner.packing.sequences import Sequences


def importance_weights(log_ratio: Tensor, sequences: Sequences, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The bounded weight of each token, [num_tokens], without gradient, and the share that was bounded."""
    log_weight = _at_level(log_ratio, sequences, config)
    if config.importance.endswith("mask"):
        kept = _inside(log_weight, config)
        return log_weight.clamp(max=LARGEST_LOG_RATIO).exp() * kept, {"masked_share": ~kept}
    limit = LARGEST_LOG_RATIO if config.importance_high is None else math.log(config.importance_high)
    return log_weight.clamp(max=limit).exp(), {"truncated_share": log_weight > limit}


def importance_mask(
    log_ratio: Tensor, sequences: Sequences, config: LossConfig
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Which tokens a mask leaves in, [num_tokens] bool; None where the configuration has no mask."""
    if not config.importance.endswith("mask"):
        return None, {}
    kept = _inside(_at_level(log_ratio, sequences, config), config)
    return kept, {"masked_share": ~kept}


def _at_level(log_ratio: Tensor, sequences: Sequences, config: LossConfig) -> Tensor:
    return sequences.sum(log_ratio.detach()) if config.importance.startswith("sequence") else log_ratio.detach()


def _inside(log_weight: Tensor, config: LossConfig) -> Tensor:
    assert config.importance_low is not None
    assert config.importance_high is not None
    return (log_weight >= math.log(config.importance_low)) & (log_weight <= math.log(config.importance_high))
