"""Which generators may be in an epoch, what each has, and how often each failed. Pure.

A member may hold a version of an earlier learner. One that is newer than what is published stays in use, for versions
never decrease along a sample; any other is replaced.

Invariants: one incarnation per name; three strikes under one version bar an incarnation until the next version,
whether or not it joined again in between.
"""

from dataclasses import dataclass

MAX_STRIKES = 3
"""Failures of a member under one version before it is left out until the next."""


@dataclass(slots=True)
class _Member:
    incarnation: int
    num_ranks: int
    held: int
    """What it had when it joined, of whatever learner."""
    version: int | None = None


class Membership:
    """The generators that have joined."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._strikes: dict[tuple[str, int], int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def names(self) -> tuple[str, ...]:
        """Everyone, sorted."""
        return tuple(sorted(self._members))

    def is_current(self, name: str, incarnation: int) -> bool:
        """Whether this incarnation of `name` is the member."""
        member = self._members.get(name)
        return member is not None and member.incarnation == incarnation

    def incarnations(self, names: list[str]) -> dict[str, int]:
        """Of these members."""
        return {name: self._members[name].incarnation for name in names}

    def num_ranks(self, name: str) -> int:
        """Places that a member takes in a group."""
        return self._members[name].num_ranks

    def add(self, name: str, incarnation: int, num_ranks: int, held: int = -1) -> None:
        """Take in a member, which has no version of this learner yet."""
        assert name not in self._members
        assert num_ranks > 0
        self._members[name] = _Member(incarnation, num_ranks, held)

    def holds(self, name: str, version: int) -> None:
        """A member says again what it has."""
        self._members[name].held = version

    def remove(self, name: str) -> bool:
        """Forget a member; False if it was none. Its strikes stay."""
        return self._members.pop(name, None) is not None

    def applied(self, name: str, version: int) -> None:
        """Record what a member uses."""
        self._members[name].version = version

    def lagging(self, version: int) -> list[str]:
        """Members without `version` that are not barred from it and hold nothing newer, sorted."""
        return [
            name
            for name, member in sorted(self._members.items())
            if member.version != version and member.held <= version and not self.is_barred(name)
        ]

    def ahead(self, version: int) -> list[str]:
        """Members that hold something newer, sorted."""
        return [name for name in self.names() if self._members[name].held > version]

    def holders(self, version: int) -> list[str]:
        """Members that use `version`, sorted."""
        return [name for name in self.names() if self._members[name].version == version]

    def strike(self, name: str) -> None:
        """Count a failure."""
        key = (name, self._members[name].incarnation)
        self._strikes[key] = self._strikes.get(key, 0) + 1

    def is_barred(self, name: str) -> bool:
        """Whether a member has failed too often under the present version."""
        return self._strikes.get((name, self._members[name].incarnation), 0) >= MAX_STRIKES

    def forgive(self) -> None:
        """A new version: everyone starts afresh."""
        self._strikes.clear()
