"""The sending half of a session: numbered messages, kept until the peer has handled them. No input or output.

    first_unacknowledged <= received <= end          all sequence numbers; `end` is the next one to be given
    first_unacknowledged <= cursor <= end            `cursor` is the next one to be transmitted
    cursor <= max(limit, first_unacknowledged)       `limit` is the credit: the first one that must wait

`received` is how many messages the peer reports as received, and `first_unacknowledged` how many as *handled*. Messages
that were not received are sent again; those that wait for a slow consumer are not. Messages keep their number even when
the peer restarts, so duplicates are recognised.
"""

from collections import deque

from darts_async.errors import NonsenseError, OutboxFullError
from darts_async.transport.codec import Payload


class Outbox:
    """Messages for one peer, at most `max_messages` of them unacknowledged."""

    def __init__(self, peer: str, max_messages: int) -> None:
        self._peer = peer
        self._max_messages = max_messages
        self._payloads: deque[Payload] = deque()
        self._progress_s = 0.0
        self.first_unacknowledged = 0
        self.received = 0
        self.cursor = 0
        self.limit = 0

    def __len__(self) -> int:
        return len(self._payloads)

    @property
    def end(self) -> int:
        """The sequence number of the next message."""
        return self.first_unacknowledged + len(self._payloads)

    def push(self, payload: Payload) -> None:
        """Append a message. Raises `OutboxFullError`."""
        if len(self._payloads) >= self._max_messages:
            raise OutboxFullError(
                f"the outbox for {self._peer} is full: {len(self._payloads)} messages are unacknowledged "
                f"(transport.max_outbox)"
            )
        self._payloads.append(payload)

    def forget(self) -> None:
        """Drop all unacknowledged messages. Their numbers are not used again."""
        self.first_unacknowledged = self.received = self.cursor = self.end
        self._payloads.clear()

    def start_over(self) -> None:
        """The peer lost its memory: it has received no kept message, and has given no credit."""
        self.received = self.cursor = self.limit = self.first_unacknowledged

    def rewind(self, now_s: float) -> None:
        """Transmit again the messages that the peer has not received."""
        self.cursor = self.received
        self._progress_s = now_s

    def next_to_send(self) -> tuple[int, Payload] | None:
        """The message at the cursor with its number, if there is one with credit."""
        if self.cursor >= min(self.limit, self.end):
            return None
        return self.cursor, self._payloads[self.cursor - self.first_unacknowledged]

    def sent(self, now_s: float) -> None:
        """The message at the cursor was handed to the network."""
        if self.cursor == self.received:
            self._progress_s = now_s
        self.cursor += 1

    def check_report(self, handled: int, received: int) -> None:
        """Raise `NonsenseError` if the peer's report is impossible."""
        if not handled <= received <= self.end:
            raise NonsenseError(
                f"{self._peer} reports {handled} messages handled and {received} received of {self.end}"
            )

    def report(self, handled: int, received: int, limit: int, now_s: float) -> None:
        """Handle the peer's report. Reports may be late or repeated; the newest counts."""
        while self.first_unacknowledged < handled:
            self._payloads.popleft()
            self.first_unacknowledged += 1
        if received > self.received:
            self.received = received
            self._progress_s = now_s
        self.cursor = max(self.cursor, self.received)
        self.limit = max(self.limit, limit)

    def is_stalled(self, now_s: float, resend_after_s: float) -> bool:
        """Whether a transmitted message has not arrived for too long."""
        return self.received < self.cursor and now_s - self._progress_s >= resend_after_s

    def validate(self) -> None:
        """Assert the invariants of the module."""
        assert 0 <= self.first_unacknowledged <= self.received <= self.end
        assert self.first_unacknowledged <= self.cursor <= max(self.limit, self.received)
        assert self.cursor <= self.end
        assert len(self._payloads) <= self._max_messages
