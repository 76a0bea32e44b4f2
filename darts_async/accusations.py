"""A member of a link says that the hub of the link sends what cannot be meant. Which of the two is wrong? Pure.

A hub judges its members. A member cannot have its hub restarted by its word alone, or one that is wrong itself could do
that to all others. But a hub that is wrong is not mended by restarting its members, one after the other, until their
restarts are used up. So the members of the link vote:

- the hub is restarted when more than half of the members of one link have accused the same incarnation of it;
- as long as they are fewer, each that accuses is restarted: it takes nothing from this incarnation of the hub any more,
  and if it was right, its next incarnation will see the same.

The only member of a link is both, so hub and member are restarted: the word of one is as good as that of the other, and
one that lies uses up restarts of its own.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Case:
    incarnation: int
    accusers: set[str] = field(default_factory=set)


class Accusations:
    """What members have said of the hubs of their links.

    Args:
        links: (hub, members) of each link by its name.
    """

    def __init__(self, links: Mapping[str, tuple[str, Collection[str]]]) -> None:
        self._links = list(links.values())
        self._cases: dict[str, _Case] = {}

    def hear(self, member: str, hub: str, incarnation: int) -> tuple[str, ...]:
        """The processes to restart after a member has accused the present incarnation of its hub.

        >>> votes = Accusations({"generators": ("shaper/0", ["generator/0", "generator/1", "generator/2"])})
        >>> votes.hear("generator/0", "shaper/0", 1), votes.hear("generator/2", "shaper/0", 1)
        (('generator/0',), ('shaper/0',))
        """
        case = self._cases.get(hub)
        if case is None or case.incarnation != incarnation:
            case = self._cases[hub] = _Case(incarnation)
        case.accusers.add(member)
        is_wrong = any(self._is_majority(case, members) for head, members in self._links if head == hub)
        is_alone = case.accusers == {member}
        return ((hub,) if is_wrong else ()) + ((member,) if is_alone or not is_wrong else ())

    def _is_majority(self, case: _Case, members: Collection[str]) -> bool:
        return 2 * len(case.accusers.intersection(members)) > len(members)
