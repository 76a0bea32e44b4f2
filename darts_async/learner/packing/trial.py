"""Tries whether a model keeps packed samples apart: packed logits must equal those of its own attention for each sample
alone.

The class does not tell: state-space layers run across samples, some layers count positions from the beginning of the
row, and a window or a chunk may be expressed by a mask alone, which packing never makes. A threshold that the run's
samples or rows exceed (see `darts_async.models.length_limits`) is tried on a small copy of the model, before the
weights are read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from darts_async.errors import ModelError
from darts_async.learner.packing.forward import PackedRow, packed_logits, packed_row, set_packed_attention
from darts_async.learner.packing.tree import Tree
from darts_async.models.length_limits import Lengths, Threshold, described_by
from darts_async.models.miniature import crossed, foreign_code, miniature, short_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of packed logits relative to the largest logit: room for rounding, none for another sample."""

PROBE_TOKENS = 20
"""Tokens of the longest sample that is tried where there is no threshold."""

log = structlog.get_logger()


class Samples(NamedTuple):
    """Tokens of each of three samples, of which the last two begin with the same `shared` ones."""

    lengths: tuple[int, int, int]
    shared: int

    @classmethod
    def within(cls, num_tokens: int) -> "Samples":
        """Samples of at most `num_tokens`, and together of more."""
        return cls((num_tokens, (num_tokens + 1) // 2, num_tokens), num_tokens // 4 or 1)

    @classmethod
    def beyond(cls, num_tokens: int) -> "Samples":
        """Samples that exceed `num_tokens`, one of them already in its prompt."""
        return cls((3 * num_tokens + 1, num_tokens + 4, 2 * num_tokens + 5), num_tokens + 2)


class TrialOutcome(NamedTuple):
    """How far packed logits are from those of each sample alone, relative to the largest."""

    packed: float
    shared: float
    """If the row has the first tokens of the last two samples once."""
    row: PackedRow
    expected: Tensor
    """Logits of the row's places from each sample alone: [num_places, vocabulary]."""

    @property
    def keeps_apart(self) -> bool:
        return self.packed <= TOLERANCE[self.expected.dtype]

    @property
    def shares_prompts(self) -> bool:
        return self.shared <= TOLERANCE[self.expected.dtype]


def try_packing(model: PreTrainedModel, samples: Samples) -> TrialOutcome:
    """Switch the model to packed attention, and compare a row of these samples with the model's own attention. Raises
    `ModelError` if the model has attention of an unsupported kind."""
    with torch.no_grad(), foreign_code(f"{type(model).__name__} cannot be trained on packed sequences"):
        sequences = _sequences(model, samples)
        alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
        set_packed_attention(model)
        return _outcome(model, sequences, alone, samples.shared)


def refusal(model: PreTrainedModel, outcome: TrialOutcome) -> ModelError:
    """Why the model cannot be trained."""
    return ModelError(
        f"{type(model).__name__} cannot be trained on packed sequences: its logits differ from those of each sequence "
        f"alone by {outcome.packed:.1e} of the largest; its layers mix neighbours or ignore position_ids"
    )


def check_packing(config: PreTrainedConfig, lengths: Lengths) -> bool:
    """Try a small copy of the model, also at the thresholds that the run exceeds; returns whether samples may share a
    prompt. Raises `ModelError`, with the number to lower, if packed logits of samples of these lengths are wrong."""
    shares_prompts = True
    for thresholds in crossed(config, lengths.row):
        shares_prompts &= _check_row(config, thresholds, lengths)
    for thresholds in crossed(config, lengths.sample):
        shares_prompts &= _check_samples(config, thresholds, lengths)
    return shares_prompts & _check_plain(config, lengths)


def _check_plain(config: PreTrainedConfig, lengths: Lengths) -> bool:
    try:
        model = miniature(config)
    except ModelError as error:  # the model itself is tried out when it is loaded
        log.warning("no_small_copy", model=config.model_type, reason=str(error))
        return True
    outcome = try_packing(model, Samples.within(min(PROBE_TOKENS, lengths.sample)))
    if not outcome.keeps_apart:
        raise refusal(model, outcome)
    return outcome.shares_prompts


def _check_row(config: PreTrainedConfig, thresholds: Sequence[Threshold], lengths: Lengths) -> bool:
    lower = f"learner.tokens_per_micro_batch and generator.max_context_tokens ({lengths.row} in a row)"
    outcome = _try_copy(config, thresholds, Samples.within(short_of(thresholds)), lower)
    if not outcome.keeps_apart:
        raise _too_long(config, thresholds, "its layers count positions from the beginning of the row", lower)
    return outcome.shares_prompts


def _check_samples(config: PreTrainedConfig, thresholds: Sequence[Threshold], lengths: Lengths) -> bool:
    lower = f"generator.max_context_tokens ({lengths.sample})"
    outcome = _try_copy(config, thresholds, Samples.beyond(short_of(thresholds)), lower)
    if not outcome.keeps_apart:
        reason = f"in a small copy the logits differ from those of its own attention by {outcome.packed:.1e}"
        raise _too_long(config, thresholds, reason, lower)
    return outcome.shares_prompts


def _try_copy(config: PreTrainedConfig, thresholds: Sequence[Threshold], samples: Samples, lower: str) -> TrialOutcome:
    try:
        return try_packing(miniature(config, thresholds), samples)
    except ModelError as error:
        raise _too_long(config, thresholds, str(error), lower) from error


def _too_long(config: PreTrainedConfig, thresholds: Sequence[Threshold], reason: str, lower: str) -> ModelError:
    setting, value = described_by(thresholds)
    return ModelError(
        f"a model of type {config.model_type} cannot be trained on packed sequences of more than {value} tokens, its "
        f"{setting}: {reason}; lower {lower} to {value}"
    )


def _sequences(model: PreTrainedModel, samples: Samples) -> list[Tensor]:
    weight = model.get_input_embeddings().weight
    draws = torch.Generator().manual_seed(0)
    first, second, third = (torch.randint(1, weight.shape[0], (length,), generator=draws) for length in samples.lengths)
    third[: samples.shared] = second[: samples.shared]
    return [ids.to(weight.device) for ids in (first, second, third)]


def _outcome(model: PreTrainedModel, sequences: list[Tensor], alone: list[Tensor], shared: int) -> TrialOutcome:
    first, second, third = sequences
    packed = _without_its_first(packed_row(sequences, tuple(Tree(len(ids)) for ids in sequences)))
    tree = Tree(shared, (len(second) - shared, len(third) - shared))
    branched = _without_its_first(packed_row([first, second, third[shared:]], (Tree(len(first)), tree)))
    expected = torch.cat(alone)[1:]
    expected_shared = torch.cat([*alone[:2], alone[2][shared:]])[1:]
    return TrialOutcome(
        relative(packed_logits(model, *packed), expected),
        relative(packed_logits(model, *branched), expected_shared),
        packed,
        expected,
    )


def _without_its_first(row: PackedRow) -> PackedRow:
    """All places but one, so that a model that ignores the requested places is found out."""
    *layout, places = row
    return (*layout, places[1:])  # type: ignore[return-value]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
