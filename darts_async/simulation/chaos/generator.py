"""A generator process: the real scripted engine, in a shell that does what `generator.process` and `weights.receive`
do, without their event loop and without weights."""

from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from darts_async.generator.boundary import refusal_of_learner, refusal_of_shaper
from darts_async.generator.events import StepEvents
from darts_async.generator.scripted import ScriptedEngine
from darts_async.generator.token_batcher import Outgoing
from darts_async.protocol import (
    Cancel,
    EpochFormed,
    Generate,
    GeneratorReady,
    GeneratorToLearner,
    GeneratorToShaper,
    Greet,
    LearnerToGenerator,
    MemberJoined,
    ShaperToGenerator,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightsApplied,
    WeightsRefused,
)
from darts_async.simulation.chaos.process import Process, Script, finish
from darts_async.simulation.chaos.world import Crash, World
from darts_async.topology.links import GENERATORS_LINK, WEIGHTS_LINK
from darts_async.transport import Event, PeerDown, PeerUp, Received

LOADS_WITHIN_S = 0.3
READY_WITHIN_S = 0.02


class _NoTime:
    """The engine's clock: how long a step takes is the business of the shell."""

    def now(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        pass


@dataclass(slots=True)
class _Update:
    epoch: int
    version: int
    is_staged: bool = False


class GeneratorProcess(Process):
    """See the module."""

    def __init__(self, world: World, name: str, incarnation: int, links: Any) -> None:
        super().__init__(world, name, incarnation, links)
        settings = world.config.generator
        assert settings.script is not None
        self.engine = ScriptedEngine(
            settings.script,
            num_slots=settings.num_slots,
            max_context_tokens=settings.max_context_tokens,
            seed=world.config.seed,
            clock=_NoTime(),
        )
        self._step_s = settings.script.token_latency_s
        self._outgoing = Outgoing(settings.flush_every_steps)
        self._commands: deque[Generate | Cancel] = deque()
        self._greeting: Greet | None = None
        self._live: set[int] = set()
        self._asked: set[int] = set()
        self._shaper: str | None = None
        self._shaper_is_away = False
        self._is_loaded = False
        self.version = -1
        self._learner: str | None = None
        self.epoch: int | None = None
        self._last_epoch = -1
        self._update: _Update | None = None
        self._applying: _Update | None = None
        self._postponed: UpdateOffered | None = None

    def begin(self) -> None:
        """Load the engine."""
        super().begin()
        self.run(self._decode())

    def handle(self, event: Event) -> None:
        """A command, or something about weights."""
        match event:
            case Received(message=message) if reason := self._refusal(event):
                self.refuse(event, f"{type(message).__name__}: {reason}")
            case Received(link=GENERATORS_LINK.name, peer=peer, message=Greet() as greeting):
                self._shaper = peer
                self._commands.clear()
                self._asked.clear()
                self._greeting = greeting
                self._shaper_is_away = False
            case Received(link=WEIGHTS_LINK.name, peer=peer, message=Greet()):
                self._learner = peer
                self._join()
            case PeerUp(link=GENERATORS_LINK.name):
                self._shaper_is_away = False
            case PeerDown(link=GENERATORS_LINK.name):
                self._shaper_is_away = True
            case PeerDown(link=WEIGHTS_LINK.name):
                self._leave()
            case Received(message=Generate() | Cancel() as command) if self._shaper is not None:
                self._commands.append(command)
                if isinstance(command, Generate):
                    self._asked.add(command.sample_id)
            case Received(link=WEIGHTS_LINK.name, message=message) if self._learner is not None:
                self._hear_of_weights(message)

    def _refusal(self, event: Received) -> str | None:
        if event.link == GENERATORS_LINK.name:
            return refusal_of_shaper(cast(ShaperToGenerator, event.message), self._asked)
        return refusal_of_learner(cast(LearnerToGenerator, event.message))

    def validate(self) -> None:
        """Samples that run are known."""
        super().validate()
        assert self.engine.num_unfinished <= len(self._live)

    # --- decoding --------------------------------------------------------------------------------------------

    def _decode(self) -> Script:
        yield self.world.rng.uniform(0.0, LOADS_WITHIN_S)
        self._is_loaded = True
        self._join()
        while True:
            self._boundary()
            if self.engine.num_unfinished == 0 or self._shaper_is_away:
                self._flush()
                yield self._is_wanted
                continue
            yield self._step_s
            self.reach("generator.step")
            self._take(finish(self.engine.step()))
            if self._outgoing.is_due:
                self._flush()

    def _is_wanted(self) -> bool:
        has_work = bool(self._commands) or self.engine.num_unfinished > 0
        return self._greeting is not None or self._applying is not None or (has_work and not self._shaper_is_away)

    def _boundary(self) -> None:
        if self._greeting is not None:
            greeting, self._greeting = self._greeting, None
            self._start_over(greeting)
        if self._applying is not None:
            self._swap(self._applying)
        if self._commands:
            self.reach("generator.before_start")
        while self._commands:
            match self._commands.popleft():
                case Generate() as request:
                    self._live.add(request.sample_id)
                    self.engine.start(request)
                case Cancel(sample_id=sample_id):
                    self.engine.cancel(sample_id)

    def _start_over(self, greeting: Greet) -> None:
        for sample_id in self._live:
            self.engine.cancel(sample_id)
        while self.engine.num_unfinished:
            self._take(finish(self.engine.step()))
        self._flush()
        assert not self._live, "every sample that was started has ended"
        self._asked = {command.sample_id for command in self._commands if isinstance(command, Generate)}
        self._tell_shaper(GeneratorReady(greeting.number, self.engine.num_slots, self.engine.max_context_tokens))
        if self.version >= 0:
            self._tell_shaper(WeightsApplied(self.version, 0.0))

    def _take(self, events: StepEvents) -> None:
        self._outgoing.add(events)
        self._live.difference_update(end.sample_id for end in events.ended)
        self._live.difference_update(sample_id for sample_id, _ in events.rejected)
        self._asked.difference_update([end.sample_id for end in events.ended], [each for each, _ in events.rejected])

    def _flush(self) -> None:
        self.reach("generator.before_flush")
        for message in self._outgoing.flush(self.version):
            self._tell_shaper(message)

    def _tell_shaper(self, message: GeneratorToShaper) -> None:
        assert self._shaper is not None
        self.send(GENERATORS_LINK.name, self._shaper, message)

    # --- weights ---------------------------------------------------------------------------------------------

    def _hear_of_weights(self, message: object) -> None:
        match message:
            case WeightsRefused():
                self.world.counts["generators that were refused"] += 1
                raise Crash
            case EpochFormed(epoch):
                if epoch > self._last_epoch:
                    self._leave()
                    self.epoch = self._last_epoch = epoch
            case UpdateOffered():
                self._consider(message)
            case UpdateCommitted(epoch, version):
                update = self._update
                if update is not None and update.is_staged and (update.epoch, update.version) == (epoch, version):
                    self._update, self._applying = None, update
            case UpdateAborted(epoch):
                if self.epoch in (epoch, None):
                    self._leave()
                    self._ask()

    def _consider(self, offered: UpdateOffered) -> None:
        if offered.epoch != self.epoch:
            if offered.epoch >= self._last_epoch:
                self._tell_learner(UpdateFailed(offered.epoch, offered.policy_version, "it is not in that group"))
        elif self._applying is not None:
            self._postponed = offered
        else:
            self._update = _Update(offered.epoch, offered.policy_version)
            self.run(self._get_ready(self._update))

    def _get_ready(self, update: _Update) -> Script:
        yield self.world.rng.uniform(0.0, READY_WITHIN_S)
        if self._update is update:
            self._tell_learner(UpdateReady(update.epoch, update.version))

    def receives(self, epoch: int) -> bool:
        """Whether it takes part in a broadcast of this epoch."""
        return not self.is_dead and self.epoch == epoch and self._update is not None

    def staged(self, epoch: int, version: int, checksums: list[int]) -> None:
        """All buckets have come."""
        update = self._update
        if update is not None and (update.epoch, update.version) == (epoch, version):
            update.is_staged = True
            self._tell_learner(UpdateStaged(epoch, version, np.array(checksums, np.int64)))

    def broken(self, epoch: int) -> None:
        """The collective has failed here."""
        if epoch == self.epoch:
            version = self._update.version if self._update is not None else self.version
            self._leave()
            self._tell_learner(UpdateFailed(epoch, version, "the broadcast broke"))
            self._ask()

    def _swap(self, update: _Update) -> None:
        self._flush()
        self.reach("generator.before_swap")
        self.version = update.version
        self.reach("generator.after_swap")
        if self._shaper is not None:
            self._tell_shaper(WeightsApplied(self.version, 0.0))
        self._tell_learner(UpdateApplied(update.epoch, update.version, 0.0))
        self._applying = None
        if self._postponed is not None:
            offered, self._postponed = self._postponed, None
            self._consider(offered)

    def _join(self) -> None:
        if self._is_loaded and self._learner is not None:
            self._leave()
            self._last_epoch = -1
            self._ask()

    def _ask(self) -> None:
        self._tell_learner(MemberJoined(self.version))

    def _leave(self) -> None:
        self.epoch = self._update = self._postponed = None

    def _tell_learner(self, message: GeneratorToLearner) -> None:
        self.send(WEIGHTS_LINK.name, cast(str, self._learner), message)
