"""A reliable, ordered session with one peer over a network that loses, repeats and reorders. No input or output.

Every frame carries an `Envelope`: the complete state of its sender towards the receiver. There is no other control
message, so a frame can be lost, repeated or late without harm: the next frame repeats all information. The first one is
the handshake. A frame without a message is a keep-alive, an acknowledgement or a grant of credit.

*Identity.* A process is `(name, incarnation)`; a restart gives it a larger incarnation. A message is
`(name, incarnation, sequence number)`. Frames of an older incarnation are refused. If a frame is addressed to another
incarnation of us, only its identity counts: its report uses the numbers of a predecessor, and a predecessor may have
acknowledged its message.

*Delivery* is in order and exactly once for each pair of incarnations. A new incarnation of a peer gets every message
that the old one has not acknowledged. Acknowledgements come from the consumer, after handling. So a message is handled
at least once, and more than once only if it was in flight when the receiver died. Its envelope names the first
unacknowledged number, where a receiver without memory begins: an earlier incarnation has acknowledged all lower numbers
(or the sender dropped them). A receiver that has stored what it handled begins after that (`heard`), and so handles
every message exactly once.

*Repair* is go-back-N: by timer, when a gap shows, and when the peer is back.

*Credit* is an absolute window: numbers below `limit` may be sent. It cannot drift when a grant is lost.

*Acknowledgements are delayed.* They are sent with the next message in the other direction, when half of the window has
been handled since the last one, or at the next tick. A separate frame for each message would double the traffic. So the
sender keeps a message a little longer, and sends it again if the receiver dies in the meantime.
"""

from typing import Annotated

from msgspec import Meta, Struct

from darts_async.config import TransportConfig
from darts_async.errors import NonsenseError, ProtocolError
from darts_async.transport.codec import Payload
from darts_async.transport.inbox import NO_INCARNATION, NOTHING_HEARD, Heard, Inbox, Offer
from darts_async.transport.outbox import Outbox

Count = Annotated[int, Meta(ge=0, lt=1 << 62)]


class Envelope(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The first frame of every transmission. `seq` is None if no message follows."""

    sender: str
    incarnation: Count
    peer_incarnation: Annotated[int, Meta(ge=NO_INCARNATION, lt=1 << 62)]  # the addressee
    received: Count  # all messages below have arrived
    handled: Count  # all messages below are acknowledged
    limit: Count  # messages below may be sent
    first_unacknowledged: Count
    seq: Count | None = None
    resend: bool = False  # please send again from `received` on
    closing: bool = False  # the last envelope of this incarnation


class Up(Struct, frozen=True):
    """The peer answers."""

    incarnation: int


class Down(Struct, frozen=True):
    """The peer is silent, gone or replaced."""

    incarnation: int
    reason: str
    is_gone: bool
    """This incarnation sends no more frames on any connection. (A silent one may.)"""


class Delivered(Struct, frozen=True):
    """The message in this frame is next. The consumer acknowledges it with these numbers."""

    incarnation: int
    seq: int


SessionEvent = Up | Down | Delivered


class Session:
    """Both directions between `(name, incarnation)` and one peer. Times are of one monotonic clock, in seconds."""

    def __init__(
        self,
        name: str,
        incarnation: int,
        peer: str,
        config: TransportConfig,
        now_s: float,
        heard: Heard = NOTHING_HEARD,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.peer = peer
        self.is_up = False
        self._is_gone = False
        self._ended_incarnation = NO_INCARNATION
        self.outbox = Outbox(peer, config.max_outbox)
        self.inbox = Inbox(config.window, heard)
        self._config = config
        self._heard_s = self._ticked_s = now_s
        self._sent_s = float("-inf")
        self._owes_envelope = True
        self._owes_report = False
        self._told_limit = 0
        self._asks_resend = False
        self._gap_asked_at = -1

    @property
    def peer_incarnation(self) -> int:
        """The newest incarnation of the peer that was heard, or `NO_INCARNATION`."""
        return self.inbox.incarnation

    @property
    def is_worth_waiting_for(self) -> bool:
        """Whether acknowledgements are due from a peer that is up, or that was never heard yet."""
        return len(self.outbox) > 0 and (self.is_up or self.peer_incarnation == NO_INCARNATION)

    # --- what happens ----------------------------------------------------------------------------------------

    def push(self, payload: Payload) -> None:
        """Queue a message. Raises `OutboxFullError`."""
        self.outbox.push(payload)

    def forget(self) -> None:
        """Drop the unacknowledged messages: they are not sent again, to no incarnation of the peer."""
        self.outbox.forget()
        self._owes_envelope = True

    def receive(self, envelope: Envelope, now_s: float) -> list[SessionEvent]:
        """Handle a frame of this peer. Raises `ProtocolError` for a late frame and `NonsenseError` for an impossible
        one, without any effect."""
        self._check(envelope)
        self._heard_s = now_s
        events = self._greet(envelope, now_s)
        if envelope.peer_incarnation == self.incarnation:
            events += self._take(envelope, now_s)
        if envelope.closing:
            events.append(self._lose("it closed the link"))
        return events

    def end(self, incarnation: int, *, forget: bool) -> list[SessionEvent]:
        """This incarnation of the peer has certainly ended. Its later frames are refused, and unacknowledged messages
        are dropped (`forget`) or kept for the next one. This is also news about a silent peer, or about one that only
        our previous incarnation heard."""
        self._ended_incarnation = max(self._ended_incarnation, incarnation)
        if self.peer_incarnation > incarnation:
            return []  # its successor is already up
        if forget:
            self.forget()
        is_news = self.peer_incarnation != NO_INCARNATION and not self._is_gone
        return [self._lose("it has ended")] if is_news else []

    def acknowledge(self, incarnation: int, seq: int) -> None:
        """The consumer has handled everything delivered up to this message."""
        self.inbox.acknowledge(incarnation, seq)
        self._owes_report = True
        if 2 * (self.inbox.limit - self._told_limit) >= self._config.window:
            self._owes_envelope = True

    def refuse_last(self) -> None:
        """The message just delivered is unusable. It counts as handled, so that it is not sent again forever."""
        self.inbox.refuse_last()
        self._owes_report = True

    def reconnect(self, now_s: float) -> None:
        """The peer has a new connection: frames in flight on the old one may be lost in both directions."""
        self.outbox.rewind(now_s)
        self._owes_envelope = self._asks_resend = True

    def tick(self, now_s: float) -> list[SessionEvent]:
        """Call this several times per `heartbeat_s` and `resend_after_s`."""
        self._forgive_own_absence(now_s)
        if self._owes_report or now_s - self._sent_s >= self._config.heartbeat_s:
            self._owes_envelope = True
        silent_s = now_s - self._heard_s
        if self.is_up and silent_s >= self._config.dead_after_s:
            return [self._lose(f"it was silent for {silent_s:.1f} s", is_gone=False)]
        if self.outbox.is_stalled(now_s, self._config.resend_after_s):
            self.outbox.rewind(now_s)
        return []

    # --- what to send ----------------------------------------------------------------------------------------

    def next_frame(self) -> tuple[Envelope, Payload] | None:
        """The frame to send now, if any. Call `sent` when the network has taken it."""
        if self.is_up and (item := self.outbox.next_to_send()) is not None:
            seq, payload = item
            return self._envelope(seq=seq), payload
        return (self._envelope(), ()) if self._owes_envelope else None

    def sent(self, envelope: Envelope, now_s: float) -> None:
        """The network has taken the frame that `next_frame` returned."""
        if envelope.seq is not None:
            self.outbox.sent(now_s)
        self._sent_s, self._told_limit = now_s, envelope.limit
        self._owes_envelope = self._owes_report = self._asks_resend = False

    def farewell(self) -> Envelope:
        """The last envelope of this incarnation."""
        return self._envelope(closing=True)

    def validate(self) -> None:
        """Assert the invariants of both halves."""
        self.outbox.validate()
        self.inbox.validate()
        assert not self.is_up or self.peer_incarnation != NO_INCARNATION

    # --- inside ----------------------------------------------------------------------------------------------

    def _envelope(self, *, seq: int | None = None, closing: bool = False) -> Envelope:
        inbox = self.inbox
        return Envelope(
            sender=self.name,
            incarnation=self.incarnation,
            peer_incarnation=inbox.incarnation,
            received=inbox.expected,
            handled=inbox.handled,
            limit=inbox.limit,
            first_unacknowledged=self.outbox.first_unacknowledged,
            seq=seq,
            resend=self._asks_resend,
            closing=closing,
        )

    def _check(self, envelope: Envelope) -> None:
        if envelope.incarnation < self.peer_incarnation:
            raise ProtocolError(
                f"a frame of incarnation {envelope.incarnation} of {self.peer}, "
                f"which has been replaced by {self.peer_incarnation}"
            )
        if envelope.incarnation <= self._ended_incarnation:
            raise ProtocolError(f"a frame of incarnation {envelope.incarnation} of {self.peer}, which has ended")
        if envelope.seq is not None and envelope.seq < envelope.first_unacknowledged:
            raise NonsenseError(f"{self.peer} sends message {envelope.seq}, which it calls acknowledged")
        if envelope.peer_incarnation == self.incarnation:
            self.outbox.check_report(envelope.handled, envelope.received)

    def _greet(self, envelope: Envelope, now_s: float) -> list[SessionEvent]:
        """The transitions that follow from hearing this incarnation."""
        if envelope.incarnation == self.peer_incarnation and self.is_up:
            return []
        events: list[SessionEvent] = []
        if envelope.incarnation != self.peer_incarnation:
            if self.is_up:
                events.append(self._lose(f"incarnation {envelope.incarnation} replaced it"))
            self.inbox.begin(envelope.incarnation)
            self.outbox.start_over()
            self._owes_envelope = True
        else:
            self.reconnect(now_s)
        self.is_up, self._is_gone = True, False
        return [*events, Up(envelope.incarnation)]

    def _lose(self, reason: str, *, is_gone: bool = True) -> Down:
        self.is_up, self._is_gone = False, is_gone
        return Down(self.peer_incarnation, reason, is_gone)

    def _take(self, envelope: Envelope, now_s: float) -> list[SessionEvent]:
        """Handle report, request and message of an envelope that is addressed to this incarnation."""
        self.outbox.report(envelope.handled, envelope.received, envelope.limit, now_s)
        if envelope.resend:
            self.outbox.rewind(now_s)
        self.inbox.skip_to(envelope.first_unacknowledged)
        if envelope.seq is not None and self._is_next(envelope.seq):
            return [Delivered(envelope.incarnation, envelope.seq)]
        return []

    def _is_next(self, seq: int) -> bool:
        match self.inbox.offer(seq):
            case Offer.ACCEPTED:
                self._owes_report = True
                return True
            case Offer.GAP if self._gap_asked_at != self.inbox.expected:
                self._gap_asked_at = self.inbox.expected
                self._owes_envelope = self._asks_resend = True
            case Offer.REPEATED:
                self._owes_report = True
        return False

    def _forgive_own_absence(self, now_s: float) -> None:
        """Time in which this process did not look (its loop was blocked) does not count as silence of the peer."""
        absence_s = now_s - self._ticked_s
        self._ticked_s = now_s
        if absence_s > self._config.heartbeat_s:
            self._heard_s = min(now_s, self._heard_s + absence_s)
