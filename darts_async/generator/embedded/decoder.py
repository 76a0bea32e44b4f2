"""Decodes with any Hugging Face causal LM: a function from the next tokens of all slots to their logits.

One forward call per step does prefills and decoding together: with a small model most of a call is operator overhead,
and with a large one the weights are read once. A prompt's last token is not prefilled but decoded, so the needed logits
are always those of the last `num_decoding` tokens.

A model is tried out when it is wrapped: samples that are prefilled and decoded together over several steps must get the
logits that the model's own forward gives each alone. So models that the attention interface does not reach (other
caches, recurrent state, own positions) are refused at once. Greater lengths are tried on small copies
(`check_decoding`).
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

from darts_async.errors import EngineError, ModelError
from darts_async.generator.embedded.slot_attention import ATTENTION_NAME, Prefill, SlotCache, make_step, slot_attention
from darts_async.models.length_limits import Lengths, Threshold, described_by
from darts_async.models.miniature import crossed, foreign_code, miniature, short_of

_TRIAL_PROMPTS: Final = (20, 6, 11)
"""Tokens of the samples of a trial. `_TRIAL_TOGETHER` of these begin in the first step, and one in each later step."""
_TRIAL_TOGETHER: Final = 2
_TRIAL_STEPS: Final = 4
_TRIAL_TOKENS: Final = 24
"""Length of the longest sample if there is no threshold."""
_TRIAL_TOLERANCE: Final = 1e-3
"""Largest difference of a log-probability in float32."""
_TRIAL_DEVIATION: Final = 0.06
"""Largest deviation in a lower precision: the norm of the difference of a token's logits from the model's own as a part
of the norm of these, both about their mean. It does not depend on how sharp a distribution is: where all tokens of an
untrained model are nearly as likely, a wrong decoding hardly diverges. A largest difference says little: of 49,152
log-probabilities one is off by .3 to .5 by rounding alone, even between two kernels of the same attention.

In bfloat16 rounding gave .034 (SmolLM2-135M), .027 (random models of 64 and 80 layers) and .010 to .023 (small ones);
in float16 .003. A wrong decoding gave at least .18 with SmolLM2 (scores of all layers 1.1 times too large; a position
off by one: .35) and .07 with small ones (scores of one layer of two 1.5 times too large, GPT-2)."""

log = structlog.get_logger()


def check_decoding(config: PreTrainedConfig, lengths: Lengths) -> None:
    """Try out small copies of a model at the thresholds that samples or steps of these lengths exceed. Raises
    `ModelError`, with the number to lower, if a copy is not decoded as by the model's own attention."""
    for thresholds in crossed(config, lengths.row):
        _try_copy(config, thresholds, short_of(thresholds), "of all samples of a step; use generator.engine: vllm")
    for thresholds in crossed(config, lengths.sample):
        _, value = described_by(thresholds)
        fix = f"lower generator.max_context_tokens ({lengths.sample}) to {value}, or use generator.engine: vllm"
        _try_copy(config, thresholds, 4 * short_of(thresholds), f"of a sample; {fix}")
    _check_plain(config, lengths)


def _check_plain(config: PreTrainedConfig, lengths: Lengths) -> None:
    try:
        model = miniature(config)
    except ModelError as error:  # the model itself is tried out when it is loaded
        log.warning("no_small_copy", model=config.model_type, reason=str(error))
        return
    SlotDecoder(model, num_slots=len(_TRIAL_PROMPTS), max_context_tokens=min(_TRIAL_TOKENS, lengths.sample))


def _try_copy(config: PreTrainedConfig, thresholds: Sequence[Threshold], num_tokens: int, what: str) -> None:
    """Decode samples of so many tokens. Raises `ModelError` if the copy is not decoded as by its own attention."""
    setting, value = described_by(thresholds)
    try:
        SlotDecoder(miniature(config, thresholds), num_slots=len(_TRIAL_PROMPTS), max_context_tokens=num_tokens)
    except ModelError as error:
        reason = str(error).partition(";")[0]
        raise ModelError(
            f"a model of type {config.model_type} cannot be decoded by the embedded engine beyond {value} tokens, its "
            f"{setting}, {what}. In a small copy of it: {reason}"
        ) from error


class SlotDecoder:
    """A model and the cache of its slots. It takes the model over: it changes its attention and switches gradients off.
    Raises `ModelError` for a kind of model that cannot be decoded this way."""

    def __init__(self, model: Any, *, num_slots: int, max_context_tokens: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._cache = SlotCache(num_slots, max_context_tokens)
        self._tensors: dict[str, Tensor] = _named_tensors(model)
        with torch.inference_mode(), foreign_code(f"{type(model).__name__} cannot be decoded by the embedded engine"):
            self._try_out()

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @torch.inference_mode()
    def decode(
        self,
        prefills: Sequence[Prefill],
        last_tokens: NDArray[np.int64],  # [num_decoding]
        cached: NDArray[np.int64],  # [num_decoding]
    ) -> Tensor:
        """Prefill, then feed slot i `last_tokens[i]` at position `cached[i]`. Logits: `[num_decoding, vocab_size]`."""
        tokens = np.concatenate([*(prefill.token_ids for prefill in prefills), last_tokens])
        positions = np.concatenate([*(np.arange(len(prefill.token_ids)) for prefill in prefills), cached])
        output = self._model(
            input_ids=torch.from_numpy(tokens).unsqueeze(0),
            position_ids=torch.from_numpy(positions).unsqueeze(0),
            use_cache=False,
            logits_to_keep=len(cached),
            slot_step=make_step(self._cache, prefills, cached),
        )
        logits: Tensor = output.logits[0, -len(cached) :]
        return logits

    @torch.inference_mode()
    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first cached tokens of one slot to another."""
        self._cache.copy(source, target, num_tokens)

    def load_weights(self, tensors: dict[str, object]) -> None:
        """Copy weights into the model's tensors. One name of a tied parameter is enough. Raises `EngineError`, before
        anything is copied, if a parameter is missing, or a name or a shape is not the model's."""
        checked = {name: self._check_tensor(name, tensor) for name, tensor in tensors.items()}
        given = {id(self._tensors[name]) for name in checked}
        for name, tensor in self._tensors.items():
            if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in given:
                raise EngineError(f"weight update without {name}, which the model has")
        with torch.no_grad():
            for name, tensor in checked.items():
                self._tensors[name].copy_(tensor)

    def _check_tensor(self, name: str, tensor: object) -> Tensor:
        if name not in self._tensors:
            raise EngineError(f"weight update with {name}, which the model does not have")
        if not isinstance(tensor, Tensor):
            raise EngineError(f"weight update with a {type(tensor).__name__} for {name}, not a tensor")
        shape = self._tensors[name].shape
        if tensor.shape != shape:
            raise EngineError(f"weight update with shape {list(tensor.shape)} for {name}, the model has {list(shape)}")
        return tensor

    def _try_out(self) -> None:
        """Compare several steps of prefills and decoded tokens with the model's own forward of each sample."""
        num_steps = min(_TRIAL_STEPS, (self._cache.max_context_tokens + 1) // 2)
        room = self._cache.max_context_tokens - num_steps
        prompts = [min(length, room) for length in _TRIAL_PROMPTS[: self._cache.num_slots]]
        samples = [self._trial_tokens(slot, prompt + num_steps) for slot, prompt in enumerate(prompts)]
        own = [self._model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids in samples]
        self._switch_attention()
        cached = np.zeros(0, np.int64)
        for step in range(num_steps):
            joining = range(len(cached), min(len(samples), step + _TRIAL_TOGETHER))
            cached = np.append(cached, np.array([prompts[slot] for slot in joining], np.int64))
            logits = self.decode(
                [Prefill(samples[slot][: prompts[slot]], [slot]) for slot in joining if prompts[slot]],
                np.array([ids[place] for ids, place in zip(samples, cached, strict=False)]),
                cached,
            )
            self._compare(logits, torch.stack([rows[place] for rows, place in zip(own, cached, strict=False)]))
            cached = cached + 1

    def _trial_tokens(self, slot: int, num_tokens: int) -> NDArray[np.int64]:
        return (np.arange(1, num_tokens + 1, dtype=np.int64) * 7919 + slot * 104729) % (self.vocab_size - 1) + 1

    def _compare(self, logits: Tensor, own: Tensor) -> None:
        """Raises `ModelError` if these are not the model's own, both [num_decoding, vocab_size]."""
        name = type(self._model).__name__
        if self._cache.num_layers == 0:
            raise ModelError(f"{name} does not use transformers' attention interface")
        if own.dtype == torch.float32:
            error, tolerance = (logits.log_softmax(-1) - own.log_softmax(-1)).abs().max().item(), _TRIAL_TOLERANCE
            differ = f"log-probabilities differ from the model's own by {error:.2g}"
        else:
            error, tolerance = _deviation(logits.float(), own.float()), _TRIAL_DEVIATION
            differ = f"logits differ from the model's own by {error:.0%}"
        if not error <= tolerance:
            raise ModelError(
                f"{name} is of a kind that the embedded engine does not decode correctly: {differ}; "
                "use generator.engine: vllm"
            )

    def _switch_attention(self) -> None:
        AttentionInterface.register(ATTENTION_NAME, slot_attention)
        name = type(self._model).__name__
        try:
            self._model.set_attn_implementation(ATTENTION_NAME)
        except ValueError as error:
            raise ModelError(f"{name} does not accept an attention function: {error}") from error


def _deviation(logits: Tensor, own: Tensor) -> float:
    """The largest of the rows; see `_TRIAL_DEVIATION`. 0 where both are constant."""
    expected = own - own.mean(-1, keepdim=True)
    error = logits - logits.mean(-1, keepdim=True) - expected
    tiny = torch.finfo(torch.float32).tiny
    return float((error.norm(dim=-1) / expected.norm(dim=-1).clamp(min=tiny)).max())


def _named_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters under all their names, and the buffers that are saved with the model."""
    return {**model.state_dict(keep_vars=True), **dict(model.named_parameters(remove_duplicate=False))}
