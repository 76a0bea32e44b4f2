"""The model in training: a Hugging Face causal language model, and the log-probabilities of packed responses. A model
that does not keep packed sequences apart is refused (see `trial`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType

import structlog
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from darts_async.errors import ModelError
from darts_async.learner.logprobs import Head, Scores, head_scores, logits_scores
from darts_async.learner.packing.batch import PackedBatch
from darts_async.learner.packing.forward import packed_hidden, packed_logits
from darts_async.learner.packing.trial import (
    PROBE_TOKENS,
    TOLERANCE,
    Samples,
    TrialOutcome,
    check_packing,
    refusal,
    relative,
    try_packing,
)
from darts_async.models.length_limits import Lengths, why_too_long
from darts_async.models.location import TOKENIZER_FILE, load_tokenizer
from darts_async.models.miniature import foreign_code
from darts_async.truncation import WHOLE, Truncation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

COMPILED_DIR = Path.home() / ".cache" / "darts_async" / "compiled"
"""Not below TMPDIR, which is removed with each process of a run."""


log = structlog.get_logger()


def load_model(path: str, *, dtype: str, lengths: Lengths, device: str = "cpu") -> PreTrainedModel:
    """A causal LM with its trained head, ready for `response_scores` of such lengths, in evaluation mode.

    Dropout stays off, because the ratio to the generator's probabilities would otherwise be noise at lag 0.
    Raises `ModelError` if there is no such model, it lacks weights, its tokenizer has more tokens than it, or samples
    of these lengths cannot be packed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    shares_prompts = _check_lengths(path, lengths)
    with _loading(path):
        model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {path} lack {missing[0]} (of {len(missing)} missing): a causal language model with "
            "its trained output head is needed"
        )
    model = model.to(device).eval()
    _check_vocabulary(model, Path(path))
    use_packed_attention(model, probe_tokens=min(PROBE_TOKENS, lengths.sample))
    model.shares_prompts &= shares_prompts
    return model


def _check_lengths(path: str, lengths: Lengths) -> bool:
    """Whether samples may share a prompt. Raises `ModelError` if samples of these lengths cannot be packed."""
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local and not os.path.isdir(path):
        raise ModelError(f"model.path is {path}, but there is no such directory")
    with _loading(path):
        config = AutoConfig.from_pretrained(path)
    reason = why_too_long(config.to_dict(), lengths.sample)
    if reason is not None:
        raise ModelError(f"model.path is {path}: {reason}")
    return check_packing(config, lengths)


@contextmanager
def _loading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.path is {path}, but no causal language model can be loaded from it: {error}"
        ) from error


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


def use_packed_attention(model: PreTrainedModel, *, probe_tokens: int = PROBE_TOKENS) -> None:
    """Switch the model to packed attention, after which only `response_scores` may call it.

    It is tried on samples of `probe_tokens`; `check_packing` tries longer ones. Raises `ModelError` if sequences would
    not be kept apart. The model's `shares_prompts` says whether samples may share a prompt, which is tried too.
    """
    outcome = try_packing(model, Samples.within(probe_tokens))
    if not outcome.keeps_apart:
        raise refusal(model, outcome)
    with torch.no_grad():
        _choose_head(model, outcome)
    model.shares_prompts = outcome.shares_prompts
    if not model.shares_prompts:
        log.warning("prompts_are_not_shared", model=type(model).__name__, difference=outcome.shared)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of each layer for the backward pass. Raises `ModelError` if the model cannot.

    transformers does so only in layers in training mode. So that there is no dropout, the mode is set for the layers
    themselves and not for the modules inside.
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
    """Compile every layer, and the head except its products, at their first pass; before the model is sharded.

    Layers share the compiled code, which fits batches of every size. It is kept on disk for the next start, in
    `COMPILED_DIR` unless TORCHINDUCTOR_CACHE_DIR is set. Raises `ModelError` if the model names no layers.
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
    """The repeated layers of the model; empty if it does not name them."""
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
    """Scores of each target. The entropy has a gradient only with `entropy_gradient`."""
    scores: Scores = model.packed_logprobs(batch, temperature, truncation)
    return scores if entropy_gradient else scores._replace(entropy=scores.entropy.detach())


def _logprobs_in_rows(
    model: PreTrainedModel, batch: PackedBatch, temperature: float, truncation: Truncation, *, compiled: bool = False
) -> Scores:
    hidden = packed_hidden(model, batch.input_ids, batch.position_ids, batch.trees, batch.logit_places)
    return head_scores(hidden, Head.of(model), batch.targets, temperature, truncation, compiled=compiled)


def _logprobs_at_once(model: PreTrainedModel, batch: PackedBatch, temperature: float, truncation: Truncation) -> Scores:
    logits = packed_logits(model, batch.input_ids, batch.position_ids, batch.trees, batch.logit_places)
    return logits_scores(logits, batch.targets, temperature, truncation)


def _choose_head(model: PreTrainedModel, outcome: TrialOutcome) -> None:
    """Give the model its method `packed_logprobs`: in rows if `Head` says what the model's own head does.

    It is a method, so that code that shards the model can gather its parameters around the call
    (`torch.distributed.fsdp.register_fsdp_forward_method`).
    """
    reason = _why_not_in_rows(model, outcome)
    if reason is None:
        model.packed_logprobs = MethodType(_logprobs_in_rows, model)
        return
    log.warning("logits_held_at_once", model=type(model).__name__, reason=reason)
    model.packed_logprobs = MethodType(_logprobs_at_once, model)


def _why_not_in_rows(model: PreTrainedModel, outcome: TrialOutcome) -> str | None:
    if model.base_model is model:
        return "it does not name the part of it that is below its head"
    try:
        head = Head.of(model)
    except TypeError as error:
        return str(error)
    expected = outcome.expected.float().log_softmax(-1)
    targets = expected.argmin(-1)  # where a wrong scale or cap shows most
    with foreign_code(f"{type(model).__name__} cannot be trained on packed sequences"):
        found = head_scores(packed_hidden(model, *outcome.row), head, targets, 1.0).logprobs
    difference = relative(found, expected.gather(-1, targets[:, None])[:, 0])
    if difference <= TOLERANCE[outcome.expected.dtype]:
        return None
    return f"its log-probabilities differ by {difference:.1e} of the largest from those of a linear head"
