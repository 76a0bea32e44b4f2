"""The generator process: decodes what the shaper asks for, and swaps in what the learner sends.

One task, `_decode`, owns the engine. Commands wait in a queue until the boundary between two steps and are applied
there, in order; weights come into use there too, while the task stands still. Tokens of the old version are flushed
before, so a message never mixes versions, and the shaper learns of the new version before it sees a token of it.

While the shaper is away nothing is decoded: when it is back it greets, and whatever it has not heard of by then is
dropped. Weights are taken meanwhile as ever.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import structlog

from darts_async.actor import Gauges, Runtime, main
from darts_async.config import RunConfig
from darts_async.config.engines import Capabilities
from darts_async.errors import EngineError, ExtensionError, WeightUpdateError
from darts_async.extensions import ENGINE, load
from darts_async.generator.boundary import refusal_of_learner, refusal_of_shaper
from darts_async.generator.engine import Engine
from darts_async.generator.engine_pause import Stillness
from darts_async.generator.events import StepEvents
from darts_async.generator.probe import Probing
from darts_async.generator.stop_strings import StopStrings
from darts_async.generator.token_batcher import Outgoing
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.protocol import (
    Cancel,
    Generate,
    GeneratorReady,
    GeneratorToLearner,
    GeneratorToShaper,
    Greet,
    LearnerToGenerator,
    ProbeWeights,
    ShaperToGenerator,
    Shutdown,
    UpdateOffered,
    WeightsApplied,
    WeightsRefused,
)
from darts_async.topology.links import GENERATORS_LINK, WEIGHTS_LINK
from darts_async.transport import Event, PeerDown, PeerUp, Received
from darts_async.weights.receiving.receive import Receiver

IDLE_CHECK_S = 1.0

log = structlog.get_logger()


def make_engine(config: RunConfig) -> Engine:
    """The engine that the configuration names. Imports what it needs and no more.

    Raises:
        ExtensionError: it cannot be loaded, or does not say what it can do.
    """
    engine: Engine = load(ENGINE, config.generator.engine)(config=config)
    if not isinstance(getattr(engine, "capabilities", None), Capabilities):
        raise ExtensionError(
            f"generator.engine is {config.generator.engine!r}, and what it makes, {type(engine).__name__}, has no "
            "`capabilities`; give it `capabilities = Capabilities()` of darts_async.config.engines"
        )
    return engine


def make_stop_strings(config: RunConfig) -> StopStrings | None:
    """What ends responses at `sampling.stop`, if it names any strings."""
    if not config.sampling.stop:
        return None
    return StopStrings(config.sampling.stop, load_tokenizer(resolve_model_path(config.model.path)))


class GeneratorActor:
    """See the module."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._engine: Engine | None = None
        self._outgoing = Outgoing(runtime.config.generator.flush_every_steps)
        self._commands: deque[Generate | Cancel] = deque()  # bounded by the link's credit and the shaper's seats
        self._stillness: Stillness | None = None
        self._probing = Probing(self._send_learner)
        self._stopping = make_stop_strings(runtime.config)
        self._greeting: Greet | None = None
        self._live: set[int] = set()
        self._asked: set[int] = set()
        """Samples that the shaper has asked for since it greeted, and that have not ended."""
        self._work = asyncio.Event()
        self._version = -1
        self._shaper: str | None = None
        self._shaper_is_away = False
        self._learner: str | None = None
        self._offered_s = 0.0
        self._receiver: Receiver | None = None
        self.done = False

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Load the engine, then announce it and ask for weights."""
        self._engine = await asyncio.to_thread(make_engine, self._runtime.config)
        transfer = self._engine.weight_transfer(self._hold, self._runtime.host, self._runtime.config.weights)
        self._receiver = Receiver(self._send_learner, transfer)
        await self._receiver.open(tasks)
        tasks.create_task(self._decode(self._engine), name="decode")
        self._join()

    def handle(self, event: Event) -> None:
        """A command for the engine, or something about weights. What comes before the first greeting of its sender was
        meant for the process before this one."""
        match event:
            case Received(message=message) if reason := self._refusal(event):
                self._runtime.refuse(event, f"{type(message).__name__}: {reason}")
            case Received(link=GENERATORS_LINK.name, peer=peer, message=Greet() as greeting):
                self._shaper = peer
                self._commands.clear()
                self._asked.clear()
                self._greeting = greeting
                self._shaper_is_away = False
                self._work.set()
            case PeerUp(link=GENERATORS_LINK.name):  # it may not have noticed that it was away, and then does not greet
                self._shaper_is_away = False
                self._work.set()
            case PeerDown(link=link, peer=peer, reason=reason):
                log.warning("peer_lost", peer=peer, reason=reason)
                if link == GENERATORS_LINK.name:
                    self._shaper_is_away = True
                elif self._receiver is not None:
                    self._receiver.learner_lost()
            case Received(message=Generate() | Cancel() as command) if self._shaper is not None:
                self._commands.append(command)
                if isinstance(command, Generate):
                    self._asked.add(command.sample_id)
                self._work.set()
            case Received(link=WEIGHTS_LINK.name):
                self._hear_learner(event)

    def _hear_learner(self, event: Received) -> None:
        match event.message:
            case Greet():
                self._learner = event.peer
                self._join()
            case _ if self._learner is None:
                return
            case ProbeWeights() as probe:
                self._probing.ask(probe)
                self._work.set()
            case WeightsRefused(reason=reason):
                raise EngineError(f"the learner refuses this generator: {reason}")
            case message if self._receiver is not None:  # it answers those who have joined
                if isinstance(message, UpdateOffered):
                    self._offered_s = time.perf_counter()
                self._receiver.handle(cast(LearnerToGenerator, message))

    def _refusal(self, event: Received) -> str | None:
        """Why a message cannot be meant."""
        if event.link == GENERATORS_LINK.name:
            return refusal_of_shaper(cast(ShaperToGenerator, event.message), self._asked)
        return refusal_of_learner(cast(LearnerToGenerator, event.message))

    def tick(self, now_s: float) -> None:
        """Nothing to do."""

    def shutdown(self, message: Shutdown) -> None:
        """Leave."""
        self.done = True

    def gauges(self) -> Gauges:
        """For the status."""
        if self._engine is None:
            return Gauges("loading")
        busy = 0 if self._shaper_is_away else self._engine.num_unfinished + len(self._commands)
        state = "waiting for weights" if self._version < 0 else "decoding" if busy else "idle"
        dropped = 0 if self._stopping is None else self._stopping.num_tokens_dropped
        num_tokens = self._engine.num_tokens_decoded - self._probing.num_tokens - dropped
        return Gauges(state, self._version, num_tokens, busy)

    async def close(self) -> None:
        """Leave the weight group. (`_decode` has freed the engine.)"""
        if self._receiver is not None:
            await self._receiver.close()

    # --- the engine's owner ----------------------------------------------------------------------------------

    async def _decode(self, engine: Engine) -> None:
        try:
            while True:
                await self._boundary(engine)
                if engine.num_unfinished == 0 or self._shaper_is_away:
                    await self._wait_for_work()
                    continue
                await self._runtime.faults.pass_by("generator.step")
                with self._runtime.clock.busy("decode"):
                    events = await engine.step()
                    if engine.capabilities.decodes_by_itself:
                        self._report(events)
                        continue
                self._report(events)
        finally:
            await engine.close()

    async def _boundary(self, engine: Engine) -> None:
        """Between two steps: start over if greeted, stand still for new weights, apply commands."""
        if self._stopping is not None:
            for sample_id in self._stopping.take_stopped():
                engine.cancel(sample_id)
        if self._greeting is not None:
            greeting, self._greeting = self._greeting, None
            await self._start_over(engine, greeting)
        if self._stillness is not None:
            stillness, self._stillness = self._stillness, None
            await self._stand_still(stillness)
        if self._commands:
            self._runtime.faults.reach("generator.before_start")
        while self._commands:
            match self._commands.popleft():
                case Generate() as request:
                    self._start(engine, request)
                case Cancel(sample_id=sample_id):
                    engine.cancel(sample_id)
                    self._runtime.trace.count("cancels")
        for request in self._probing.begin(self._version):
            engine.start(request)

    def _start(self, engine: Engine, request: Generate) -> None:
        self._runtime.trace.sample("started", request.sample_id)
        if self._stopping is not None and (end := self._stopping.start(request)) is not None:
            self._report(StepEvents(ended=(end,)))  # its generator died after the stop string and before it said so
            return
        self._live.add(request.sample_id)
        engine.start(request)

    async def _start_over(self, engine: Engine, greeting: Greet) -> None:
        """Drop every sample: the shaper has given them to others. Then say what this generator is."""
        for sample_id in self._live:
            engine.cancel(sample_id)
        while engine.num_unfinished:
            self._take(await engine.step())
        self._flush()  # nobody waits for these tokens, but they were decoded and are to be counted
        assert not self._live, "every sample that was started has ended"
        self._asked = {command.sample_id for command in self._commands if isinstance(command, Generate)}
        self._tell_shaper(GeneratorReady(greeting.number, engine.num_slots, engine.max_context_tokens))
        if self._version >= 0:
            self._tell_shaper(WeightsApplied(self._version, 0.0))

    async def _stand_still(self, stillness: Stillness) -> None:
        self._flush()
        self._runtime.faults.reach("generator.before_swap")
        stillness.reached.set()
        with self._runtime.clock.busy("swap"):
            await stillness.over.wait()  # what is done meanwhile has deadlines; if it fails this task is cancelled

    def _report(self, events: StepEvents) -> None:
        self._take(events)
        if self._outgoing.is_due:
            self._flush()

    def _take(self, events: StepEvents) -> None:
        events = self._probing.sift(events, self._version)
        if self._stopping is not None:
            events = self._stopping.sift(events)
        self._outgoing.add(events)
        for end in events.ended:
            self._runtime.trace.sample("stopped" if end.finish_reason is None else "finished", end.sample_id)
        self._live.difference_update(end.sample_id for end in events.ended)
        self._live.difference_update(sample_id for sample_id, _ in events.rejected)
        self._asked.difference_update([end.sample_id for end in events.ended], [each for each, _ in events.rejected])

    async def _wait_for_work(self) -> None:
        """Until a command or weights arrive; woken now and then so that a lost wake-up costs a second, not a run."""
        self._flush()
        self._work.clear()
        if self._commands or self._greeting is not None or self._stillness is not None or self._probing.is_asked:
            return
        try:
            async with asyncio.timeout(IDLE_CHECK_S):
                await self._work.wait()
        except TimeoutError:
            return

    def _flush(self) -> None:
        self._runtime.faults.reach("generator.before_flush")
        for message in self._outgoing.flush(self._version):
            self._tell_shaper(message)

    def _tell_shaper(self, message: GeneratorToShaper) -> None:
        assert self._shaper is not None, "it has greeted before anything can be told"
        self._runtime.send(GENERATORS_LINK.name, self._shaper, message)

    # --- weights ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _hold(self) -> AsyncIterator[Stillness]:
        """Have `_decode` stand still from the next boundary on (see `engine_pause`)."""
        assert self._stillness is None, "one update at a time"
        self._stillness = stillness = Stillness(self._deliver)
        self._work.set()
        await stillness.reached.wait()
        begin_s = time.perf_counter()
        try:
            yield stillness
        except WeightUpdateError:
            stillness.over.set()
            raise
        stillness.stall_s = time.perf_counter() - begin_s
        if stillness.policy_version is not None:
            self._version = stillness.policy_version
            self._trace_update()
            self._runtime.faults.reach("generator.after_swap")
            if self._shaper is not None:
                self._tell_shaper(WeightsApplied(self._version, stillness.stall_s))
        stillness.over.set()

    def _trace_update(self) -> None:
        version, now_s = self._version, time.perf_counter()
        self._runtime.trace.span("update", self._offered_s, now_s, is_work=False, args={"policy_version": version})
        self._runtime.trace.instant("weights applied", policy_version=version)

    def _deliver(self, events: StepEvents) -> None:
        self._take(events)
        self._flush()

    def _send_learner(self, message: GeneratorToLearner) -> None:
        assert self._learner is not None
        self._runtime.send(WEIGHTS_LINK.name, self._learner, message)

    def _join(self) -> None:
        if self._receiver is not None and self._learner is not None:
            self._receiver.join()


if __name__ == "__main__":
    main(GeneratorActor)
