"""One attempt to send one version to an audience: the answers so far, and the deadline. Pure.

    FORMING --all ready--> TRANSFERRING --all staged, sums equal--> APPLYING --all applied--> over

Invariants: `waiting_for` is a subset of `audience`; APPLYING is only entered with every checksum equal to the
learner's; each phase has its own deadline.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from darts_async.weights.sending.events import Published

Checksums = tuple[int, ...]


class Phase(Enum):
    """What a round waits for. The values complete the sentence "it took too long ..."."""

    FORMING = "to join the group"
    TRANSFERRING = "to stage the weights"
    APPLYING = "to apply the weights"


@dataclass(slots=True)
class Round:
    """The state of a round. `now` and deadlines are on one clock, in seconds."""

    epoch: int
    policy_version: int
    audience: set[str]
    deadline_s: float
    began: float
    phase: Phase = Phase.FORMING
    waiting_for: set[str] = field(init=False)
    expected: Checksums | None = None
    """The learner's checksums, once it has sent all buckets."""
    staged: dict[str, Checksums] = field(default_factory=dict)
    stalls_s: dict[str, float] = field(default_factory=dict)
    _durations_s: dict[Phase, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting_for = set(self.audience)

    @property
    def deadline(self) -> float:
        return self.began + self.deadline_s

    @property
    def is_committed(self) -> bool:
        """Whether members may already use the weights, so that the round cannot be undone."""
        return self.phase is Phase.APPLYING

    def enter(self, phase: Phase, now_s: float) -> None:
        """Begin a phase, and wait for every member of it."""
        self._durations_s[self.phase] = now_s - self.began
        self.phase, self.began = phase, now_s
        self.waiting_for = set(self.audience)

    def stage(self, name: str, checksums: Checksums) -> None:
        """A member has received all buckets."""
        self.staged[name] = checksums
        self.waiting_for.discard(name)

    def apply(self, name: str, stall_s: float) -> None:
        """A member uses the new weights."""
        self.stalls_s[name] = stall_s
        self.waiting_for.discard(name)

    def forget(self, name: str) -> None:
        self.audience.discard(name)
        self.waiting_for.discard(name)
        self.stalls_s.pop(name, None)

    def wrong(self) -> list[str]:
        """Members whose checksums differ from the learner's, as far as both are known."""
        if self.expected is None:
            return []
        return sorted(name for name, checksums in self.staged.items() if checksums != self.expected)

    def can_commit(self) -> bool:
        """Whether all members have staged, and the learner has sent. `wrong` checks the checksums."""
        return self.phase is Phase.TRANSFERRING and self.expected is not None and not self.waiting_for

    def published(self, dropped: Mapping[str, str], now_s: float) -> Published:
        return Published(
            self.policy_version,
            tuple(sorted(self.audience)),
            dict(dropped),
            forming_s=self._durations_s[Phase.FORMING],
            transfer_s=self._durations_s[Phase.TRANSFERRING],
            apply_s=now_s - self.began,
            stalls_s=dict(self.stalls_s),
        )

    def validate(self) -> None:
        assert self.audience
        assert self.waiting_for <= self.audience
        assert not self.wrong()
        if self.is_committed:
            assert self.waiting_for
            assert all(self.staged[name] == self.expected for name in self.audience)
