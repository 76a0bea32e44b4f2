"""The generator process: decodes what the shaper asks for, and puts weights of the learner in use.

`GeneratorState` decides; this does it. One task, `_decode`, owns the engine and makes one move after the other. It
pauses while weights are put in use.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import cast

import structlog

from darts_async.actor import Gauges, Runtime, main
from darts_async.config import RunConfig
from darts_async.config.engines import Capabilities
from darts_async.errors import ConfigError, EngineError, ExtensionError, WeightUpdateError
from darts_async.extensions import ENGINE, load
from darts_async.generator.engine import Engine, Outbox, Pause, StepEvents
from darts_async.generator.state import Arrange, Decode, GeneratorState, Obey, Swap, Wait
from darts_async.generator.stop_strings import StopStrings
from darts_async.models.location import load_tokenizer, resolve_model_path
from darts_async.protocol import (
    Cancel,
    Generate,
    GeneratorToLearner,
    Greet,
    LearnerToGenerator,
    ProbeMeasured,
    SampleCancelled,
    SampleFinished,
    Shutdown,
    TokensDecoded,
    UpdateOffered,
    WeightsRefused,
)
from darts_async.topology.links import GENERATORS_LINK, WEIGHTS_LINK
from darts_async.transport import Event, PeerDown, Received
from darts_async.weights.receiving.receive import Receiver

IDLE_CHECK_S = 1.0

log = structlog.get_logger()


def make_engine(config: RunConfig) -> Engine:
    """The engine that the configuration names; no other is imported. Raises `ExtensionError` if it cannot be loaded or
    does not say what it can do, and `ConfigError` if it cannot do what the settings ask for."""
    name = config.generator.engine
    engine: Engine = load(ENGINE, name)(config=config)
    if not isinstance(getattr(engine, "capabilities", None), Capabilities):
        raise ExtensionError(
            f"generator.engine is {name!r}, and what it makes, {type(engine).__name__}, has no "
            "`capabilities`; give it `capabilities = Capabilities()` of darts_async.config.engines"
        )
    if reason := engine.capabilities.why_not(name, config.weights, config.sampling.temperature):
        raise ConfigError(reason)
    return engine


def make_stop_strings(config: RunConfig) -> StopStrings | None:
    """What ends responses at `sampling.stop`, if it names any strings."""
    if not config.sampling.stop:
        return None
    return StopStrings(config.sampling.stop, load_tokenizer(resolve_model_path(config.model.path)))


class GeneratorActor:
    """The `Actor` of a generator."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._engine: Engine | None = None
        self._receiver: Receiver | None = None
        flush_every_steps = runtime.config.generator.flush_every_steps
        self._state = GeneratorState(flush_every_steps=flush_every_steps, stopping=make_stop_strings(runtime.config))
        self._pause: Pause | None = None
        self._work = asyncio.Event()
        self._offered_s = 0.0
        self.done = False

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Load the engine, then announce it and ask for weights."""
        self._engine = engine = await asyncio.to_thread(make_engine, self._runtime.config)
        transfer = engine.weight_transfer(self._hold, self._runtime.host, self._runtime.config.weights)
        self._receiver = receiver = Receiver(self._send_learner, transfer)
        await receiver.open(tasks)
        self._state.loaded(num_slots=engine.num_slots, max_context_tokens=engine.max_context_tokens)
        tasks.create_task(self._decode(engine), name="decode")
        if self._state.may_join:
            receiver.join()

    def handle(self, event: Event) -> None:
        if isinstance(event, Received) and (reason := self._state.refusal(event)) is not None:
            self._runtime.refuse(event, f"{type(event.message).__name__}: {reason}")
            return
        self._state.handle(event)
        self._work.set()
        match event:
            case PeerDown(link=link, peer=peer, reason=reason):
                log.warning("peer_lost", peer=peer, reason=reason)
                if link == WEIGHTS_LINK.name and self._receiver is not None:
                    self._receiver.learner_lost()
            case Received(link=WEIGHTS_LINK.name, message=message) if (
                self._receiver is not None and self._state.may_join
            ):
                self._hear_learner(self._receiver, cast(LearnerToGenerator, message))

    def _hear_learner(self, receiver: Receiver, message: LearnerToGenerator) -> None:
        match message:
            case Greet():
                receiver.join()
            case WeightsRefused(reason=reason):
                raise EngineError(f"the learner refuses this generator: {reason}")
            case UpdateOffered():
                self._offered_s = time.perf_counter()
        receiver.handle(message)

    def tick(self, now_s: float) -> None:
        """A generator does nothing by time."""

    def shutdown(self, message: Shutdown) -> None:
        self.done = True

    def gauges(self) -> Gauges:
        if self._engine is None:
            return Gauges("loading")
        busy = 0 if self._state.is_shaper_away else self._engine.num_unfinished + self._state.num_waiting
        doing = "waiting for weights" if self._state.version < 0 else "decoding" if busy else "idle"
        num_tokens = self._engine.num_tokens_decoded - self._state.num_tokens_untold
        return Gauges(doing, self._state.version, num_tokens, busy)

    async def close(self) -> None:
        """Leave the weight group. (`_decode` has freed the engine.)"""
        if self._receiver is not None:
            await self._receiver.close()

    # --- the engine's owner ----------------------------------------------------------------------------------

    async def _decode(self, engine: Engine) -> None:
        try:
            while True:
                out: Outbox = []
                move = self._state.next_move(engine.num_unfinished, out)
                self._tell(out)
                match move:
                    case Obey(commands):
                        self._obey(engine, commands)
                    case Arrange(cancelled, started):
                        for sample_id in cancelled:
                            engine.cancel(sample_id)
                        for request in started:
                            engine.start(request)
                    case Swap():
                        await self._swap()
                    case Decode():
                        await self._step(engine)
                    case Wait():
                        await self._wait_for_work()
        finally:
            await engine.close()

    def _obey(self, engine: Engine, commands: Iterable[Generate | Cancel]) -> None:
        self._runtime.faults.reach("generator.before_start")
        for command in commands:
            match command:
                case Generate():
                    self._runtime.trace.sample("started", command.sample_id)
                    engine.start(command)
                case Cancel(sample_id=sample_id):
                    engine.cancel(sample_id)
                    self._runtime.trace.count("cancels")

    async def _step(self, engine: Engine) -> None:
        await self._runtime.faults.pass_by("generator.step")
        with self._runtime.clock.busy("decode"):
            events = await engine.step()
            if engine.capabilities.decodes_by_itself:
                self._report(events)
                return
        self._report(events)

    async def _swap(self) -> None:
        pause, self._pause = self._pause, None
        assert pause is not None, "a swap was asked for"
        self._runtime.faults.reach("generator.before_swap")
        pause.reached.set()
        with self._runtime.clock.busy("swap"):
            await pause.over.wait()  # the update has deadlines; if it fails this task is cancelled

    async def _wait_for_work(self) -> None:
        """Until an event or weights arrive. After `IDLE_CHECK_S` it looks again, in case a wake-up was lost."""
        self._work.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_CHECK_S):
                await self._work.wait()

    def _report(self, events: StepEvents) -> None:
        out: Outbox = []
        self._state.decoded(events, out)
        self._tell(out)

    def _tell(self, out: Outbox) -> None:
        if any(isinstance(message, TokensDecoded) for message in out):
            self._runtime.faults.reach("generator.before_flush")
        for message in out:
            match message:
                case ProbeMeasured():
                    self._send_learner(message)
                    continue
                case SampleFinished(sample_id=sample_id):
                    self._runtime.trace.sample("finished", sample_id)
                case SampleCancelled(sample_id=sample_id):
                    self._runtime.trace.sample("stopped", sample_id)
            assert self._state.shaper is not None, "it greets before it is told anything"
            self._runtime.send(GENERATORS_LINK.name, self._state.shaper, message)

    # --- weights ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _hold(self) -> AsyncIterator[Pause]:
        """Pause `_decode` at the next boundary."""
        self._state.ask_to_swap()
        self._pause = pause = Pause(self._report)
        self._work.set()
        await pause.reached.wait()
        begin_s = time.perf_counter()
        try:
            yield pause
        except WeightUpdateError:
            self._resume(pause, None)
            raise
        pause.stall_s = time.perf_counter() - begin_s
        self._resume(pause, pause.policy_version)

    def _resume(self, pause: Pause, version: int | None) -> None:
        out: Outbox = []
        self._state.resumed(version, pause.stall_s, out)
        if version is not None:
            args, trace = {"policy_version": version}, self._runtime.trace
            trace.span("update", self._offered_s, time.perf_counter(), is_work=False, args=args)
            trace.instant("weights applied", policy_version=version)
            self._runtime.faults.reach("generator.after_swap")
        self._tell(out)
        pause.over.set()

    def _send_learner(self, message: GeneratorToLearner) -> None:
        assert self._state.learner is not None
        self._runtime.send(WEIGHTS_LINK.name, self._state.learner, message)


if __name__ == "__main__":
    main(GeneratorActor)
