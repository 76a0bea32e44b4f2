"""Which process does what: samples to generators, responses to reward processes. Pure bookkeeping.

A generator is routable when it has applied the newest version known to be published; its version only grows, so a
sample sent to it is decoded under at least the version it has now.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import Struct


@dataclass(slots=True)
class GeneratorSeat:
    """What the shaper knows of one generator."""

    num_slots: int
    """Samples it decodes at once."""
    capacity: int
    """Samples it may hold: its slots and a short queue."""
    incarnation: int = 1
    policy_version: int = -1
    sample_ids: set[int] = field(default_factory=set)

    @property
    def room(self) -> int:
        """Samples that still fit."""
        return self.capacity - len(self.sample_ids)


class GeneratorsState(Struct, frozen=True):
    """What a `GeneratorRoster` knows."""

    seats: dict[str, GeneratorSeat]
    published_version: int
    newest_version: int
    owing: set[str]


class GeneratorRoster:
    """The generators of the run."""

    def __init__(self) -> None:
        self._seats: dict[str, GeneratorSeat] = {}
        self._published_version = -1
        self._newest_version = -1
        self._routable: dict[str, GeneratorSeat] = {}
        """The seats that have applied the newest published version; renewed when seats or versions change."""
        self._lowest_version: int | None = None
        self.owing: set[str] = set()
        """Generators that were silent while they may have decoded: each tells of it before it joins again."""

    def join(self, name: str, num_slots: int, max_queued: int, incarnation: int = 1) -> None:
        """A generator is up, without weights."""
        assert name not in self._seats, name
        self._seats[name] = GeneratorSeat(num_slots, num_slots + max_queued, incarnation)
        self.owing.discard(name)
        self._route()

    def leave(self, name: str, *, is_gone: bool) -> set[int]:
        """A generator is gone for good, or has not been heard of; the samples it held are returned."""
        seat = self._seats.pop(name, None)
        if is_gone:
            self.owing.discard(name)
        elif seat is not None:
            self.owing.add(name)
        self._route()
        return seat.sample_ids if seat else set()

    def applied(self, name: str, policy_version: int) -> None:
        """A generator decodes under this version from now on."""
        seat = self._seats.get(name)
        if seat is not None:
            assert policy_version >= seat.policy_version, (name, policy_version)
            seat.policy_version = policy_version
            self._newest_version = max(self._newest_version, policy_version)
            self._route()

    def published(self, policy_version: int) -> None:
        """Generators that have not applied this version get no new work until they have."""
        self._published_version = max(self._published_version, policy_version)
        self._route()

    def reopen(self) -> None:
        """All generators are new: none of them has a version yet, and those before have nothing more to tell."""
        assert not self._seats, sorted(self._seats)
        self._published_version = self._newest_version = -1
        self.owing.clear()

    @property
    def newest_version(self) -> int:
        """The newest version that any generator has said to use; -1 if none has."""
        return self._newest_version

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

    def has_room(self, name: str, oldest: int = 0) -> bool:
        """Whether this generator could take one more sample, and decodes under version `oldest` or later."""
        seat = self._routable.get(name)
        return seat is not None and seat.room > 0 and seat.policy_version >= oldest

    def assign(self, name: str, sample_id: int) -> GeneratorSeat:
        """A sample takes a place, of the generator that is returned."""
        seat = self._seats[name]
        seat.sample_ids.add(sample_id)
        return seat

    def release(self, name: str, sample_id: int) -> None:
        """A sample gives its place back."""
        if name in self._seats:
            self._seats[name].sample_ids.discard(sample_id)

    def seat(self, name: str) -> GeneratorSeat | None:
        """A generator that is up."""
        return self._seats.get(name)

    @property
    def num_in_flight(self) -> int:
        """Samples in all generators."""
        return sum(len(seat.sample_ids) for seat in self._seats.values())

    def seats(self) -> Iterator[tuple[str, GeneratorSeat]]:
        """All generators that are up."""
        return iter(self._seats.items())

    def to_state(self) -> GeneratorsState:
        """For `restore`."""
        return GeneratorsState(
            seats=self._seats,
            published_version=self._published_version,
            newest_version=self._newest_version,
            owing=self.owing,
        )

    def restore(self, state: GeneratorsState) -> None:
        """Continue where `to_state` was taken."""
        self._seats, self._published_version = state.seats, state.published_version
        self._newest_version, self.owing = state.newest_version, state.owing
        self._route()

    def _route(self) -> None:
        oldest = max(self._published_version, 0)
        names = sorted(name for name, seat in self._seats.items() if seat.policy_version >= oldest)
        self._routable = {name: self._seats[name] for name in names}
        self._lowest_version = min((seat.policy_version for seat in self._routable.values()), default=None)


class RewardRoster:
    """The reward processes of the run and the items each has."""

    def __init__(self) -> None:
        self._items: dict[str, set[int]] = {}

    def join(self, name: str) -> None:
        """A reward process is up."""
        self._items.setdefault(name, set())

    def leave(self, name: str) -> set[int]:
        """A reward process is gone; the samples it had are returned."""
        return self._items.pop(name, set())

    def forget_items(self) -> None:
        """What the processes have is of no use any more."""
        for items in self._items.values():
            items.clear()

    @property
    def num_up(self) -> int:
        """Reward processes that are up."""
        return len(self._items)

    def assign(self, sample_id: int) -> str | None:
        """Give an item to the process with the fewest; None if none is up."""
        if not self._items:
            return None
        name = min(self._items, key=lambda name: (len(self._items[name]), name))
        self._items[name].add(sample_id)
        return name

    def done(self, name: str, sample_id: int) -> bool:
        """The process has answered; False if the item was not (any more) its own."""
        items = self._items.get(name, set())
        known = sample_id in items
        items.discard(sample_id)
        return known

    def to_state(self) -> dict[str, set[int]]:
        """For `restore`: the items of each process."""
        return self._items

    def restore(self, state: dict[str, set[int]]) -> None:
        """Continue where `to_state` was taken."""
        self._items = state
