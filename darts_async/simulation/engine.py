"""A modelled generator that jumps from event to event.

Between two changes of the batch every running sample gains one token per step, so the only state is a step counter: a
sample of l tokens that started at count p ends at count p + l. The engine sleeps until the next end, or until the step
boundary after a command, and costs O(log batch) per sample however long the samples are. Commands and new weights take
effect at step boundaries. Tokens are reported when their sample ends, and all of them when the version changes, so
every token is reported with the version that made it. Generators do not die here, so no sample is resumed.
"""

import heapq
from collections import deque
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from darts_async.protocol import (
    Cancel,
    FinishReason,
    Generate,
    GeneratorReady,
    Greet,
    SampleCancelled,
    SampleFinished,
    ShaperToGenerator,
    TokensDecoded,
    WeightsApplied,
)
from darts_async.simulation.clock import Clock, Meter
from darts_async.simulation.models import EngineModel

_SAME_INSTANT_STEPS = 1e-9


class _Zeros:
    """No token is ever read: all arrays are views of two."""

    def __init__(self) -> None:
        self.token_ids = np.zeros(1 << 16, np.int32)
        self.logprobs = np.zeros(1 << 16, np.float32)

    def take(self, num_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """So many token ids and log-probabilities."""
        if num_tokens > len(self.token_ids):
            self.token_ids = np.zeros(2 * num_tokens, np.int32)
            self.logprobs = np.zeros(2 * num_tokens, np.float32)
        return self.token_ids[:num_tokens], self.logprobs[:num_tokens]


_ZEROS = _Zeros()


@dataclass(slots=True, eq=False)
class _Running:
    """A sample in the batch. All counts are of the engine's steps."""

    sample_id: int
    start: int
    end: int
    reported: int
    reason: FinishReason


class SimulatedEngine:
    """One generator. `command`, then `settle` and `plan` at the end of the instant; `wake` by the clock."""

    def __init__(self, name: str, model: EngineModel, clock: Clock, *, num_slots: int, max_context_tokens: int) -> None:
        self.name = name
        self.num_slots = num_slots
        self.version = 0
        self.meter = Meter()
        self.num_tokens = 0
        """Decoded so far."""
        self.slot_s = 0.0
        """Slots in use, integrated over time."""
        self._model = model
        self._clock = clock
        self._max_context_tokens = max_context_tokens
        self._commands: deque[tuple[ShaperToGenerator, int]] = deque()
        self._queue: dict[int, tuple[Generate, int]] = {}
        self._running: dict[int, _Running] = {}
        self._ends: list[tuple[int, int]] = []  # heap of (count, sample id), cancelled ones included
        self._count = 0  # steps taken
        self._boundary_s = 0.0  # when that was so
        self._step_s = 0.0  # 0: nothing runs
        self._steps_ahead = 0  # until the wake-up that is planned
        self._stamp = 0
        self._flush_at_s = model.flush_every_s
        self._offered: int | None = None
        self._applying: int | None = None  # stalls for it until the boundary

    def command(self, command: ShaperToGenerator, length: int = 0) -> None:
        """Take a command; `length` is what a sample will have in the end."""
        self._commands.append((command, length))

    def offer(self, version: int) -> None:
        """New weights lie ready."""
        self._offered = version

    def wake(self, stamp: int) -> None:
        """The planned boundary is here: samples end, a stall ends, tokens are flushed."""
        if stamp != self._stamp:
            return
        self.slot_s += len(self._running) * self._steps_ahead * self._step_s
        self.num_tokens += len(self._running) * self._steps_ahead
        self._count += self._steps_ahead
        self._boundary_s = self._clock.now_s
        self._steps_ahead, self._step_s = 0, 0.0
        if self._applying is not None:
            version, self._applying = self._applying, None
            self._clock.send(self.name, WeightsApplied(version, self._model.update_stall_s))
        self._end_finished()
        self._flush_if_due()

    def settle(self) -> None:
        """Carry out commands if the engine is at a boundary."""
        if not self._is_at_boundary:
            return
        while self._commands:
            command, length = self._commands.popleft()
            match command:
                case Generate(sample_id=sample_id):
                    self._queue[sample_id] = command, length
                case Cancel(sample_id=sample_id):
                    self._cancel(sample_id)
                case Greet(number=number):
                    self._clock.send(self.name, GeneratorReady(number, self.num_slots, self._max_context_tokens))
                    self._clock.send(self.name, WeightsApplied(self.version, 0.0))
        if self._offered is not None and not (self._model.drain_before_update and self._running):
            self._swap()

    def plan(self) -> None:
        """Fill the batch and sleep until something ends, or until the boundary where commands wait."""
        if not self._is_at_boundary:
            if self._commands or self._offered is not None:
                self._wake_at_next_boundary()
            return
        if self._applying is not None:
            return  # the wake-up that ends the stall is planned
        if self._offered is None:
            self._fill()
        self._boundary_s = self._clock.now_s
        self._step_s = self._model.step_s(len(self._running)) if self._running else 0.0
        self.meter.switch("decode" if self._running else "idle", self._clock.now_s)
        if self._running:
            self._sleep(self._steps_to_next_end())
        else:
            self._steps_ahead, self._stamp = 0, self._stamp + 1  # a wake-up may be under way

    @property
    def _is_at_boundary(self) -> bool:
        """Whether this moment is a step boundary."""
        if self._applying is not None:
            return False
        return not self._running or not self._step_s or self._clock.now_s == self._boundary_s

    def _wake_at_next_boundary(self) -> None:
        if self._applying is not None or not self._step_s:
            return  # a wake-up at the boundary is planned
        elapsed_steps = (self._clock.now_s - self._boundary_s) / self._step_s
        steps = max(ceil(elapsed_steps - _SAME_INSTANT_STEPS), 0)
        if steps < self._steps_ahead:
            self._sleep(steps)

    def _sleep(self, steps: int) -> None:
        self._steps_ahead = steps
        self._stamp += 1
        self._clock.wake_at(self._boundary_s + steps * self._step_s, self, self._stamp)

    def _steps_to_next_end(self) -> int:
        while self._ends[0][1] not in self._running:
            heapq.heappop(self._ends)
        steps = self._ends[0][0] - self._count
        if self._flush_at_s is not None:
            steps = min(steps, max(ceil((self._flush_at_s - self._boundary_s) / self._step_s), 1))
        return steps

    def _end_finished(self) -> None:
        finished: list[_Running] = []
        while self._ends and self._ends[0][0] <= self._count:
            sample = self._running.pop(heapq.heappop(self._ends)[1], None)
            if sample is not None:
                finished.append(sample)
        self._report(finished)
        for sample in finished:
            self._clock.send(self.name, SampleFinished(sample.sample_id, sample.reason, self._count - sample.start))

    def _flush_if_due(self) -> None:
        if self._flush_at_s is not None and self._clock.now_s >= self._flush_at_s:
            assert self._model.flush_every_s is not None
            self._report(list(self._running.values()))
            self._flush_at_s = self._clock.now_s + self._model.flush_every_s

    def _cancel(self, sample_id: int) -> None:
        sample = self._running.pop(sample_id, None)
        if sample is not None:
            self._report([sample])
            self._clock.send(self.name, SampleCancelled(sample_id, self._count - sample.start))
        elif self._queue.pop(sample_id, None) is not None:
            self._clock.send(self.name, SampleCancelled(sample_id, 0))

    def _swap(self) -> None:
        """Report what the old version made, and stall for the new one."""
        self._report(list(self._running.values()))
        assert self._offered is not None
        self._applying, self._offered = self._offered, None
        self.version = self._applying
        self.meter.switch("stall", self._clock.now_s)
        self._boundary_s, self._step_s = self._clock.now_s + self._model.update_stall_s, 0.0
        self._sleep(0)

    def _fill(self) -> None:
        """Start the samples that fit, in the order of arrival."""
        while self._queue and len(self._running) < self.num_slots:
            self._start(*self._queue.pop(next(iter(self._queue))))

    def _start(self, generate: Generate, length: int) -> None:
        assert not len(generate.prefix_tokens), generate.sample_id
        cap = generate.sampling.max_new_tokens
        end = self._count + min(length, cap)
        sample = _Running(generate.sample_id, self._count, end, self._count, "length" if length > cap else "stop")
        self._running[sample.sample_id] = sample
        heapq.heappush(self._ends, (end, sample.sample_id))

    def _report(self, samples: list[_Running]) -> None:
        sample_ids, counts = [], []
        for sample in samples:
            if sample.reported < self._count:
                sample_ids.append(sample.sample_id)
                counts.append(self._count - sample.reported)
                sample.reported = self._count
        if counts:
            arrays = np.array(sample_ids, np.int64), np.array(counts, np.int32), *_ZEROS.take(sum(counts))
            self._clock.send(self.name, TokensDecoded(self.version, *arrays))
