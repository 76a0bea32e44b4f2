"""The embedded engine: continuous batching of any Hugging Face causal LM on CPUs.

A step admits waiting samples into free slots, prefills their prompts in the same forward call that decodes one token
for every running sample, and draws all tokens at once. It runs in the engine's thread. All other calls come between
steps from the task that owns the engine, so there are no locks.

A prompt is prefilled once per group and weights: samples of the same group copy its keys and values from a slot that
still has them. The complete context of a sample with a prefix is prefilled. A sample keeps its keys and values of older
weights, and no new sample gets them.
"""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from darts_async.config import RunConfig
from darts_async.config.engines import EMBEDDED
from darts_async.errors import EngineError, ModelError
from darts_async.generator.counter_rng import uniforms
from darts_async.generator.embedded.decoder import SlotDecoder, check_decoding
from darts_async.generator.embedded.sampling import draw
from darts_async.generator.embedded.slot_attention import Prefill
from darts_async.generator.engine import StepEvents
from darts_async.generator.slot_engine import SlotEngine, SlotTable
from darts_async.models.length_limits import Lengths, why_too_long
from darts_async.models.location import known_stop_token_ids, resolve_model_path
from darts_async.protocol import SAMPLES_PER_GROUP_LIMIT, group_id_of

_MAX_PREFILL_TOKENS: Final = 4096
"""Context tokens admitted in one step: bounds its memory, and the wait of running samples for their next token."""

T = TypeVar("T")


class EmbeddedEngine(SlotEngine):
    """Continuous batching of a causal LM in this process. It takes the model over. Raises what `SlotDecoder` does."""

    capabilities = EMBEDDED

    def __init__(self, model: Any, *, num_slots: int, max_context_tokens: int, eos_token_ids: Iterable[int]) -> None:
        self._decoder = SlotDecoder(model, num_slots=num_slots, max_context_tokens=max_context_tokens)
        super().__init__(SlotTable(num_slots, max_context_tokens, vocab_size=self._decoder.vocab_size))
        self._ends_response = np.isin(np.arange(self._decoder.vocab_size), list(eos_token_ids))  # [vocab_size]
        self._prefilled_at: dict[int, int] = {}  # sample id -> weight update under which its prompt was prefilled
        self._num_updates = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-engine")
        self._running: Future[Any] | None = None

    async def step(self) -> StepEvents:
        self._assert_between_steps()
        if self.num_unfinished == 0:
            return StepEvents()
        return await self._in_thread(self._step)

    async def apply_weights(self, tensors: dict[str, object], policy_version: int) -> None:
        """Copy weights into the model. Raises `EngineError` that names a missing, unknown or misshapen tensor."""
        self._assert_between_steps()
        try:
            await self._in_thread(lambda: self._decoder.load_weights(tensors))
        except EngineError as error:
            raise EngineError(f"policy version {policy_version}: {error}") from error
        self._num_updates += 1

    async def close(self) -> None:
        self._is_closed = True
        if self._running is not None and self._is_stepping:
            await asyncio.gather(asyncio.wrap_future(self._running), return_exceptions=True)
        self._thread.shutdown()

    @property
    def _is_stepping(self) -> bool:
        return self._running is not None and not self._running.done()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        self._running = future = self._thread.submit(work)
        return await asyncio.wrap_future(future)

    def _step(self) -> StepEvents:
        moves, admitted = self._table.begin_step(_MAX_PREFILL_TOKENS)
        for move in moves:
            self._decoder.copy_slot(move.source, move.target, move.num_tokens)
        prefills = self._fill(admitted)
        rows = self._table.active
        if len(rows) == 0:
            return self._finish(np.empty(0, np.int32), np.empty(0, np.float32))
        logits = self._decoder.decode(prefills, rows["last_token"], rows["cached"])
        token_ids, logprobs = draw(
            logits,
            uniforms(rows["seed"], rows["num_tokens"]),
            temperature=rows["temperature"],
            top_p=rows["top_p"],
            top_k=rows["top_k"],
        )
        return self._finish(token_ids, logprobs)

    def _finish(self, token_ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> StepEvents:
        events = self._table.finish_step(token_ids, logprobs, self._ends_response[token_ids])
        for end in events.ended:
            self._prefilled_at.pop(end.sample_id, None)
        return events

    def _fill(self, admitted: tuple[int, ...]) -> list[Prefill]:
        """Give each new slot the keys and values of its context: copied from a slot that has them, or prefilled."""
        prefills: list[Prefill] = []
        filled_by: dict[int, Prefill] = {}  # slots whose keys and values this step computes
        for slot in admitted:
            request, donor = self._table.request(slot), self._donor(slot)
            context = np.concatenate((request.prompt_tokens, request.prefix_tokens))[:-1].astype(np.int64)
            if len(context) == 0:
                continue
            self._prefilled_at[request.sample_id] = self._num_updates
            if donor is None:
                filled_by[slot] = Prefill(context, [slot])
                prefills.append(filled_by[slot])
            elif donor in filled_by:
                filled_by[slot] = filled_by[donor]
                filled_by[slot].slots.append(slot)
            else:
                self._decoder.copy_slot(donor, slot, len(context))
        return prefills

    def _donor(self, slot: int) -> int | None:
        """A slot with the same prompt, prefilled under these weights; None for a sample with a prefix."""
        request = self._table.request(slot)
        if len(request.prefix_tokens):
            return None
        first = group_id_of(request.sample_id) * SAMPLES_PER_GROUP_LIMIT
        for other in self._table.slots_of(range(first, first + SAMPLES_PER_GROUP_LIMIT)):
            donor = self._table.request(other)
            current = self._prefilled_at.get(donor.sample_id) == self._num_updates
            if current and np.array_equal(donor.prompt_tokens, request.prompt_tokens):
                return other
        return None


def longest(num_slots: int, max_context_tokens: int) -> Lengths:
    """The longest sample, and the most tokens of a step: prefilled ones, and one of each slot."""
    return Lengths(max_context_tokens, max(max_context_tokens, _MAX_PREFILL_TOKENS) + num_slots)


def make_engine(config: RunConfig) -> EmbeddedEngine:
    """The engine `embedded`. Raises what `load_embedded_engine` does."""
    path, num_slots = str(resolve_model_path(config.model.path)), config.generator.num_slots
    max_context_tokens = config.generator.max_context_tokens
    return load_embedded_engine(
        path, dtype=config.model.dtype, num_slots=num_slots, max_context_tokens=max_context_tokens
    )


def load_embedded_engine(model_path: str, *, dtype: str, num_slots: int, max_context_tokens: int) -> EmbeddedEngine:
    """Load a model from a directory or the hub, with the end-of-sequence tokens of its generation settings. Raises
    `ModelError` if it cannot be loaded, does not say how a response ends, has fewer positions than
    `max_context_tokens`, or cannot be decoded at such lengths."""
    try:
        config = AutoConfig.from_pretrained(model_path)
        if (reason := why_too_long(config.to_dict(), max_context_tokens)) is not None:
            raise ModelError(f"model.path is {model_path!r}: {reason}")
        stop_tokens = known_stop_token_ids(Path(model_path))
        check_decoding(config, longest(num_slots, max_context_tokens))
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    except ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model.path {model_path!r} cannot be loaded as a causal language model: {error}") from error
    return EmbeddedEngine(model, num_slots=num_slots, max_context_tokens=max_context_tokens, eos_token_ids=stop_tokens)
