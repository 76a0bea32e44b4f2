"""The shaper: the real actor with its real journal and ledger, on simulated links."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from darts_async.actor import Runtime
from darts_async.prompts.load import PromptSets
from darts_async.protocol import Shutdown
from darts_async.shaper.process import FLUSH_EVERY_S, ShaperActor
from darts_async.simulation.chaos.power import DiskOfShaper
from darts_async.simulation.chaos.process import Process, Script, finish
from darts_async.simulation.chaos.world import Crash, World
from darts_async.telemetry import BusyClock
from darts_async.topology.plan import RunPlan
from darts_async.trace import Trace
from darts_async.transport import Event

FLUSHES_WITHIN_S = 0.2
"""What the disk takes."""


class ShaperProcess(Process):
    """The files are real: a full disk is a write that fails as a whole, and a loss of power follows from the flushes
    that `disk` is told of."""

    def __init__(
        self,
        world: World,
        name: str,
        incarnation: int,
        links: Any,
        run_dir: Path,
        sets: PromptSets,
        *,
        life: int,
        disk: DiskOfShaper,
    ) -> None:
        super().__init__(world, name, incarnation, links)
        self._disk = disk
        runtime = SimpleNamespace(  # what the actor needs of its `Runtime`
            config=world.config,
            run_dir=run_dir,
            plan=RunPlan((), (), life=life),
            clock=BusyClock(),
            trace=Trace(),  # off
            faults=self,  # has `reach`
            links=self.links,
            send=self.send,
            refuse=self.refuse,
        )
        self.actor = ShaperActor(cast(Runtime, runtime), sets, clock=lambda: world.now_s)
        self.heard = runtime.heard
        self._is_ledger_full = False
        disk.flushed(disk.sizes())  # a life begins with both flushed

    def begin(self) -> None:
        """Open the links, and flush the files now and then."""
        super().begin()
        self.run(self._keep_flushed())

    def handle(self, event: Event) -> None:
        """One event of the links."""
        self.actor.handle(event)

    def settle(self) -> None:
        """Record what was decided, and send it."""
        full = self.world.rng.choice(("journal", "ledger", "new journal")) if self.world.is_full else ""
        if full == "journal":
            self._die_of_full_disk(full)
        self._is_ledger_full = full == "ledger"
        self.actor.tick(self.world.now_s)
        if full == "new journal" and self.actor.has_new_journal:
            self._die_of_full_disk(full)
        self._is_ledger_full = False

    def reach(self, point: str) -> None:
        """A full disk shows where the ledger is written."""
        if point == "shaper.before_ledger" and self._is_ledger_full:
            self._die_of_full_disk("ledger")
        super().reach(point)

    def stop(self, reason: str) -> None:
        """The run is to end early."""
        self.actor.shutdown(Shutdown(reason, finished=False))

    def validate(self) -> None:
        """The invariants of the decisions too."""
        super().validate()
        self.actor.validate()

    def died(self) -> None:
        """Close the files. What a loss of power takes follows from `disk` alone."""
        finish(self.actor.close())

    def _keep_flushed(self) -> Script:
        while True:
            yield FLUSH_EVERY_S
            sizes = self._disk.sizes()
            self.actor.begin_flush()()  # at once, or a death would leave its descriptors open
            yield self.world.rng.uniform(0.0, FLUSHES_WITHIN_S)
            self._disk.flushed(sizes)
            self._disk.keep_journal()
            self.actor.end_flush()

    def _die_of_full_disk(self, of: str) -> None:
        self.world.counts[f"shapers that died of a full disk at the {of}"] += 1
        raise Crash
