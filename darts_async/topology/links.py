"""The table of the links: which processes talk, and which messages they send.

A *link* is one socket bound by its hub; only its members may connect, and no other process learns the address.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from darts_async import protocol as p
from darts_async.topology.roles import AGENT, GENERATOR, LAUNCHER, LEARNER, REWARD, ROLES, SHAPER, Role


@dataclass(frozen=True, slots=True)
class Link:
    """Which process binds it, which may connect, and the union of the messages in each direction.

    >>> GENERATORS_LINK.members({"generator": ("generator/0", "generator/1")})
    ('generator/0', 'generator/1')
    """

    name: str
    hub: str
    """The process that binds it."""
    roles: tuple[Role, ...]
    """The roles of its members. A link without them is not in the plan: its hub makes it."""
    hub_sends: Any
    member_sends: Any
    first: int = 0
    end: int | None = None
    """Members are the processes of each role from number `first` to before `end`."""

    def members(self, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """Its members in a run that has these processes, by the name of their role."""
        return tuple(name for role in self.roles for name in names[role.name][self.first : self.end])


LINKS: Final[tuple[Link, ...]] = (
    GENERATORS_LINK := Link("generators", SHAPER.first, (GENERATOR,), p.ShaperToGenerator, p.GeneratorToShaper),
    REWARDS_LINK := Link("rewards", SHAPER.first, (REWARD,), p.ShaperToReward, p.RewardToShaper),
    LEARNER_LINK := Link("learner", SHAPER.first, (LEARNER,), p.ShaperToLearner, p.LearnerToShaper, end=1),
    WEIGHTS_LINK := Link("weights", LEARNER.first, (GENERATOR,), p.LearnerToGenerator, p.GeneratorToLearner),
    LAUNCHER_LINK := Link("launcher", LAUNCHER, ROLES, p.LauncherToProcess, p.ProcessToLauncher),
    # The messages are in `launcher.nodes.node_messages`.
    AGENTS_LINK := Link("agents", LAUNCHER, (AGENT,), None, None),
    RANKS_LINK := Link("ranks", LEARNER.first, (LEARNER,), p.LeaderToRank, p.RankToLeader, first=1),
    WORKERS_LINK := Link("workers", f"{GENERATOR.name}/*", (), p.GeneratorToWorker, p.WorkerToGenerator),
)
"""In the order of their ports."""

_BY_NAME: Final = {link.name: link for link in LINKS}


def link_named(name: str) -> Link:
    """The link of that name. Raises `KeyError`."""
    return _BY_NAME[name]


@functools.cache
def link_between(hub: str, member: Role) -> Link:
    """The link that a hub binds for the processes of a role. Raises `ValueError` if there is none."""
    [link] = (link for link in LINKS if link.hub == hub and member in link.roles)
    return link
