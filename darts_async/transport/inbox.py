"""The receiving half of a session: order, duplicates and credit. No input or output.

A message is accepted if its number is the expected one and the window has space. All others are dropped and will be
sent again. Accepted messages are *unhandled* until the consumer acknowledges them.

    len(unhandled) <= window                         the bound on messages that wait for the consumer, also across
                                                     incarnations of the peer
    limit = expected + window - len(unhandled)       never falls within one incarnation of the peer
    handled <= expected <= limit                     `handled` is the cumulative acknowledgement

Proof that the limit never falls: accepting adds one to `expected` and one to `len(unhandled)`; handling and refusing
take from the latter only; skipping adds to the former only.
"""

from collections import deque
from enum import Enum, auto

NO_INCARNATION = -1
"""The incarnation of a peer that was never heard. Real incarnations count from 0."""

Heard = tuple[int, int]
"""An incarnation of the peer, and its first message that this process has not stored. Earlier ones are not delivered
again."""
NOTHING_HEARD: Heard = NO_INCARNATION, 0
"""The start of a receiver without memory."""


class Offer(Enum):
    """What happens to a message that arrives."""

    ACCEPTED = auto()
    REPEATED = auto()
    GAP = auto()
    NO_ROOM = auto()


class Inbox:
    """The messages of one peer, at most `window` of them unhandled."""

    def __init__(self, window: int, heard: Heard = NOTHING_HEARD) -> None:
        self._window = window
        self._unhandled: deque[tuple[int, int]] = deque()  # (incarnation, sequence number)
        self.incarnation, self.expected = heard

    @property
    def handled(self) -> int:
        """All messages of this incarnation below this number, and of earlier ones, have been handled."""
        if not self._unhandled:
            return self.expected
        incarnation, seq = self._unhandled[0]
        return seq if incarnation == self.incarnation else 0

    @property
    def limit(self) -> int:
        """First number without credit for the peer."""
        return self.expected + self._window - len(self._unhandled)

    def begin(self, incarnation: int) -> None:
        """A new incarnation of the peer, which counts from 0 again."""
        assert incarnation > self.incarnation
        self.incarnation = incarnation
        self.expected = 0

    def skip_to(self, first: int) -> None:
        """The peer has no messages below `first`: an earlier incarnation of us handled them, or they were dropped."""
        self.expected = max(self.expected, first)

    def offer(self, seq: int) -> Offer:
        """Accept message `seq` of the current incarnation, or say why not."""
        if seq != self.expected:
            return Offer.REPEATED if seq < self.expected else Offer.GAP
        if len(self._unhandled) >= self._window:
            return Offer.NO_ROOM
        self._unhandled.append((self.incarnation, seq))
        self.expected += 1
        return Offer.ACCEPTED

    def refuse_last(self) -> None:
        """The message just accepted cannot be used: it needs no handling."""
        self._unhandled.pop()

    def acknowledge(self, incarnation: int, seq: int) -> None:
        """The consumer has handled everything up to message `seq` of that incarnation."""
        while self._unhandled and self._unhandled[0] <= (incarnation, seq):
            self._unhandled.popleft()

    def validate(self) -> None:
        """Assert the invariants of the module."""
        assert len(self._unhandled) <= self._window
        assert list(self._unhandled) == sorted(set(self._unhandled))
        assert self.handled <= self.expected <= self.limit
        assert all(key <= (self.incarnation, self.expected - 1) for key in self._unhandled)
