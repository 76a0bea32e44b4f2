"""Drawing the next token of all running samples at once: temperature, top-k, top-p, inverse of the distribution.

The token is the first whose cumulative probability, in vocabulary order, exceeds a uniform number made from the
sample's seed and the token's place. Truncated rows are put back into vocabulary order before drawing, so what a
sample draws does not depend on the company it is in.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darts_async.errors import EngineError


def draw(
    logits: Tensor,  # [num_samples, vocab_size]
    uniforms: NDArray[np.float64],  # [num_samples], in (0, 1)
    *,
    temperature: NDArray[np.float32],  # [num_samples]
    top_p: NDArray[np.float32],  # [num_samples]
    top_k: NDArray[np.int64],  # [num_samples]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens and their log-probabilities under the distribution they were drawn from.

    Raises `EngineError` if a row has logits that are not finite.
    """
    logprobs = _log_distribution(logits, temperature, top_p, top_k)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise EngineError("the model's logits are not finite: its weights have diverged or were damaged")
    tokens = torch.searchsorted(cumulative, torch.from_numpy(uniforms).unsqueeze(1) * total, right=True)
    chosen = logprobs.gather(1, tokens)
    return tokens.squeeze(1).numpy().astype(np.int32), chosen.squeeze(1).numpy()


def _log_distribution(
    logits: Tensor, temperature: NDArray[np.float32], top_p: NDArray[np.float32], top_k: NDArray[np.int64]
) -> Tensor:
    scaled = logits.float()
    if (temperature != 1).any():
        scaled = scaled / torch.from_numpy(temperature.copy()).unsqueeze(1)
    rows = np.flatnonzero((top_p < 1) | ((top_k > 0) & (top_k < logits.shape[1])))
    if len(rows):
        index = torch.from_numpy(rows)
        truncated = _truncate(scaled[index], torch.from_numpy(top_p[rows]), torch.from_numpy(top_k[rows]))
        scaled = scaled.index_copy(0, index, truncated)
    return scaled.log_softmax(-1)


def _truncate(scaled: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Minus infinity outside the k likeliest tokens and, of these, outside the smallest set of weight `top_p`."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1])
    ordered = ordered.masked_fill((top_k.unsqueeze(1) > 0) & (rank >= top_k.unsqueeze(1)), -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
    ordered = ordered.masked_fill((before >= top_p.unsqueeze(1)) & (top_p.unsqueeze(1) < 1), -torch.inf)
    return torch.empty_like(scaled).scatter_(1, order, ordered)
