"""Any Hugging Face causal LM as a function from the next tokens of all slots to their logits.

One forward call per step does prefills and decoding together: a call costs mostly operator overhead on a small
model, and the weights are read once on a large one. A prompt's last token is not prefilled but decoded, so the
logits that are needed are always those of the last `num_decoding` tokens.

A model is tried once when it is wrapped: prefill and one decoded token must give the logits of the model's own
forward. Kinds of models that the attention interface does not reach (other caches, recurrent state, positions of
their own) are refused there, before anything has been decoded.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from darts_async.errors import EngineError
from darts_async.generator.attention import ATTENTION_NAME, Prefill, SlotCache, make_step, slot_attention

_NUM_TRIAL_TOKENS: Final = 8
_TRIAL_TOLERANCE: Final = {torch.float32: 1e-3}
_TRIAL_TOLERANCE_LOW_PRECISION: Final = 0.25


class SlotDecoder:
    """A model and the cache of its slots. Takes the model over: its attention and its gradients are switched."""

    def __init__(self, model: Any, *, num_slots: int, max_context_tokens: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._cache = SlotCache(num_slots, max_context_tokens)
        self._tensors: dict[str, Tensor] = _named_tensors(model)
        with torch.inference_mode():
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
        """Copy weights into the model's own tensors. Of the names of a tied parameter one is enough.

        Raises `EngineError`, with nothing copied, if a parameter is missing, or a name or a shape is not the model's.
        """
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
        model, name = self._model, type(self._model).__name__
        num_tokens = min(_NUM_TRIAL_TOKENS, self._cache.max_context_tokens)
        tokens = np.arange(1, num_tokens + 1, dtype=np.int64) * 7919 % self.vocab_size
        expected = model(input_ids=torch.from_numpy(tokens).unsqueeze(0), use_cache=False).logits[0, -1:]
        self._switch_attention()
        prefills = [Prefill(tokens[:-1], [0])] if num_tokens > 1 else []
        actual = self.decode(prefills, tokens[-1:], np.array([num_tokens - 1]))
        if self._cache.num_layers == 0:
            raise EngineError(f"{name} does not use transformers' attention interface")
        error = (actual.float().log_softmax(-1) - expected.float().log_softmax(-1)).abs().max().item()
        if not error <= _TRIAL_TOLERANCE.get(expected.dtype, _TRIAL_TOLERANCE_LOW_PRECISION):
            raise EngineError(
                f"{name} is of a kind that the embedded engine does not decode correctly: log-probabilities differ "
                f"from the model's own by {error:.2g}"
            )

    def _switch_attention(self) -> None:
        AttentionInterface.register(ATTENTION_NAME, slot_attention)
        name = type(self._model).__name__
        try:
            self._model.set_attn_implementation(ATTENTION_NAME)
        except ValueError as error:
            raise EngineError(f"{name} does not accept an attention function: {error}") from error


def _named_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters under all their names, and the buffers that are saved with the model."""
    persistent = model.state_dict(keep_vars=True)
    return {**persistent, **dict(model.named_parameters(remove_duplicate=False))}
