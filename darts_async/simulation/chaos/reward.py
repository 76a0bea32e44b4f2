"""A reward process: scores after a while, several responses at once."""

from typing import Any

from darts_async.protocol import Greet, RewardReady, SampleScored, Score, ScoreFailed
from darts_async.simulation.chaos.process import Process, Script
from darts_async.simulation.chaos.world import World
from darts_async.topology.links import REWARDS_LINK
from darts_async.transport import Event, Received

STARTS_WITHIN_S = 0.2
SCORES_WITHIN_S = 0.05
FAILED_SHARE = 0.1


class RewardProcess(Process):
    """See the module."""

    def __init__(self, world: World, name: str, incarnation: int, links: Any) -> None:
        super().__init__(world, name, incarnation, links)
        self._shaper: str | None = None
        self._is_open = False

    def begin(self) -> None:
        """Load, then announce."""
        super().begin()
        self.run(self._open())

    def handle(self, event: Event) -> None:
        """An item, or a greeting."""
        match event:
            case Received(peer=peer, message=Greet()):
                self._shaper = peer
                self._announce()
            case Received(peer=peer, message=Score() as item):
                self.reach("reward.before_score")
                self.run(self._score(peer, item))

    def _open(self) -> Script:
        yield self.world.rng.uniform(0.0, STARTS_WITHIN_S)
        self._is_open = True
        self._announce()

    def _announce(self) -> None:
        if self._is_open and self._shaper is not None:
            self.send(REWARDS_LINK.name, self._shaper, RewardReady(1))

    def _score(self, peer: str, item: Score) -> Script:
        yield self.world.rng.uniform(0.0, SCORES_WITHIN_S)
        self.reach("reward.before_reply")
        if self.world.chance(FAILED_SHARE):
            self.send(REWARDS_LINK.name, peer, ScoreFailed(item.sample_id, "raised", "by chance"))
        else:
            reward = float((item.sample_id * 2654435761 >> 7) % 2)
            self.send(REWARDS_LINK.name, peer, SampleScored(item.sample_id, reward))
