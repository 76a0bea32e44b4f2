"""The members of weight updates: the version of each generator, and its failures. Pure.

A member may hold a version of an earlier learner. A version that is newer than the published one stays in use, because
versions never decrease within a sample. Any other version is replaced.

Invariants: one incarnation per name; three strikes under one version bar an incarnation until the next version,
whether or not it joined again in between.
"""

from dataclasses import dataclass

MAX_STRIKES = 3
"""Failures of a member under one version before it is barred until the next."""


@dataclass(slots=True)
class _Member:
    incarnation: int
    num_ranks: int
    held: int
    """Its version when it joined, from this or an earlier learner."""
    policy_version: int | None = None


class Membership:
    """The generators that have joined."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._strikes: dict[tuple[str, int], int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._members))

    def is_current(self, name: str, incarnation: int) -> bool:
        member = self._members.get(name)
        return member is not None and member.incarnation == incarnation

    def incarnations(self, names: list[str]) -> dict[str, int]:
        return {name: self._members[name].incarnation for name in names}

    def num_ranks(self, name: str) -> int:
        return self._members[name].num_ranks

    def add(self, name: str, incarnation: int, num_ranks: int, held: int = -1) -> None:
        """Add a member, which has no version of this learner yet."""
        assert name not in self._members
        assert num_ranks > 0
        self._members[name] = _Member(incarnation, num_ranks, held)

    def holds(self, name: str, policy_version: int) -> None:
        """A member reports its version again."""
        self._members[name].held = policy_version

    def remove(self, name: str) -> bool:
        """Remove a member; False if it was not a member. Its strikes are kept."""
        return self._members.pop(name, None) is not None

    def applied(self, name: str, policy_version: int) -> None:
        self._members[name].policy_version = policy_version

    def lagging(self, policy_version: int) -> list[str]:
        """Members without `version` that are not barred and have no newer version, sorted."""
        return [
            name
            for name, member in sorted(self._members.items())
            if member.policy_version != policy_version and member.held <= policy_version and not self.is_barred(name)
        ]

    def ahead(self, policy_version: int) -> list[str]:
        return [name for name in self.names() if self._members[name].held > policy_version]

    def holders(self, policy_version: int) -> list[str]:
        return [name for name in self.names() if self._members[name].policy_version == policy_version]

    def strike(self, name: str) -> None:
        key = (name, self._members[name].incarnation)
        self._strikes[key] = self._strikes.get(key, 0) + 1

    def is_barred(self, name: str) -> bool:
        """Whether a member has failed too often under the current version."""
        return self._strikes.get((name, self._members[name].incarnation), 0) >= MAX_STRIKES

    def forgive(self) -> None:
        """A new version begins: clear all strikes."""
        self._strikes.clear()
