"""vLLM as an engine.

vLLM decodes in a process of its own and waits for no other: `step` waits for vLLM's next step and brings everything
that has arrived. Messages between this process and the engine core stay in order, which makes three things exact:

- A cancelled sample is acknowledged when the engine core has answered a call that was sent after the abort. Then its
  slot and its keys and values are free, and each of its tokens has been delivered.
- After a pause no token of an earlier step is in flight: `paused` has received them all.
- Each step says under which weights it was made, and these are asserted to be those known here.

AsyncLLM starts vLLM, prepares requests and makes calls. Its handling of outputs, with a task for every request and an
object for every token, is not used. Do not call its `generate`: it would take outputs away from here.

A call is never answered if the engine core dies, so every wait looks out for that and has a deadline.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import numpy as np

from darts_async.config import RunConfig, WeightsConfig
from darts_async.config.engines import VLLM
from darts_async.errors import DeadlineError, EngineError
from darts_async.generator.engine import Hold, StepEvents
from darts_async.generator.vllm.requests import to_core_request
from darts_async.generator.vllm.sample_tracker import SampleTracker
from darts_async.generator.vllm.startup import StartedVllm, VllmRequest, start_vllm
from darts_async.generator.vllm.weights import worker_transfer
from darts_async.models.location import resolve_model_path
from darts_async.protocol import FinishReason, Generate
from darts_async.weights.receiving.transfer import Transfer

_LOOK_OUT_S: Final = 0.2
"""How often a wait looks whether the engine core is alive."""
_CLOSE_DEADLINE_S: Final = 20.0
_FINISH_REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length"}

T = TypeVar("T")


class VllmEngine:
    """An `Engine` that takes over vLLM, and the thread that started it, with which the engine core dies."""

    capabilities = VLLM

    def __init__(self, started: StartedVllm, thread: ThreadPoolExecutor, *, step_deadline_s: float) -> None:
        self._llm: Any = started.llm
        self.num_slots, self.max_context_tokens = started.num_slots, started.max_context_tokens
        self._eos_token_ids = started.eos_token_ids
        self._thread = thread
        self._step_deadline_s = step_deadline_s
        self._samples = SampleTracker(started.max_context_tokens, started.vocab_size)
        self._weights = "default"  # vLLM's name for the weights in use before it is told another
        self._is_paused = False
        self._is_closed = False
        self.num_shared_tokens = 0
        """Prompt tokens whose keys and values were taken from another sample instead of computed."""

    @property
    def num_unfinished(self) -> int:
        return self._samples.num_unfinished

    @property
    def num_tokens_decoded(self) -> int:
        return self._samples.num_tokens_decoded

    @property
    def num_workers(self) -> int:
        """Processes, or GPUs, that the model is spread over."""
        return int(self.llm.vllm_config.parallel_config.world_size)

    @property
    def llm(self) -> Any:
        """`vllm.v1.engine.async_llm.AsyncLLM`."""
        assert not self._is_closed, "the engine is closed"
        return self._llm

    def start(self, request: Generate) -> None:
        assert not self._is_closed, "the engine is closed"
        self._samples.start(request)

    def cancel(self, sample_id: int) -> None:
        assert not self._is_closed, "the engine is closed"
        self._samples.cancel(sample_id)

    async def step(self) -> StepEvents:
        """Send what was asked for, wait for vLLM's next step, and bring what has arrived. Does not wait if there is
        something to report already, if there is no work, or while paused. Raises `EngineError` if the engine core has
        died or brings nothing by the deadline."""
        await self._send()
        self._take_arrived()
        if self._samples.num_live and not self._samples.has_events and not self._is_paused:
            self._take(await self._within(self._core.get_output_async(), "its next step"))
            self._take_arrived()
        return self.take()

    def take(self) -> StepEvents:
        """What no step has brought yet: after a pause, the last tokens of the old weights."""
        events = self._samples.take_events()
        if not np.isfinite(events.logprobs).all():
            raise EngineError("the model's logits are not finite: its weights have diverged or were damaged")
        return events

    @asynccontextmanager
    async def paused(self, *, clear_cache: bool = False) -> AsyncIterator[None]:
        """Hold vLLM between two of its steps. All tokens of earlier steps have arrived (see `take`). Samples continue
        after the pause with their KV cache; with `clear_cache` it is computed again, under the weights of then. Raises
        `EngineError` if the engine core dies or does not answer. A body that raises, or is cancelled, leaves vLLM
        paused: its weights may be torn, or the engine may be closed."""
        assert not self._is_paused, "paused already"
        await self._within(self._core.pause_scheduler_async(mode="keep", clear_cache=clear_cache), "a pause")
        self._is_paused = True
        self._take_arrived()
        yield
        await self._within(self._core.resume_scheduler_async(), "resuming")
        self._is_paused = False

    async def set_policy_version(self, policy_version: int) -> None:
        """Say, while paused, that these weights are in use now. Samples that start later share no older keys and
        values."""
        assert self._is_paused, "weights change while paused, and at no other time"
        await self._within(self._core.set_weight_version_async(str(policy_version)), "the number of its weights")
        self._weights = str(policy_version)

    def weight_transfer(self, hold: Hold, interface: str, config: WeightsConfig) -> Transfer:
        return worker_transfer(self, hold, interface, config)

    async def call_workers(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        """What a method of the worker extension returns on each worker, between two steps. Any task may call this.
        Raises `DeadlineError` if there is no answer by then, and `EngineError` if the method raised or the engine core
        has died."""
        call = self._core.collective_rpc_async(method, None, args, None)
        try:
            results: list[Any] = await self._within(call, f"{method}()", deadline_s)
        except TimeoutError as error:
            raise DeadlineError(f"vLLM's workers did not return from {method}() within {deadline_s:g} s") from error
        return results

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        llm, self._llm = self._llm, None
        await self._in_thread(llm.shutdown)
        resources = llm.engine_core.resources
        for socket in (resources.input_socket, resources.output_socket):
            socket.close(linger=0)
        await self._in_thread(resources.ctx.term)  # vLLM leaves it to the collector, which complains
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        """Clean up within a deadline. What takes longer is not waited for."""
        done, _ = await asyncio.wait((asyncio.wrap_future(self._thread.submit(work)),), timeout=_CLOSE_DEADLINE_S)
        for future in done:
            future.result()

    @property
    def _core(self) -> Any:
        return self.llm.engine_core

    async def _send(self) -> None:
        """New samples first, so that one that is cancelled at once is known to vLLM by then."""
        for request in self._samples.take_unsent():
            try:
                core_request = to_core_request(self._llm, request, self._eos_token_ids, self._weights)
            except ValueError as error:
                self._samples.reject(request.sample_id, str(error))
            else:
                await self._within(self._core.add_request_async(core_request), "taking a sample")
        if aborts := self._samples.take_aborts():
            await self._within(self._core.abort_requests_async([str(sample_id) for sample_id in aborts]), "an abort")
            await self._within(self._core.is_scheduler_paused_async(), "an abort")  # answered after the abort
            self._take_arrived()
            self._samples.confirm_aborted(aborts)

    def _take_arrived(self) -> None:
        queue = self._core.outputs_queue
        while not queue.empty():
            outputs = queue.get_nowait()
            if isinstance(outputs, Exception):
                raise self._death() from outputs
            self._take(outputs)

    def _take(self, outputs: Any) -> None:
        """Take in one step of vLLM, an `EngineCoreOutputs`."""
        for output in outputs.outputs:
            sample_id = int(output.request_id)
            reason = None if output.finish_reason is None else str(output.finish_reason)
            if reason == "error":
                self._samples.reject(sample_id, "vLLM could not process the request; its output says why")
                continue
            if reason == "abort":  # not by us: aborted samples are not heard of again
                raise EngineError("vLLM's engine core is being shut down")
            assert outputs.weight_version == self._weights, f"{outputs.weight_version} is not {self._weights}"
            logprobs = [] if output.new_logprobs is None else output.new_logprobs.logprobs[:, 0].tolist()
            finish_reason = None if reason is None else _FINISH_REASONS[reason]
            self._samples.decoded(sample_id, output.new_token_ids, logprobs, finish_reason)
            if output.prefill_stats is not None:
                self.num_shared_tokens += output.prefill_stats.num_cached_tokens

    async def _within(self, wait: Coroutine[Any, Any, T], what: str, deadline_s: float | None = None) -> T:
        """Await something of vLLM's that may never come. Past `deadline_s`: `TimeoutError`. Without one, past that of a
        step: `EngineError`."""
        loop = asyncio.get_running_loop()
        limit_s = self._step_deadline_s if deadline_s is None else deadline_s
        end_s = loop.time() + limit_s
        task = asyncio.ensure_future(wait)
        try:
            while not task.done():
                if self._core.resources.engine_dead:
                    raise self._death()
                if (left_s := end_s - loop.time()) <= 0:
                    if deadline_s is not None:
                        raise TimeoutError
                    raise EngineError(f"vLLM did not bring {what} within {limit_s:g} s")
                await asyncio.wait((task,), timeout=min(_LOOK_OUT_S, left_s))
        finally:
            task.cancel()
        if (error := task.exception()) is not None:
            dead = self._core.resources.engine_dead
            raise self._death() if dead else EngineError(f"vLLM failed at {what}: {error}") from error
        return task.result()

    def _death(self) -> EngineError:
        return EngineError("vLLM's engine core has died; what it wrote before says why")


def make_engine(config: RunConfig) -> VllmEngine:
    """The engine `vllm`. Raises what `start_vllm` does."""
    settings = config.generator
    return load_vllm_engine(
        VllmRequest(
            str(resolve_model_path(config.model.path)),
            settings.vllm,
            config.model.dtype,
            settings.num_slots,
            settings.max_context_tokens,
            config.seed,
        )
    )


def load_vllm_engine(wanted: VllmRequest) -> VllmEngine:
    """Start vLLM from a thread of its own, which the engine core dies with. Raises what `start_vllm` does."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
    try:
        started = start_vllm(thread, wanted)
    except BaseException:  # whatever ends the start, the thread ends too; it is raised again
        thread.shutdown(wait=False)
        raise
    return VllmEngine(started, thread, step_deadline_s=wanted.settings.step_deadline_s)
