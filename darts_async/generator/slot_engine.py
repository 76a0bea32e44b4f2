"""Which sample is in which slot, and the part that all engines in this process share. No model.

    waiting (by priority, then arrival) --begin_step--> a slot --finish_step--> ended (stop | length)
            \\-------------------------- cancel ------------------------------> ended (cancelled)

Invariants, checked by `validate`:
- Between `begin_step` and `finish_step` the running samples fill slots 0..num_active-1 without a hole, so a
  step computes on the front of its arrays only. A freed slot is filled by a waiting sample if there is one,
  otherwise by the last running sample, which the engine is told to move.
- The cache of a sample holds `cached` tokens; `last_token` is the one it is fed next, at position `cached`.
- Every sample that was started is reported exactly once, as ended or as rejected.
"""

from abc import ABC, abstractmethod
from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from darts_async.config.engines import Capabilities
from darts_async.generator.boundary import why_not
from darts_async.generator.counter_rng import seed_word
from darts_async.generator.engine import Hold, SampleEnd, StepEvents
from darts_async.protocol import FinishReason, Generate

if TYPE_CHECKING:  # these need torch, which a simulation does not
    from darts_async.config import WeightsConfig
    from darts_async.weights.receiving.transfer import Transfer

SLOT: Final = np.dtype(
    [
        ("sample_id", np.int64),
        ("seed", np.uint64),
        ("cached", np.int64),  # tokens whose keys and values are in the cache
        ("last_token", np.int64),  # the token fed next
        ("num_tokens", np.int64),  # response tokens so far, prefix included
        ("max_new_tokens", np.int64),
        ("top_k", np.int64),
        ("temperature", np.float32),
        ("top_p", np.float32),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class Move:
    """A sample has moved from slot `source` to slot `target`, with `num_tokens` cached tokens."""

    source: int
    target: int
    num_tokens: int


class SlotTable:
    """Samples waiting, running and ended but not reported yet."""

    def __init__(self, num_slots: int, max_context_tokens: int, *, vocab_size: int | None = None) -> None:
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self.num_active = 0
        self.num_tokens_decoded = 0
        self._vocab_size = vocab_size
        self._table: NDArray[np.void] = np.zeros(num_slots, SLOT)
        self._requests: list[Generate | None] = [None] * num_slots
        self._slot_of: dict[int, int] = {}
        self._holes: list[int] = []
        self._waiting: list[Generate] = []
        self._ended: list[SampleEnd] = []
        self._rejected: list[tuple[int, str]] = []

    @property
    def active(self) -> NDArray[np.void]:
        """The rows of the running samples, of dtype `SLOT`. [num_active]"""
        return self._table[: self.num_active]

    @property
    def num_unfinished(self) -> int:
        """Samples started whose end has not been reported."""
        return len(self._slot_of) + len(self._waiting) + len(self._ended) + len(self._rejected)

    def request(self, slot: int) -> Generate:
        """The request of the sample in a slot."""
        request = self._requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    def slots_of(self, sample_ids: range) -> tuple[int, ...]:
        """The slots of those running samples whose id lies in a range."""
        ids = self.active["sample_id"]
        return tuple(np.flatnonzero((ids >= sample_ids.start) & (ids < sample_ids.stop)).tolist())

    def start(self, request: Generate) -> None:
        """Queue a sample, or note why it can never be decoded."""
        known = self._slot_of.keys() | {other.sample_id for other in self._waiting}
        assert request.sample_id not in known, f"sample {request.sample_id} started twice"
        if (reason := why_not(request, self.max_context_tokens, self._vocab_size)) is not None:
            self._rejected.append((request.sample_id, reason))
        else:
            insort(self._waiting, request, key=lambda waiting: waiting.priority)

    def end(self, request: Generate, reason: FinishReason) -> None:
        """Report the end of a sample whose prefix is the whole response."""
        self._ended.append(SampleEnd(request.sample_id, len(request.prefix_tokens), reason))

    def cancel(self, sample_id: int) -> None:
        """End a sample, running or waiting. Unknown ids: nothing happens."""
        if (slot := self._slot_of.get(sample_id)) is not None:
            self._release(slot, None)
            return
        for place, request in enumerate(self._waiting):
            if request.sample_id == sample_id:
                del self._waiting[place]
                self._ended.append(SampleEnd(sample_id, len(request.prefix_tokens), None))
                return

    def begin_step(self, max_admitted_tokens: int | None = None) -> tuple[tuple[Move, ...], tuple[int, ...]]:
        """Fill free slots from the queue and close the holes that are left. With a free slot one sample is always
        admitted, and further ones up to `max_admitted_tokens` context tokens."""
        self._holes.sort()
        admitted: list[int] = []
        num_tokens = 0
        while self._waiting and (self._holes or self.num_active < self.num_slots):
            num_tokens += len(self._waiting[0].prompt_tokens) + len(self._waiting[0].prefix_tokens)
            if admitted and max_admitted_tokens is not None and num_tokens > max_admitted_tokens:
                break
            admitted.append(self._admit(self._waiting.pop(0)))
        return self._compact(), tuple(admitted)

    def finish_step(
        self,
        token_ids: NDArray[np.int32],  # [num_active]
        logprobs: NDArray[np.float32],  # [num_active]
        stopped: NDArray[np.bool_],  # [num_active], the token ends the response
    ) -> StepEvents:
        """Append one token to every running sample; report everything that has happened since the last step."""
        rows = self.active
        sample_ids = rows["sample_id"].copy()
        rows["last_token"] = token_ids
        rows["cached"] += 1
        rows["num_tokens"] += 1
        self.num_tokens_decoded += len(rows)
        for slot in np.flatnonzero(stopped | (rows["num_tokens"] >= rows["max_new_tokens"])).tolist():
            self._release(slot, "stop" if stopped[slot] else "length")
        ended, self._ended = tuple(self._ended), []
        rejected, self._rejected = tuple(self._rejected), []
        return StepEvents(sample_ids, token_ids, logprobs, ended, rejected)

    def validate(self) -> None:
        """Check the invariants of the module."""
        occupied = {slot for slot, request in enumerate(self._requests) if request is not None}
        assert occupied == set(self._slot_of.values())
        assert occupied | set(self._holes) == set(range(self.num_active))
        assert len(occupied) + len(self._holes) == self.num_active <= self.num_slots
        for slot in occupied:
            row, request = self._table[slot], self.request(slot)
            assert self._slot_of[request.sample_id] == slot
            assert row["sample_id"] == request.sample_id
            assert row["cached"] == len(request.prompt_tokens) + row["num_tokens"] - 1 < self.max_context_tokens
            assert len(request.prefix_tokens) <= row["num_tokens"] < row["max_new_tokens"]
        assert [r.priority for r in self._waiting] == sorted(r.priority for r in self._waiting)

    def _admit(self, request: Generate) -> int:
        slot = self._holes.pop(0) if self._holes else self.num_active
        self.num_active = max(self.num_active, slot + 1)
        self._requests[slot] = request
        self._slot_of[request.sample_id] = slot
        num_prefix = len(request.prefix_tokens)
        sampling = request.sampling
        self._table[slot] = (
            request.sample_id,
            seed_word(request.seed),
            len(request.prompt_tokens) + num_prefix - 1,
            request.prefix_tokens[-1] if num_prefix else request.prompt_tokens[-1],
            num_prefix,
            sampling.max_new_tokens,
            sampling.top_k,
            sampling.temperature,
            sampling.top_p,
        )
        return slot

    def _compact(self) -> tuple[Move, ...]:
        moves: list[Move] = []
        while self._holes:
            last = self.num_active - 1
            if self._holes[-1] == last:
                self._holes.pop()
            else:
                moves.append(self._move(last, self._holes.pop(0)))
            self.num_active = last
        return tuple(moves)

    def _move(self, source: int, target: int) -> Move:
        request = self.request(source)
        self._table[target] = self._table[source]
        self._requests[target], self._requests[source] = request, None
        self._slot_of[request.sample_id] = target
        return Move(source, target, int(self._table[target]["cached"]))

    def _release(self, slot: int, reason: FinishReason | None) -> None:
        sample_id = self.request(slot).sample_id
        self._requests[slot] = None
        del self._slot_of[sample_id]
        self._holes.append(slot)
        self._ended.append(SampleEnd(sample_id, int(self._table[slot]["num_tokens"]), reason))


class SlotEngine(ABC):
    """An `Engine` with samples in slots, and with weights that arrive beside the model."""

    capabilities: Capabilities

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self.num_slots, self.max_context_tokens = table.num_slots, table.max_context_tokens
        self._is_closed = False

    @property
    def num_unfinished(self) -> int:
        return self._table.num_unfinished

    @property
    def num_tokens_decoded(self) -> int:
        return self._table.num_tokens_decoded

    def start(self, request: Generate) -> None:
        self._assert_between_steps()
        self._table.start(request)

    def cancel(self, sample_id: int) -> None:
        self._assert_between_steps()
        self._table.cancel(sample_id)

    @abstractmethod
    async def apply_weights(self, tensors: dict[str, Any], policy_version: int) -> None:
        """Put weights in use."""

    def weight_transfer(self, hold: Hold, interface: str, config: "WeightsConfig") -> "Transfer":
        """Staged, in this process."""
        from darts_async.weights.receiving.transfer import LocalTransfer  # needs torch, which a simulation does not

        async def apply(tensors: dict[str, Any], policy_version: int) -> float:
            async with hold() as pause:
                await self.apply_weights(tensors, policy_version)
                pause.policy_version = policy_version
            return pause.stall_s

        return LocalTransfer(interface, apply)

    @property
    def _is_stepping(self) -> bool:
        """Whether a step, or a change of the weights, is under way. An engine that never waits keeps this default."""
        return False

    def _assert_between_steps(self) -> None:
        assert not self._is_closed, "the engine is closed"
        assert not self._is_stepping, "called during a step"
