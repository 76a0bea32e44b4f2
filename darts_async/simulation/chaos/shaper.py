"""The shaper: the real actor with its real journal and ledger, on simulated links."""

from pathlib import Path
from typing import Any, cast

from darts_async.actor import Runtime
from darts_async.prompts.load import PromptSets
from darts_async.protocol import Message, Shutdown
from darts_async.shaper.process import ShaperActor
from darts_async.simulation.chaos.process import Process, finish
from darts_async.simulation.chaos.world import World
from darts_async.telemetry import BusyClock
from darts_async.topology import RunPlan
from darts_async.trace import Trace
from darts_async.transport import Event


class _Runtime:
    """What the actor needs of its `Runtime`."""

    def __init__(self, process: "ShaperProcess", run_dir: Path, life: int) -> None:
        self.config = process.world.config
        self.run_dir = run_dir
        self.clock = BusyClock()
        self.trace = Trace()  # off
        self.faults = process  # has `reach`
        self.plan = RunPlan((), (), life=life)
        self.heard: dict[str, tuple[int, int]] = {}
        self._process = process

    @property
    def links(self) -> dict[str, Any]:
        return self._process.links

    def refuse(self, event: Event, reason: str) -> None:
        """No process of the simulation says what cannot be meant."""
        raise AssertionError(f"{event} is refused: {reason}")

    def send(self, link: str, peer: str, message: Message) -> None:
        self._process.send(link, peer, message)


class ShaperProcess(Process):
    """See the module."""

    def __init__(
        self, world: World, name: str, incarnation: int, links: Any, run_dir: Path, sets: PromptSets, life: int
    ) -> None:
        super().__init__(world, name, incarnation, links)
        runtime = _Runtime(self, run_dir, life)
        self.actor = ShaperActor(cast(Runtime, runtime), sets, clock=lambda: world.now_s)
        self.heard = runtime.heard

    def handle(self, event: Event) -> None:
        """One event of the links."""
        self.actor.handle(event)

    def settle(self) -> None:
        """Record what was decided, and send it."""
        self.actor.tick(self.world.now_s)
        if self.actor.has_new_journal:
            self.actor.begin_flush()()
            self.actor.end_flush()

    def stop(self, reason: str) -> None:
        """The run is to end early."""
        self.actor.shutdown(Shutdown(reason, finished=False))

    def validate(self) -> None:
        """The invariants of the decisions too."""
        super().validate()
        self.actor.validate()

    def died(self) -> None:
        """Close the files."""
        finish(self.actor.close())
