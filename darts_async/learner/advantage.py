"""Group-relative advantages: how much better a sample is than its siblings.

Invariants. Equal rewards give exactly zero, whatever the weights. The weighted sum over a group is zero up to
rounding, so a group moves probability between its samples and never up or down as a whole. With unit weights
the formula is GRPO's (DeepSeekMath, arXiv 2402.03300, section 4.1) and without the division Dr. GRPO's
(arXiv 2503.20783).
"""

import numpy as np
from numpy.typing import NDArray

STD_EPSILON = 1e-6


def group_advantages(
    rewards: NDArray[np.float32], weights: NDArray[np.float32], *, normalise: bool
) -> NDArray[np.float32]:
    """`w_i (r_i - mean) / (std + 1e-6)`, or `w_i (r_i - mean)` if not `normalise`.

    The weights stand for samples that were not kept. So the baseline is the weighted mean
    `sum(w r) / sum(w)`, the deviation is the weighted population standard deviation, and each sample's term
    of the loss is multiplied by its weight, which is done here: the surrogate is linear in the advantage.

    Args: rewards and positive weights, both [num_samples]. Returns: [num_samples].
    """
    if np.all(rewards == rewards[0]):
        return np.zeros(len(rewards), np.float32)
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    centred = rewards - share @ rewards
    scale = np.sqrt(share @ centred**2) + STD_EPSILON if normalise else 1.0
    advantages: NDArray[np.float32] = (weights * centred / scale).astype(np.float32)
    return advantages
