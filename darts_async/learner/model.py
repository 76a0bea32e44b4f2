"""The model in training: a Hugging Face causal language model, and its packed forward pass.

Whether a model keeps packed sequences apart cannot be read off its class (state-space layers, say, run across
them), so `load_model` tries it out: packed logits must equal those of each sequence alone in the model's own
attention. A model that fails is refused, not trained on mixed samples.
"""

import os
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import structlog
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from darts_async.errors import ModelError
from darts_async.learner.attention import PACKED_ATTENTION, packing
from darts_async.learner.batch import PackedBatch
from darts_async.learner.logprobs import Head, Scores, head_logprobs, head_scores, logits_scores
from darts_async.learner.tree import Tree
from darts_async.models import TOKENIZER_FILE, load_tokenizer
from darts_async.truncation import WHOLE, Truncation

PackedRow = tuple[Tensor, Tensor, tuple[Tree, ...], Tensor]
"""Token ids, positions, layout, and the places whose logits are wanted."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

COMPILED_DIR = Path.home() / ".cache" / "darts_async" / "compiled"
"""Not below TMPDIR, which a process of a run has to itself and leaves nothing in."""
_PROBE = ((1, 2, 3, 4, 5), (1, 2, 3), (1, 2, 5, 4, 3))
_PROBE_SHARED = 2
"""The first tokens of the last two."""
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of packed logits relative to the largest logit: room for rounding, none for another sample."""


log = structlog.get_logger()


def load_model(path: str, *, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """A causal LM with its trained head, ready for `response_logprobs`, in evaluation mode.

    Dropout stays off, because the ratio to the generator's probabilities would otherwise be noise at lag 0.
    Raises `ModelError` if there is no such model, it lacks weights, its tokenizer has more tokens than it, or it cannot
    be packed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    model, loading = _from_pretrained(path, DTYPES[dtype])
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {path} lack {missing[0]} (of {len(missing)} missing): a causal language model with "
            "its trained output head is needed"
        )
    model = model.to(device).eval()
    _check_vocabulary(model, Path(path))
    use_packed_attention(model)
    return model


def _from_pretrained(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local and not os.path.isdir(path):
        raise ModelError(f"model.path is {path}, but there is no such directory")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"model.path is {path}, but no causal language model can be loaded from it: {error}"
        ) from error
    return model, loading


def _check_vocabulary(model: PreTrainedModel, directory: Path) -> None:
    """Raises `ModelError` if the directory has a tokenizer with tokens that the model has no row for."""
    if not (directory / TOKENIZER_FILE).is_file():
        return
    vocabulary = load_tokenizer(directory).get_vocab(with_added_tokens=True)
    token, token_id = max(vocabulary.items(), key=lambda item: item[1])
    num_rows = model.get_input_embeddings().weight.shape[0]
    if token_id >= num_rows:
        raise ModelError(
            f"the tokenizer in {directory} has a token {token!r} with id {token_id}, but the model's vocabulary has "
            f"{num_rows} rows; they belong to different models, or the model was not resized when tokens were added"
        )


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch the model to packed attention, after which only `response_logprobs` may call it.

    Raises `ModelError` if its sequences would not stay apart. Whether samples may share a prompt is tried out too, and
    said by the model's `shares_prompts`.
    """
    device = model.get_input_embeddings().weight.device
    sequences = [torch.tensor(ids, device=device) for ids in _PROBE]
    with torch.no_grad():
        alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
        _set_packed_attention(model)
        packed_row = _row(sequences, tuple(Tree(len(ids)) for ids in _PROBE))
        expected = torch.cat(alone)
        tolerance = _PROBE_TOLERANCE[expected.dtype]
        difference = _relative(_logits(model, *packed_row), expected)
        if not difference <= tolerance:
            raise ModelError(
                f"{type(model).__name__} cannot be trained on packed sequences: its logits differ from those of each "
                f"sequence alone by {difference:.1e} of the largest; its layers mix neighbours or ignore position_ids"
            )
        _choose_head(model, packed_row, expected)
        first, second, third = sequences
        rows = [first, second, third[_PROBE_SHARED:]]
        tree = Tree(_PROBE_SHARED, (len(second) - _PROBE_SHARED, len(third) - _PROBE_SHARED))
        shared_row = _row(rows, (Tree(len(first)), tree))
        difference = _relative(_logits(model, *shared_row), torch.cat([*alone[:2], alone[2][_PROBE_SHARED:]]))
        model.shares_prompts = difference <= tolerance
        if not model.shares_prompts:
            log.warning("prompts_are_not_shared", model=type(model).__name__, difference=difference)


def _row(parts: list[Tensor], trees: tuple[Tree, ...]) -> PackedRow:
    """These tokens, laid out in trees, and all their places."""
    input_ids = torch.cat(parts)
    positions = [position for tree in trees for position in tree.positions()]
    places = torch.arange(len(input_ids), device=input_ids.device)
    return input_ids, torch.tensor(positions, device=input_ids.device), trees, places


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of each layer for the backward pass. Raises `ModelError` if the model cannot.

    transformers does so only in layers that are in training mode. The model is not, for the sake of dropout; so the
    flag is set on the layers themselves and not on what is inside them.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"learner.activation_checkpointing is on, but {type(model).__name__} does not support it; switch it off"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True


def compile_model(model: PreTrainedModel) -> None:
    """Compile every layer, and what surrounds the products of the head, at their first pass; before it is sharded.

    Layers share what is compiled, and it fits batches of every size. It is kept on disk for the next start, in
    `COMPILED_DIR` if TORCHINDUCTOR_CACHE_DIR names no other place. Raises `ModelError` if the model names no layers.
    """
    layers = layers_of(model)
    if not layers:
        raise ModelError(f"learner.compile is on, but {type(model).__name__} names no layers to compile; switch it off")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILED_DIR))
    for layer in layers:
        layer.compile(dynamic=True)
    if model.packed_logprobs.__func__ is _logprobs_in_rows:
        model.packed_logprobs = MethodType(partial(_logprobs_in_rows, compiled=True), model)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """What the model repeats, outermost; empty if it does not say."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def response_scores(
    model: PreTrainedModel,
    batch: PackedBatch,
    temperature: float,
    truncation: Truncation = WHOLE,
    *,
    entropy_gradient: bool = False,
) -> Scores:
    """Of each target, under the distribution that was drawn from. The entropy has a gradient only if asked for."""
    scores: Scores = model.packed_logprobs(batch, temperature, truncation)
    return scores if entropy_gradient else scores._replace(entropy=scores.entropy.detach())


def response_logprobs(
    model: PreTrainedModel, batch: PackedBatch, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at `temperature`, and the entropy in nats there, without truncation.

    The entropy has a gradient only with `entropy_gradient`. Returns: two float32 tensors [num_targets].
    """
    scores = response_scores(model, batch, temperature, entropy_gradient=entropy_gradient)
    return scores.logprobs, scores.entropy


def _logprobs_in_rows(
    model: PreTrainedModel, batch: PackedBatch, temperature: float, truncation: Truncation, *, compiled: bool = False
) -> Scores:
    hidden = _hidden(model, batch.input_ids, batch.position_ids, batch.trees, batch.logit_places)
    return head_scores(hidden, Head.of(model), batch.targets, temperature, truncation, compiled=compiled)


def _logprobs_at_once(model: PreTrainedModel, batch: PackedBatch, temperature: float, truncation: Truncation) -> Scores:
    logits = _logits(model, batch.input_ids, batch.position_ids, batch.trees, batch.logit_places)
    return logits_scores(logits, batch.targets, temperature, truncation)


def _choose_head(model: PreTrainedModel, packed_row: PackedRow, logits: Tensor) -> None:
    """Give the model its method `packed_logprobs`: in rows if `Head` says what the model's own head does.

    It is a method, so that whoever shards the model can have its parameters gathered around the call
    (`torch.distributed.fsdp.register_fsdp_forward_method`).
    """
    reason = _why_not_in_rows(model, packed_row, logits)
    if reason is None:
        model.packed_logprobs = MethodType(_logprobs_in_rows, model)
        return
    log.warning("logits_held_at_once", model=type(model).__name__, reason=reason)
    model.packed_logprobs = MethodType(_logprobs_at_once, model)


def _why_not_in_rows(model: PreTrainedModel, packed_row: PackedRow, logits: Tensor) -> str | None:
    try:
        head = Head.of(model)
    except TypeError as error:
        return str(error)
    expected = logits.float().log_softmax(-1)
    targets = expected.argmin(-1)  # where a wrong scale or cap shows most
    found, _ = head_logprobs(_hidden(model, *packed_row), head, targets, 1.0)
    difference = _relative(found, expected.gather(-1, targets[:, None])[:, 0])
    if difference <= _PROBE_TOLERANCE[logits.dtype]:
        return None
    return f"its log-probabilities differ by {difference:.1e} of the largest from those of a linear head"


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _set_packed_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation(PACKED_ATTENTION)
    if model.config._attn_implementation != PACKED_ATTENTION:  # a warning is all transformers gives
        raise ModelError(f"{type(model).__name__} cannot be trained on packed sequences: its attention is built in")


def _hidden(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, trees: tuple[Tree, ...], places: Tensor
) -> Tensor:
    """What the head sees, [num_places, hidden_size], of the packed row `input_ids` [num_packed_tokens]."""
    output = model.base_model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        use_cache=False,
        **packing(trees, input_ids.device),
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden[places]


def _logits(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, trees: tuple[Tree, ...], places: Tensor
) -> Tensor:
    """Logits [num_places, vocabulary] of the packed row `input_ids` [num_packed_tokens]."""
    output = model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        use_cache=False,
        logits_to_keep=places,
        **packing(trees, input_ids.device),
    )
    logits: Tensor = output.logits[0]
    return logits
