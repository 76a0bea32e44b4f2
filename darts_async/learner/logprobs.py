"""Log-probabilities and entropies from hidden states, a few rows of logits at a time.

    z = softcap(scale * (h W^T + bias)) / temperature
    logprob = z[target] - logsumexp(z),   entropy = logsumexp(z) - sum(softmax(z) * z)

With a vocabulary of 150,000 the logits of 8,192 tokens are 5 GB in float32, and autograd keeps several copies. Here
neither pass ever holds more than some rows of them (see `_row_slices`). The backward pass computes them again, which
costs one more product with the head, a third more of the head's work; where all fit they are kept instead. The gradient
of the head's weight is summed up in float32, whatever the weight's own precision is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

_ROWS_BYTES = 2**26
_FEWEST_ROWS = {"cpu": 256, "cuda": 1024}
"""So that the product with the head is bound by arithmetic and not by reading the weight."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a causal language model makes of its last hidden states."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """As the model's configuration says, which is for the caller to check against the model's own logits.

        Raises: `TypeError` if the head is no plain linear layer.
        """
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        if type(module) is not nn.Linear:
            raise TypeError(f"its output head is {type(module).__name__}, not a linear layer")
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return cls(module, float(scale), getattr(config, "final_logit_softcapping", None))


def head_logprobs(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at `temperature`, and the entropy in nats there.

    Args: `hidden` [num_tokens, hidden_size], `targets` [num_tokens] int64. Returns: two float32 tensors [num_tokens].
    """
    constants = (head.scale, head.softcap or 0.0, temperature)
    found: tuple[Tensor, Tensor] = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.linear.weight, head.linear.bias, targets, *constants
    )
    return found


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        norms, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        slices = _row_slices(hidden, weight)
        kept = None
        for rows in slices:
            z = _scores(hidden[rows], weight, bias, scale, softcap, temperature)
            norms[rows] = z.logsumexp(-1)
            log_p = z.sub_(norms[rows, None])
            kept = log_p if len(slices) == 1 else None
            logprobs[rows] = log_p.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -torch.linalg.vecdot(log_p.exp(), log_p)
        ctx.save_for_backward(hidden, weight, bias, targets, norms, entropy, kept)
        ctx.constants = scale, softcap, temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norms, entropy, kept = ctx.saved_tensors
        scale, softcap, temperature = ctx.constants
        grad_hidden = torch.empty_like(hidden)
        trains_head = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains_head else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _row_slices(hidden, weight):
            log_p = kept
            if log_p is None:
                log_p = _scores(hidden[rows], weight, bias, scale, softcap, temperature).sub_(norms[rows, None])
            grad = _grad_scores(
                log_p,
                targets[rows, None],
                None if grad_logprobs is None else grad_logprobs[rows, None],
                None if grad_entropy is None else grad_entropy[rows, None],
                entropy[rows, None],
            )
            grad = grad.mul_(_slope(log_p, norms[rows, None], scale, softcap, temperature)).to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        grads = (None if grad is None else grad.to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_hidden, *grads, None, None, None, None


def _row_slices(hidden: Tensor, weight: Tensor) -> list[slice]:
    num_rows = max(_FEWEST_ROWS.get(hidden.device.type, 256), _ROWS_BYTES // (4 * len(weight)))
    return [slice(start, min(start + num_rows, len(hidden))) for start in range(0, len(hidden), num_rows)]


def _scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float, temperature: float
) -> Tensor:
    """z of the module, [num_rows, vocabulary] float32. The product is rounded as the model rounds it."""
    z = linear(hidden, weight, bias).float()
    if softcap:
        return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    return z.mul_(scale / temperature) if scale != temperature else z


def _slope(log_p: Tensor, norms: Tensor, scale: float, softcap: float, temperature: float) -> Tensor | float:
    """The derivative of z = log_p + norms by the product of hidden state and head."""
    if not softcap:
        return scale / temperature
    share = (log_p + norms).mul_(temperature / softcap)
    return (1 - share.square_()).mul_(scale / temperature)


def _grad_scores(
    log_p: Tensor, targets: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, entropy: Tensor
) -> Tensor:
    """The gradient by z: `g (onehot - p) - g' p (log p + H)`."""
    p = log_p.exp()
    if grad_entropy is not None:
        factor = (log_p + entropy).mul_(-grad_entropy)
        grad = p * (factor if grad_logprobs is None else factor.sub_(grad_logprobs))
    else:
        assert grad_logprobs is not None
        grad = p.mul_(-grad_logprobs)
    if grad_logprobs is not None:
        grad.scatter_add_(-1, targets, grad_logprobs)
    return grad
