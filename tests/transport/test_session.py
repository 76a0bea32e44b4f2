"""Two sessions over a network that loses, repeats, reorders and delays, with restarts of either side."""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darts_async.config import TransportConfig
from darts_async.errors import ProtocolError, TransportError
from darts_async.transport.codec import Payload
from darts_async.transport.session import Delivered, Down, Envelope, Session, Up

CONFIG = TransportConfig(window=4, max_outbox=50, heartbeat_s=1.0, dead_after_s=10.0, resend_after_s=2.0)
TICK_S = 0.5


@dataclass
class Side:
    """A process: its session, the log of its consumer, and what it was given to send."""

    name: str
    peer: str
    incarnation: int = 0
    session: Session = field(init=False)
    waiting: list[tuple[int, int]] = field(default_factory=list)  # delivered to the mailbox, not handled
    delivered: list[tuple[int, int, int, bytes]] = field(default_factory=list)  # (own, peer, seq, content)
    acknowledged: set[tuple[int, int]] = field(default_factory=set)  # (peer incarnation, seq), in any incarnation
    acknowledged_before: dict[int, int] = field(default_factory=dict)  # what the peer knew when this one started
    kept: set[tuple[int, int]] = field(default_factory=set)  # (peer incarnation, seq), by those before this one
    sent: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart(0.0)

    def restart(self, now_s: float) -> None:
        self.incarnation += 1
        self.session = Session(self.name, self.incarnation, self.peer, CONFIG, now_s)
        self.waiting = []
        self.kept = set()

    def restart_with_memory(self, now_s: float) -> None:
        """Everything that was delivered has been kept, and nothing else."""
        inbox = self.session.inbox
        self.acknowledged.update(self.waiting)
        kept = self.kept | {(peer, seq) for own, peer, seq, _ in self.delivered if own == self.incarnation}
        self.restart(now_s)
        self.kept = kept
        heard = inbox.incarnation, inbox.expected
        self.session = Session(self.name, self.incarnation, self.peer, CONFIG, now_s, heard)

    def send(self) -> None:
        content = b"%d" % len(self.sent)
        try:
            self.session.push((content,))
        except TransportError:
            return
        self.sent.append((self.incarnation, content))

    def handle(self, num_messages: int) -> None:
        handled, self.waiting = self.waiting[:num_messages], self.waiting[num_messages:]
        self.acknowledged.update(handled)
        if handled:
            self.session.acknowledge(*handled[-1])

    def take(self, envelope: Envelope, payload: Payload, now_s: float) -> None:
        if envelope.incarnation < self.session.peer_incarnation:
            with pytest.raises(ProtocolError, match="replaced"):
                self.session.receive(envelope, now_s)
            return
        events = self.session.receive(envelope, now_s)
        for event in events:
            if isinstance(event, Delivered):
                key = (event.incarnation, event.seq)
                assert key not in self.kept
                assert event.seq >= self.acknowledged_before.get(event.incarnation, 0)
                self.delivered.append((self.incarnation, *key, payload[0]))
                self.waiting.append(key)


Frame = tuple[Envelope, Payload]


class Network:
    """Frames in flight from side 0 and from side 1."""

    def __init__(self) -> None:
        self.sides = (Side("a", "b"), Side("b", "a"))
        self.flying: tuple[list[Frame], list[Frame]] = ([], [])
        self.now_s = 0.0

    def transmit(self, origin: int) -> None:
        session = self.sides[origin].session
        while (frame := session.next_frame()) is not None:
            session.sent(frame[0], self.now_s)
            self.flying[origin].append(frame)

    def arrive(self, origin: int, index: int, *, keep: bool = False) -> None:
        frames = self.flying[origin]
        if frames:
            index %= len(frames)
            frame = frames[index] if keep else frames.pop(index)
            self.sides[1 - origin].take(*frame, self.now_s)

    def lose(self, origin: int, index: int) -> None:
        if self.flying[origin]:
            self.flying[origin].pop(index % len(self.flying[origin]))

    def pass_time(self) -> None:
        self.now_s += TICK_S
        for side in self.sides:
            side.session.tick(self.now_s)

    def step(self, action: str, origin: int, index: int) -> None:
        side = self.sides[origin]
        match action:
            case "send":
                side.send()
            case "arrive":
                self.arrive(origin, index)
            case "repeat":
                self.arrive(origin, index, keep=True)
            case "lose":
                self.lose(origin, index)
            case "handle":
                side.handle(index)
            case "restart":
                other = self.sides[1 - origin]
                side.acknowledged_before = {other.incarnation: other.session.outbox.first_unacknowledged}
                side.restart(self.now_s)
            case "restart with memory":
                side.restart_with_memory(self.now_s)
            case "reconnect":
                side.session.reconnect(self.now_s)
            case "time":
                self.pass_time()
        self.transmit(origin)

    def heal(self) -> None:
        """From here on nothing is lost: everything must get through in bounded time."""
        for _ in range(60):
            self.pass_time()
            for origin in (0, 1):
                self.transmit(origin)
                while self.flying[origin]:
                    self.arrive(origin, 0)
            for side in self.sides:
                side.handle(CONFIG.window)
                side.session.validate()

    def check(self) -> None:
        for side in self.sides:
            side.session.validate()
            assert len(side.waiting) <= CONFIG.window


ACTIONS = [*["send"] * 6, *["arrive"] * 10, "repeat", "lose", *["handle"] * 3, "time", "reconnect", "restart"]
ACTIONS += ["restart with memory"]
STEP = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1), st.integers(0, 20))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=30) | st.lists(STEP, min_size=100, max_size=250))
def test_any_network_delivers_in_order_once_per_pair_and_everything_in_the_end(
    steps: list[tuple[str, int, int]],
) -> None:
    network = Network()
    for action, origin, index in steps:
        network.step(action, origin, index)
        network.check()
    network.heal()
    for side, sender in zip(network.sides, reversed(network.sides), strict=True):
        assert len(sender.session.outbox) == 0
        check_order(side)
        check_complete(side, sender)


def check_order(side: Side) -> None:
    """Within a pair of incarnations the numbers are consecutive."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for own, peer, seq, _ in side.delivered:
        pairs.setdefault((own, peer), []).append(seq)
    for seqs in pairs.values():
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def check_complete(side: Side, sender: Side) -> None:
    """Everything that the last incarnation of the sender sent was handled, and numbers name contents."""
    contents = [content for incarnation, content in sender.sent if incarnation == sender.incarnation]
    assert {(sender.incarnation, seq) for seq in range(len(contents))} <= side.acknowledged
    for _, peer, seq, content in side.delivered:
        if peer == sender.incarnation:
            assert content == contents[seq]


# --- single rules ---------------------------------------------------------------------------------------------


def connected() -> Network:
    network = Network()
    exchange(network)
    return network


def exchange(network: Network) -> None:
    """Everything in flight arrives, in order, until nothing more is sent."""
    for _ in range(10):
        for origin in (0, 1):
            network.transmit(origin)
            while network.flying[origin]:
                network.arrive(origin, 0)


def test_handshake_brings_both_sides_up_with_credit() -> None:
    network = connected()
    assert all(side.session.is_up for side in network.sides)
    assert all(side.session.outbox.limit == CONFIG.window for side in network.sides)


def test_slow_consumer_is_not_sent_the_same_again() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(10):
        a.send()
    exchange(network)
    assert len(b.waiting) == CONFIG.window
    num_data = 0
    for _ in range(40):
        network.pass_time()
        network.transmit(0)
        num_data += sum(envelope.seq is not None for envelope, _ in network.flying[0])
        exchange(network)
    assert num_data == 0
    b.handle(CONFIG.window)
    exchange(network)
    assert len(b.delivered) == 2 * CONFIG.window


def test_gap_is_repaired_without_waiting_for_the_timer() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(3):
        a.send()
    network.transmit(0)
    network.lose(0, 0)
    exchange(network)
    assert [seq for _, _, seq, _ in b.delivered] == [0, 1, 2]


def test_lost_tail_is_sent_again_after_the_timer() -> None:
    network = connected()
    a, b = network.sides
    a.send()
    network.transmit(0)
    network.lose(0, 0)
    for _ in range(5):
        exchange(network)
        network.pass_time()
    exchange(network)
    assert len(b.delivered) == 1


def test_restarted_receiver_gets_exactly_what_was_not_acknowledged() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(3):
        a.send()
    exchange(network)
    b.session.acknowledge(1, 0)
    network.pass_time()
    exchange(network)
    b.restart(network.now_s)
    exchange(network)
    assert [(own, seq) for own, _, seq, _ in b.delivered] == [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]


def test_receiver_that_has_kept_what_it_was_sent_gets_only_what_is_new() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(3):
        a.send()
    exchange(network)
    b.session.acknowledge(1, 0)
    b.restart_with_memory(network.now_s)
    a.send()
    exchange(network)
    assert [(own, seq) for own, _, seq, _ in b.delivered] == [(1, 0), (1, 1), (1, 2), (2, 3)]
    b.handle(1)
    network.pass_time()
    exchange(network)
    assert len(a.session.outbox) == 0, "what was kept counts as acknowledged"


def test_what_was_handled_is_told_with_the_next_message() -> None:
    network = connected()
    a, b = network.sides
    a.send()
    exchange(network)
    b.handle(1)
    network.transmit(1)
    assert network.flying[1] == [], "not by a frame of its own"
    b.send()
    exchange(network)
    assert len(a.session.outbox) == 0


def test_what_was_handled_is_told_by_the_next_tick_at_the_latest() -> None:
    network = connected()
    a, b = network.sides
    a.send()
    exchange(network)
    b.handle(1)
    network.pass_time()
    exchange(network)
    assert len(a.session.outbox) == 0


def test_half_a_window_that_was_handled_is_told_at_once() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(CONFIG.window + 2):
        a.send()
    exchange(network)
    assert len(b.waiting) == CONFIG.window
    b.handle(1)
    exchange(network)
    assert len(b.waiting) == CONFIG.window - 1
    b.handle(1)
    exchange(network)
    assert len(b.waiting) == CONFIG.window, "there is credit for two more"


def test_forgotten_messages_are_not_sent_to_the_next_incarnation() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(3):
        a.send()
    exchange(network)
    a.session.forget()
    b.restart(network.now_s)
    exchange(network)
    a.send()
    exchange(network)
    assert [(own, seq) for own, _, seq, _ in b.delivered][3:] == [(2, 3)]


def test_forgetting_in_mid_stream_leaves_no_gap_and_no_deadlock() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(6):
        a.send()
    network.transmit(0)
    network.lose(0, 1)
    a.session.forget()
    for _ in range(6):
        a.send()
    network.heal()
    assert len(a.session.outbox) == 0
    assert [seq for _, _, seq, _ in b.delivered][-6:] == list(range(6, 12))


def test_frames_of_an_older_incarnation_are_refused_and_change_nothing() -> None:
    network = connected()
    a, b = network.sides
    a.send()
    network.transmit(0)
    old = network.flying[0].pop()
    a.restart(network.now_s)
    exchange(network)
    with pytest.raises(ProtocolError, match="incarnation 1 of a, which has been replaced by 2"):
        b.session.receive(old[0], network.now_s)
    assert b.session.peer_incarnation == 2
    assert b.delivered == []


def test_new_incarnation_of_a_live_peer_is_a_loss_and_a_return() -> None:
    network = connected()
    a, b = network.sides
    a.restart(network.now_s)
    frame = a.session.next_frame()
    assert frame is not None
    events = b.session.receive(frame[0], network.now_s)
    assert events == [Down(1, "incarnation 2 replaced it", is_gone=True), Up(2)]


def test_silent_peer_is_down_and_comes_back_with_its_memory() -> None:
    network = connected()
    a, b = network.sides
    a.send()
    exchange(network)
    events = []
    for _ in range(30):
        network.now_s += TICK_S
        events += b.session.tick(network.now_s)
    assert [type(event) for event in events] == [Down]
    assert b.session.next_frame() is not None, "a peer that is down is still greeted"
    frame = a.session.next_frame() or (a.session.farewell(), ())
    assert b.session.receive(frame[0], network.now_s)[0] == Up(1)
    reply = b.session.next_frame()
    assert reply is not None
    assert reply[0].resend, "what was under way meanwhile may be lost"


def test_own_absence_is_not_silence_of_the_peer() -> None:
    network = connected()
    session = network.sides[0].session
    session.tick(1.0)
    assert session.tick(1.0 + 5 * CONFIG.dead_after_s) == []
    assert session.is_up


def test_full_outbox_names_the_peer() -> None:
    session = Session("a", 0, "generator/3", CONFIG, 0.0)
    for _ in range(CONFIG.max_outbox):
        session.push((b"",))
    with pytest.raises(TransportError, match="generator/3"):
        session.push((b"",))


def test_refused_message_counts_as_handled_after_those_before_it() -> None:
    network = connected()
    a, b = network.sides
    for _ in range(2):
        a.send()
    network.transmit(0)
    network.arrive(0, 0)
    network.arrive(0, 0)
    b.session.refuse_last()
    assert b.session.inbox.handled == 0
    b.session.acknowledge(1, 0)
    assert b.session.inbox.handled == 2


def test_impossible_reports_are_refused() -> None:
    network = connected()
    a = network.sides[0]
    envelope = Envelope("b", 1, 1, received=5, handled=0, limit=9, first_unacknowledged=0)
    with pytest.raises(ProtocolError, match="5 received of 0"):
        a.session.receive(envelope, network.now_s)


def test_peer_that_ignores_its_credit_is_not_served() -> None:
    b = Session("b", 1, "a", CONFIG, 0.0)
    for seq in range(10):
        b.receive(Envelope("a", 1, 1, 0, 0, 0, 0, seq=seq), 0.0)
    b.validate()
    assert b.inbox.expected == CONFIG.window


def test_farewell_takes_the_peer_down_at_once() -> None:
    network = connected()
    a, b = network.sides
    assert b.session.receive(a.session.farewell(), 0.0) == [Down(1, "it closed the link", is_gone=True)]
    assert not b.session.is_worth_waiting_for


def test_new_incarnation_gives_its_own_credit() -> None:
    network = connected()
    a, b = network.sides
    b.restart(network.now_s)
    network.transmit(1)
    network.arrive(1, 0)
    assert (a.session.outbox.limit, a.session.peer_incarnation) == (0, 2)
