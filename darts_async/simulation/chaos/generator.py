"""A generator process: the real decisions and the real scripted engine, on virtual time and without weights."""

from collections.abc import Iterable
from typing import Any, cast

import numpy as np

from darts_async.generator.engine import Outbox
from darts_async.generator.scripted import ScriptedEngine
from darts_async.generator.state import Arrange, Decode, GeneratorState, Obey, Swap, Wait
from darts_async.protocol import (
    Generate,
    Greet,
    LearnerToGenerator,
    TokensDecoded,
    UpdateAborted,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightsRefused,
)
from darts_async.simulation.chaos.process import Process, Script, finish
from darts_async.simulation.chaos.world import Crash, World
from darts_async.topology.links import GENERATORS_LINK, WEIGHTS_LINK
from darts_async.transport import Event, PeerDown, Received
from darts_async.weights.receiving.member import Action, Apply, Member, Order, Tell

LOADS_WITHIN_S = 0.3
READY_WITHIN_S = 0.02


class _NoTime:
    """The engine's clock. The process waits for each step itself."""

    def now(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        pass


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
        self._state = GeneratorState(flush_every_steps=settings.flush_every_steps)
        self._member = Member(num_ranks=1)
        self._offered: UpdateOffered | None = None
        """What its ranks get ready for."""
        self._committed = -1
        self._is_woken_up = False

    def begin(self) -> None:
        """Load the engine."""
        super().begin()
        self.run(self._decode())

    def handle(self, event: Event) -> None:
        """A command, or something about weights."""
        if isinstance(event, Received) and (reason := self._state.refusal(event)) is not None:
            self.refuse(event, f"{type(event.message).__name__}: {reason}")
            return
        self._state.handle(event)
        self._is_woken_up = True
        match event:
            case PeerDown(link=WEIGHTS_LINK.name):
                self._do(self._member.leave("the link to the learner is down"))
            case Received(link=WEIGHTS_LINK.name, message=message) if self._state.may_join:
                self._hear_learner(cast(LearnerToGenerator, message))

    def _hear_learner(self, message: LearnerToGenerator) -> None:
        match message:
            case Greet():
                self._do(self._member.join())
            case WeightsRefused():
                self.world.counts["generators that were refused"] += 1
                raise Crash
        self._do(self._member.handle(message))

    def validate(self) -> None:
        """The invariants of the decisions too; samples that run are known."""
        super().validate()
        self._state.validate()
        self._member.validate()
        assert self.engine.num_unfinished <= self._state.num_live

    def _decode(self) -> Script:
        yield self.world.rng.uniform(0.0, LOADS_WITHIN_S)
        self._state.loaded(num_slots=self.engine.num_slots, max_context_tokens=self.engine.max_context_tokens)
        if self._state.may_join:
            self._do(self._member.join())
        while True:
            out: Outbox = []
            move = self._state.next_move(self.engine.num_unfinished, out)
            self._tell(out)
            match move:
                case Obey(commands):
                    self.reach("generator.before_start")
                    for command in commands:
                        if isinstance(command, Generate):
                            self.engine.start(command)
                        else:
                            self.engine.cancel(command.sample_id)
                case Arrange(cancelled):
                    for sample_id in cancelled:
                        self.engine.cancel(sample_id)
                case Swap():
                    self._swap()
                case Decode():
                    yield self._step_s
                    self.reach("generator.step")
                    out = []
                    self._state.decoded(finish(self.engine.step()), out)
                    self._tell(out)
                case Wait():
                    self._is_woken_up = False
                    yield lambda: self._is_woken_up

    def _tell(self, out: Outbox) -> None:
        if any(isinstance(message, TokensDecoded) for message in out):
            self.reach("generator.before_flush")
        for message in out:
            self.send(GENERATORS_LINK.name, cast(str, self._state.shaper), message)

    def _swap(self) -> None:
        self.reach("generator.before_swap")
        out: Outbox = []
        self._state.resumed(self._committed, 0.0, out)
        self.reach("generator.after_swap")
        self._tell(out)
        self._do(self._member.applied(0.0))

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Tell(message):
                    self.send(WEIGHTS_LINK.name, cast(str, self._state.learner), message)
                case Order(UpdateOffered() as offered):
                    self._offered = offered
                    self.run(self._get_ready(offered))
                case Order(UpdateAborted() | UpdateCommitted()):
                    self._offered = None
                case Apply(version):
                    self._committed = version
                    self._state.ask_to_swap()
                    self._is_woken_up = True

    def _get_ready(self, offered: UpdateOffered) -> Script:
        yield self.world.rng.uniform(0.0, READY_WITHIN_S)
        if self._offered is offered:
            self._do(self._member.report(UpdateReady(offered.epoch, offered.policy_version)))

    def receives(self, epoch: int) -> bool:
        """Whether it takes part in a broadcast of this epoch."""
        return not self.is_dead and self._offered is not None and self._offered.epoch == epoch

    def staged(self, epoch: int, version: int, checksums: list[int]) -> None:
        """All buckets have come."""
        if self._offered is not None and self._offered.policy_version == version:
            self._do(self._member.report(UpdateStaged(epoch, version, np.array(checksums, np.int64))))

    def broken(self, epoch: int) -> None:
        """The collective has failed here."""
        self._do(self._member.report(UpdateFailed(epoch, self._state.version, "the broadcast broke")))
