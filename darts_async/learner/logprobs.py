"""Log-probabilities and entropies from hidden states, a few rows of logits at a time.

    z = softcap(scale * (h W^T + bias)) / temperature
    logprob = z[target] - logsumexp(z),   entropy = logsumexp(z) - sum(softmax(z) * z)

Where tokens are drawn from a truncated distribution (see `truncation`), the policy is truncated too. With S the tokens
that truncation keeps

    logprob = z[target] - logsumexp of z over S and the target,

whose gradient is that of the truncated policy for a constant S. Of tokens that are tied at the edge of S only some are
in it, among them the target; the others enter sum and gradient with the share of them that is kept. S follows from
these logits, because the policy in training truncates its own distribution and not that of the policy that decoded. At
lag 0 the two are equal, and the ratio of a token is 1. The target always belongs to S: at the edge the engine may round
differently, and an older policy may have kept what this one would not.

With a vocabulary of 150,000 the logits of 8,192 tokens are 5 GB in float32, and autograd keeps several copies. Here
neither pass holds more than some rows of them (see `_row_slices`). The backward pass computes them again, a third more
of the head's work; if all fit, they are kept instead. The gradient of the head's weight is summed in float32, whatever
the weight's precision is.

On a GPU everything but the products is bound by memory: a dozen passes over the logits, or two or three if compiled.
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

from darts_async.truncation import WHOLE, Truncation, is_outside, kept_tokens, part_kept

_ROWS_BYTES = 2**26
_FEWEST_ROWS = {"cpu": 256, "cuda": 1024}
"""With so many, the product with the head is bound by arithmetic and not by reading the weight."""


@dataclass(frozen=True, slots=True)
class Head:
    """How a causal language model maps its last hidden states to logits."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """As the model's configuration says; the caller checks it against the model's own logits. Raises `TypeError`
        if the head is not a plain linear layer."""
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        if type(module) is not nn.Linear:
            raise TypeError(f"its output head is {type(module).__name__}, not a linear layer")
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return cls(module, float(scale), getattr(config, "final_logit_softcapping", None))


class Scores(NamedTuple):
    """What the model says of each target at the temperature; float32, [num_tokens] each."""

    logprobs: Tensor
    """Of the target, under the distribution that tokens are drawn from: the truncated one if there is a truncation."""
    entropy: Tensor
    """Of the whole distribution, in nats: an entropy bonus must also reach tokens that truncation leaves out now."""
    whole: Tensor
    """As `logprobs`, without the truncation."""
    outside: Tensor | None = None
    """bool: the model's own truncation would not have kept the target. None: there is no truncation."""


def head_scores(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    truncation: Truncation = WHOLE,
    *,
    compiled: bool = False,
) -> Scores:
    """From `hidden` [num_tokens, hidden_size] and `targets` [num_tokens] int64; `compiled`: with `torch.compile`."""
    constants = _Constants(head.scale, head.softcap or 0.0, temperature, truncation)
    whole, entropy, log_weight, outside = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.linear.weight, head.linear.bias, targets, constants, _compiled() if compiled else _EAGER
    )
    return Scores(whole if log_weight is None else whole - log_weight, entropy, whole, outside)


def logits_scores(logits: Tensor, targets: Tensor, temperature: float, truncation: Truncation = WHOLE) -> Scores:
    """The same from logits [num_tokens, vocab_size]."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    whole, entropy = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    if not truncation.is_on:
        return Scores(whole, entropy, whole)
    kept, of_targets = kept_tokens(log_p, truncation), whole.detach()[:, None]
    part = part_kept(log_p.detach(), kept.edge, kept.share(of_targets)).scatter(-1, targets[:, None], 1.0)
    log_weight = (log_p.exp() * part).sum(-1).log()
    return Scores(whole - log_weight, entropy, whole, is_outside(kept.edge, of_targets)[:, 0])


class _Constants(NamedTuple):
    scale: float
    softcap: float
    """0: there is none."""
    temperature: float
    truncation: Truncation


class _OfRows(NamedTuple):
    """Of some rows of logits; each [num_rows]."""

    logprobs: Tensor
    norms: Tensor
    """logsumexp(z)"""
    entropy: Tensor
    log_weight: Tensor | None = None
    """Log of the weight of the kept set. This one and the next are None without truncation."""
    edge: Tensor | None = None
    """The log-probability of the least likely token of that set."""
    share: Tensor | None = None
    """The part of each token with that log-probability that is in it; the target is in it as a whole."""

    def at(self, rows: slice) -> "_OfRows":
        """Some of the rows, [num_rows, 1] each."""
        return _OfRows(*(values[rows, None] for values in self if values is not None))

    @classmethod
    def joined(cls, parts: "list[_OfRows]") -> "_OfRows":
        found = ([values for values in part if values is not None] for part in parts)
        return cls(*map(torch.cat, zip(*found, strict=True)))


class _Gradients(NamedTuple):
    """By the outputs; each [num_rows, 1], None if it is zero."""

    logprobs: Tensor | None
    entropy: Tensor | None
    log_weight: Tensor | None

    def at(self, rows: slice) -> "_Gradients":
        """Of some rows of [num_tokens] each."""
        return _Gradients(*(None if values is None else values[rows, None] for values in self))


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
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        slices = _row_slices(hidden, weight)
        parts, kept = [], None
        for rows in slices:
            raw = linear(hidden[rows], weight, bias)
            part, kept = rows_of.logprobs(raw, targets[rows, None], constants, keep=len(slices) == 1)
            parts.append(part)
        found = _OfRows.joined(parts)
        ctx.save_for_backward(hidden, weight, bias, targets, kept, *found)
        ctx.constants, ctx.rows_of = constants, rows_of
        ctx.set_materialize_grads(False)
        outside = None
        if found.edge is not None:
            outside = is_outside(found.edge, found.logprobs)
            ctx.mark_non_differentiable(outside)
        return found.logprobs, found.entropy, found.log_weight, outside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept, *found = ctx.saved_tensors
        of_rows, by_outputs = _OfRows(*found), _Gradients(*grads[:3])
        grad_hidden = torch.empty_like(hidden)
        trains_head = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains_head else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _row_slices(hidden, weight):
            grad, at_target = ctx.rows_of.gradient(
                linear(hidden[rows], weight, bias) if kept is None else kept,
                targets[rows, None],
                of_rows.at(rows),
                by_outputs.at(rows),
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
        by_head = (None if grad is None else grad.to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_hidden, *by_head, None, None, None


def _row_slices(hidden: Tensor, weight: Tensor) -> list[slice]:
    num_rows = max(_FEWEST_ROWS.get(hidden.device.type, 256), _ROWS_BYTES // (4 * len(weight)))
    return [slice(start, min(start + num_rows, len(hidden))) for start in range(0, max(len(hidden), 1), num_rows)]


# --- some rows of logits, with nothing of the size of the logits but what is returned ---------------------------------


def _logprobs_of_rows(
    raw: Tensor, targets: Tensor, constants: _Constants, *, keep: bool
) -> tuple[_OfRows, Tensor | None]:
    """The numbers of each row, and all log-probabilities if `keep`. `raw` [num_rows, vocabulary], rounded as the model
    rounds it, is overwritten."""
    z = _scores(raw, constants)
    norms = z.logsumexp(-1)
    log_p = z.sub_(norms[:, None])
    entropy = -log_p.exp().mul_(log_p).sum(-1)
    found = _OfRows(log_p.gather(-1, targets)[:, 0], norms, entropy)
    if constants.truncation.is_on:
        found = found._replace(**_weight_of_kept(log_p, found.logprobs, constants.truncation))
    return found, log_p if keep else None


def _weight_of_kept(log_p: Tensor, of_targets: Tensor, truncation: Truncation) -> dict[str, Tensor]:
    """Of the kept set. The target belongs to it whatever these weights say, because it was drawn."""
    kept, of_targets = kept_tokens(log_p, truncation), of_targets[:, None]
    share = kept.share(of_targets)
    others = part_kept(log_p, kept.edge, share).mul_(log_p.exp()).sum(-1, keepdim=True)
    target_in_others = part_kept(of_targets, kept.edge, share)
    log_weight = (others + (1 - target_in_others) * of_targets.exp()).log()
    return {"log_weight": log_weight[:, 0], "edge": kept.edge[:, 0], "share": share[:, 0]}


def _gradient_of_rows(
    raw: Tensor,
    targets: Tensor,
    found: _OfRows,
    grads: _Gradients,
    constants: _Constants,
    dtype: torch.dtype,
    *,
    is_kept: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient by `raw`, [num_rows, vocabulary], as if no column were a target, and that of the target's column,
    [num_rows, 1]. If log-probabilities were kept, `raw` is these."""
    log_p = raw if is_kept else _scores(raw, constants).sub_(found.norms)
    of_targets = log_p.gather(-1, targets)
    at_target = _grad_scores(of_targets, found, grads, is_drawn=True)
    if grads.logprobs is not None:
        at_target = at_target + grads.logprobs
    at_target = at_target * _slope(of_targets, found.norms, constants)
    grad = _grad_scores(log_p, found, grads, is_drawn=False).mul_(_slope(log_p, found.norms, constants))
    return grad.to(dtype), at_target.to(dtype)


def _scores(raw: Tensor, constants: _Constants) -> Tensor:
    """z of the module, [num_rows, vocabulary] float32."""
    scale, softcap, temperature, _ = constants
    z = raw.float()
    if softcap:
        return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    return z.mul_(scale / temperature) if scale != temperature else z


def _slope(log_p: Tensor, norms: Tensor, constants: _Constants) -> Tensor | float:
    """The derivative of z = log_p + norms by the product of hidden state and head."""
    scale, softcap, temperature, _ = constants
    if not softcap:
        return scale / temperature
    share = (log_p + norms).mul_(temperature / softcap)
    return (1 - share.square_()).mul_(scale / temperature)


def _grad_scores(log_p: Tensor, found: _OfRows, grads: _Gradients, *, is_drawn: bool) -> Tensor:
    """The gradient by z, but for the target's column: `-g p - g' p (log p + H) + g" p (part kept / weight - 1)`."""
    p = log_p.exp()
    factor: Tensor | None = None
    if grads.entropy is not None:
        factor = (log_p + found.entropy).mul_(-grads.entropy)
    if grads.logprobs is not None:
        factor = -grads.logprobs if factor is None else factor.sub_(grads.logprobs)
    if grads.log_weight is not None:
        assert found.log_weight is not None
        assert found.edge is not None
        assert found.share is not None
        share = torch.exp(-found.log_weight)
        if not is_drawn:
            share = share * part_kept(log_p, found.edge, found.share)
        of_weight = (share - 1) * grads.log_weight
        factor = of_weight if factor is None else factor + of_weight
    assert factor is not None
    return p.mul_(factor)


class _Rows(NamedTuple):
    logprobs: Callable[..., tuple[_OfRows, Tensor | None]]
    gradient: Callable[..., tuple[Tensor, Tensor]]


_EAGER = _Rows(_logprobs_of_rows, _gradient_of_rows)


@cache
def _compiled() -> _Rows:  # not at import: it brings in the compiler
    return _Rows(torch.compile(_logprobs_of_rows, dynamic=True), torch.compile(_gradient_of_rows, dynamic=True))
