"""Decides which process to restart when a member of a link accuses the hub of sending invalid messages. Pure.

One member alone cannot have its hub restarted, because a faulty member would then restart all others. But restarts of
members do not repair a faulty hub. So the members of a link vote:

- the hub is restarted when more than half of the members of one link have accused the same incarnation of it;
- until then each member that accuses is restarted: if it was right, its next incarnation will see the same.

If a link has only one member, hub and member are both restarted.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Case:
    incarnation: int
    accusers: set[str] = field(default_factory=set)


class Accusations:
    """The accusations of members against their hubs. `links`: {name: (hub, members)}."""

    def __init__(self, links: Mapping[str, tuple[str, Collection[str]]]) -> None:
        self._links = list(links.values())
        self._cases: dict[str, _Case] = {}

    def hear(self, member: str, hub: str, incarnation: int) -> tuple[str, ...]:
        """The processes to restart after a member has accused the current incarnation of its hub.

        >>> votes = Accusations({"generators": ("shaper/0", ["generator/0", "generator/1", "generator/2"])})
        >>> votes.hear("generator/0", "shaper/0", 1), votes.hear("generator/2", "shaper/0", 1)
        (('generator/0',), ('shaper/0',))
        """
        case = self._cases.get(hub)
        if case is None or case.incarnation != incarnation:
            case = self._cases[hub] = _Case(incarnation)
        case.accusers.add(member)
        is_wrong = any(
            2 * len(case.accusers.intersection(members)) > len(members) for head, members in self._links if head == hub
        )
        is_alone = case.accusers == {member}
        return ((hub,) if is_wrong else ()) + ((member,) if is_alone or not is_wrong else ())
