"""What is known of a peer that has certainly ended: nothing more is heard of it, and nothing is kept for it."""

from types import SimpleNamespace
from typing import Any

import pytest

from darts_async.actor import Runtime
from darts_async.config import TransportConfig
from darts_async.errors import ProtocolError
from darts_async.protocol import ProcessEnded
from darts_async.topology.plan import LinkPlan, RunPlan
from darts_async.transport.session import Down, Envelope, Session, Up

CONFIG = TransportConfig(window=4, max_outbox=50, heartbeat_s=1.0, dead_after_s=10.0, resend_after_s=2.0)


def envelope(incarnation: int, **values: Any) -> Envelope:
    defaults: dict[str, Any] = {"received": 0, "handled": 0, "limit": 4, "first_unacknowledged": 0}
    return Envelope(sender="b", incarnation=incarnation, peer_incarnation=1, **defaults | values)


def session_that_is_up() -> Session:
    session = Session("a", 1, "b", CONFIG, 0.0)
    assert session.receive(envelope(1), 0.0) == [Up(1)]
    return session


def test_the_end_of_a_peer_takes_it_down_at_once_and_its_late_frames_do_not_bring_it_back() -> None:
    session = session_that_is_up()
    assert session.end(1, forget=True) == [Down(1, "it has ended", is_gone=True)]
    with pytest.raises(ProtocolError, match="incarnation 1 of b, which has ended"):
        session.receive(envelope(1, seq=0), 0.1)
    assert session.end(1, forget=True) == []
    assert session.receive(envelope(2), 0.2) == [Up(2)]
    session.validate()


def test_that_a_silent_peer_has_ended_is_news() -> None:
    session = session_that_is_up()
    [down] = [event for second in range(11) for event in session.tick(float(second))]
    assert isinstance(down, Down)
    assert (down.incarnation, down.is_gone) == (1, False)
    assert session.end(1, forget=True) == [Down(1, "it has ended", is_gone=True)]
    assert session.end(1, forget=True) == []


def test_that_a_peer_has_ended_is_news_to_who_knows_it_from_an_incarnation_before() -> None:
    session = Session("a", 2, "b", CONFIG, 0.0, heard=(1, 7))
    assert session.end(1, forget=True) == [Down(1, "it has ended", is_gone=True)]
    assert session.end(2, forget=True) == [], "nobody waits for the second: it was never heard"


def test_the_end_of_a_peer_that_was_never_heard_is_none() -> None:
    assert Session("a", 1, "b", CONFIG, 0.0).end(1, forget=True) == []


@pytest.mark.parametrize("forget", [True, False])
def test_what_was_on_its_way_is_dropped_or_kept_for_the_next(forget: bool) -> None:
    session = session_that_is_up()
    session.push((b"x",))
    session.end(1, forget=forget)
    assert len(session.outbox) == (0 if forget else 1)
    session.receive(envelope(2), 0.2)
    frame = session.next_frame()
    assert frame is not None
    assert (frame[0].seq is None) == forget
    session.validate()


def test_a_late_word_of_the_end_harms_nobody_who_has_come_since() -> None:
    session = session_that_is_up()
    session.receive(envelope(2), 0.1)
    session.push((b"x",))
    assert session.end(1, forget=True) == []
    assert (session.is_up, len(session.outbox)) == (True, 1)


class SpyLink:
    def __init__(self) -> None:
        self.ended: list[tuple[str, int, bool]] = []

    def end(self, peer: str, incarnation: int, *, forget: bool) -> None:
        self.ended.append((peer, incarnation, forget))


def test_a_hub_forgets_what_it_had_for_a_member_and_a_member_keeps_what_it_has_for_the_hub() -> None:
    plan = RunPlan(
        processes=(),
        links=(
            LinkPlan("generators", "shaper/0", "tcp://127.0.0.1:1", ("generator/0", "generator/1")),
            LinkPlan("rewards", "shaper/0", "tcp://127.0.0.1:2", ("reward/0",)),
            LinkPlan("weights", "learner/0", "tcp://127.0.0.1:3", ("generator/0", "generator/1")),
        ),
    )

    def told(name: str, links: list[str], ended: str) -> dict[str, list[tuple[str, int, bool]]]:
        runtime = SimpleNamespace(name=name, plan=plan, links={link: SpyLink() for link in links})
        Runtime.process_ended(runtime, ProcessEnded(ended, 3))  # type: ignore[arg-type]
        return {link: spy.ended for link, spy in runtime.links.items()}

    assert told("shaper/0", ["generators", "rewards"], "generator/1") == {
        "generators": [("generator/1", 3, True)],
        "rewards": [],
    }
    assert told("generator/0", ["generators", "weights"], "shaper/0") == {
        "generators": [("shaper/0", 3, False)],
        "weights": [],
    }
    assert told("generator/0", ["generators", "weights"], "generator/1") == {"generators": [], "weights": []}
