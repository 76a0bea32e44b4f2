"""A role of no real run: it answers a greeting, and leaves when it is told. See `topology.test_new_role`."""

import asyncio

from darts_async.actor import Gauges, Runtime, main
from darts_async.protocol import Greet, RewardReady, Shutdown
from darts_async.transport import Event, Received


class UmpireActor:
    """Watches."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.done = False

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Nothing takes long."""

    def handle(self, event: Event) -> None:
        """Answer the hub."""
        match event:
            case Received(link="umpires", peer=peer, message=Greet(number=number)):
                self._runtime.send("umpires", peer, RewardReady(number))

    def tick(self, now_s: float) -> None:
        """Nothing to do."""

    def shutdown(self, message: Shutdown) -> None:
        """Leave."""
        self.done = True

    def gauges(self) -> Gauges:
        """For the status."""
        return Gauges("watching")

    async def close(self) -> None:
        """Nothing is held."""


if __name__ == "__main__":
    main(UmpireActor)
