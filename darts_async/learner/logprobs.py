"""Log-probabilities and entropies from hidden states, a few rows of logits at a time.

    z = softcap(scale * (h W^T + bias)) / temperature
    logprob = z[target] - logsumexp(z),   entropy = logsumexp(z) - sum(softmax(z) * z)

With a vocabulary of 150,000 the logits of 8,192 tokens are 5 GB in float32, and autograd keeps several copies. Here
neither pass ever holds more than some rows of them (see `_row_slices`). The backward pass computes them again, which
costs one more product with the head, a third more of the head's work; where all fit they are kept instead. The gradient
of the head's weight is summed up in float32, whatever the weight's own precision is.

On a GPU what surrounds the products is bound by memory: a dozen passes over the logits. Compiled they are two or three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

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


def head_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at `temperature`, and the entropy in nats there.

    Args: `hidden` [num_tokens, hidden_size], `targets` [num_tokens] int64; `compiled`: with `torch.compile`.
    Returns: two float32 tensors [num_tokens].
    """
    constants = _Constants(head.scale, head.softcap or 0.0, temperature)
    found: tuple[Tensor, Tensor] = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.linear.weight, head.linear.bias, targets, constants, _compiled() if compiled else _EAGER
    )
    return found


class _Constants(NamedTuple):
    scale: float
    softcap: float
    """0: there is none."""
    temperature: float


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        constants: _Constants,
        rows_of: "_Rows",
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        norms, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        slices = _row_slices(hidden, weight)
        kept = None
        for rows in slices:
            raw = linear(hidden[rows], weight, bias)
            logprobs[rows], norms[rows], entropy[rows], kept = rows_of.logprobs(
                raw, targets[rows, None], constants, keep=len(slices) == 1
            )
        ctx.save_for_backward(hidden, weight, bias, targets, norms, entropy, kept)
        ctx.constants, ctx.rows_of = constants, rows_of
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norms, entropy, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        trains_head = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains_head else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _row_slices(hidden, weight):
            grad, at_target = ctx.rows_of.gradient(
                linear(hidden[rows], weight, bias) if kept is None else kept,
                targets[rows, None],
                norms[rows, None],
                entropy[rows, None],
                None if grad_logprobs is None else grad_logprobs[rows, None],
                None if grad_entropy is None else grad_entropy[rows, None],
                ctx.constants,
                weight.dtype,
                is_kept=kept is not None,
            )
            grad.scatter_(-1, targets[rows, None], at_target)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        grads = (None if grad is None else grad.to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_hidden, *grads, None, None, None


def _row_slices(hidden: Tensor, weight: Tensor) -> list[slice]:
    num_rows = max(_FEWEST_ROWS.get(hidden.device.type, 256), _ROWS_BYTES // (4 * len(weight)))
    return [slice(start, min(start + num_rows, len(hidden))) for start in range(0, len(hidden), num_rows)]


# --- some rows of logits, with nothing of the size of the logits but what is returned ---------------------------------


def _logprobs_of_rows(
    raw: Tensor, targets: Tensor, constants: _Constants, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-probabilities of the targets, logsumexp(z) and entropies, [num_rows] each; and all log-probabilities if they
    are to be kept. `raw` [num_rows, vocabulary], rounded as the model rounds it, is used up."""
    z = _scores(raw, constants)
    norms = z.logsumexp(-1)
    log_p = z.sub_(norms[:, None])
    entropy = -log_p.exp().mul_(log_p).sum(-1)
    return log_p.gather(-1, targets)[:, 0], norms, entropy, log_p if keep else None


def _gradient_of_rows(
    raw: Tensor,
    targets: Tensor,
    norms: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    constants: _Constants,
    dtype: torch.dtype,
    *,
    is_kept: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient by `raw`, [num_rows, vocabulary], as if no column were a target, and [num_rows, 1] what stands in
    the target's instead. `raw` is the log-probabilities themselves if they were kept."""
    log_p = raw if is_kept else _scores(raw, constants).sub_(norms)
    of_targets = log_p.gather(-1, targets)
    at_target = _grad_scores(of_targets, grad_logprobs, grad_entropy, entropy)
    if grad_logprobs is not None:
        at_target = at_target + grad_logprobs
    at_target = at_target * _slope(of_targets, norms, constants)
    grad = _grad_scores(log_p, grad_logprobs, grad_entropy, entropy).mul_(_slope(log_p, norms, constants))
    return grad.to(dtype), at_target.to(dtype)


def _scores(raw: Tensor, constants: _Constants) -> Tensor:
    """z of the module, [num_rows, vocabulary] float32."""
    scale, softcap, temperature = constants
    z = raw.float()
    if softcap:
        return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    return z.mul_(scale / temperature) if scale != temperature else z


def _slope(log_p: Tensor, norms: Tensor, constants: _Constants) -> Tensor | float:
    """The derivative of z = log_p + norms by the product of hidden state and head."""
    scale, softcap, temperature = constants
    if not softcap:
        return scale / temperature
    share = (log_p + norms).mul_(temperature / softcap)
    return (1 - share.square_()).mul_(scale / temperature)


def _grad_scores(log_p: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, entropy: Tensor) -> Tensor:
    """The gradient by z where no target stands: `-g p - g' p (log p + H)`."""
    p = log_p.exp()
    if grad_entropy is None:
        assert grad_logprobs is not None
        return p.mul_(-grad_logprobs)
    factor = (log_p + entropy).mul_(-grad_entropy)
    return p.mul_(factor if grad_logprobs is None else factor.sub_(grad_logprobs))


class _Rows(NamedTuple):
    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    gradient: Callable[..., tuple[Tensor, Tensor]]


_EAGER = _Rows(_logprobs_of_rows, _gradient_of_rows)


@cache
def _compiled() -> _Rows:  # not at import: it brings in the compiler
    return _Rows(torch.compile(_logprobs_of_rows, dynamic=True), torch.compile(_gradient_of_rows, dynamic=True))
