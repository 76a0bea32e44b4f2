"""Which process does what: samples to generators, responses to reward processes. Pure bookkeeping, encoded as it is.

A generator is routable when it has applied the newest version known to be published; its version only grows, so a
sample sent to it is decoded under at least the version it has now.
"""

from dataclasses import dataclass, field

from msgspec import Struct


@dataclass(slots=True)
class GeneratorSeat:
    """What the shaper knows of one generator."""

    num_slots: int
    """Samples it decodes at once."""
    capacity: int
    """Samples it may hold: its slots and a short queue."""
    incarnation: int
    policy_version: int = -1
    sample_ids: set[int] = field(default_factory=set)

    @property
    def room(self) -> int:
        """Samples that still fit."""
        return self.capacity - len(self.sample_ids)


class GeneratorRoster(Struct, dict=True, eq=False):
    """The generators of the run."""

    seats: dict[str, GeneratorSeat] = {}
    """Those that are up."""
    published_version: int = -1
    newest_version: int = -1
    """The newest version that any generator has said to use; -1 if none has."""
    owing: set[str] = set()
    """Generators that were silent while they may have decoded: each tells of it before it joins again."""

    def __post_init__(self) -> None:
        self._route()

    def join(self, name: str, num_slots: int, max_queued: int, incarnation: int) -> None:
        """A generator is up, without weights."""
        assert name not in self.seats, name
        self.seats[name] = GeneratorSeat(num_slots, num_slots + max_queued, incarnation)
        self.owing.discard(name)
        self._route()

    def leave(self, name: str, *, is_gone: bool) -> set[int]:
        """A generator is gone for good, or silent; returns the samples that it held."""
        seat = self.seats.pop(name, None)
        if is_gone:
            self.owing.discard(name)
        elif seat is not None:
            self.owing.add(name)
        self._route()
        return seat.sample_ids if seat else set()

    def applied(self, name: str, policy_version: int) -> None:
        """A generator decodes under this version from now on."""
        seat = self.seats.get(name)
        if seat is not None:
            assert policy_version >= seat.policy_version, (name, policy_version)
            seat.policy_version = policy_version
            self.newest_version = max(self.newest_version, policy_version)
            self._route()

    def published(self, policy_version: int) -> None:
        """Generators that have not applied this version get no new work until they have."""
        self.published_version = max(self.published_version, policy_version)
        self._route()

    def reopen(self) -> None:
        """All generators are new: none of them has a version yet, and those before have nothing more to tell."""
        assert not self.seats, sorted(self.seats)
        self.published_version = self.newest_version = -1
        self.owing.clear()

    @property
    def lowest_version(self) -> int | None:
        """The oldest version that a sample started now could be decoded under; None if none is routable."""
        return self._lowest_version

    def roomiest(self, oldest: int = 0) -> str | None:
        """The routable generator of version `oldest` or later with most room, if any has room. Ties go to the first
        by name."""
        best, most = None, 0
        for name, seat in self._routable.items():
            room = seat.capacity - len(seat.sample_ids)
            if room > most and seat.policy_version >= oldest:
                best, most = name, room
        return best

    def has_room(self, name: str, oldest: int) -> bool:
        """Whether this generator could take one more sample, and decodes under version `oldest` or later."""
        seat = self._routable.get(name)
        return seat is not None and seat.room > 0 and seat.policy_version >= oldest

    def release(self, name: str, sample_id: int) -> None:
        """A sample gives its place back."""
        if name in self.seats:
            self.seats[name].sample_ids.discard(sample_id)

    def _route(self) -> None:
        """Renew what follows from seats and versions."""
        oldest = max(self.published_version, 0)
        names = sorted(name for name, seat in self.seats.items() if seat.policy_version >= oldest)
        self._routable = {name: self.seats[name] for name in names}
        self._lowest_version = min((seat.policy_version for seat in self._routable.values()), default=None)


class RewardRoster(Struct, eq=False):
    """The reward processes of the run that are up."""

    items: dict[str, set[int]] = {}
    """The samples that each is to score."""

    def join(self, name: str) -> None:
        """A reward process is up."""
        self.items.setdefault(name, set())

    def leave(self, name: str) -> set[int]:
        """A reward process is gone; returns the samples that it had."""
        return self.items.pop(name, set())

    def assign(self, sample_id: int) -> str | None:
        """Give an item to the process with the fewest; None if none is up."""
        if not self.items:
            return None
        name = min(self.items, key=lambda name: (len(self.items[name]), name))
        self.items[name].add(sample_id)
        return name

    def done(self, name: str, sample_id: int) -> bool:
        """The process has answered; False if the item was not its own, or no longer."""
        items = self.items.get(name, set())
        known = sample_id in items
        items.discard(sample_id)
        return known
