"""What a process does with a peer that sends what cannot be meant."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from darts_async.actor import MAX_REASON_CHARACTERS, Runtime, _dispatch
from darts_async.config import RunConfig
from darts_async.errors import OutboxFullError, ProtocolError
from darts_async.prompts.load import PromptSets
from darts_async.protocol import (
    Cancel,
    GeneratorReady,
    Message,
    PeerRefused,
    RewardReady,
    SampleFinished,
    WeightsApplied,
)
from darts_async.shaper.durable.journal import read_journal
from darts_async.shaper.durable.replayable_state import CameUp, Heard
from darts_async.shaper.process import ShaperActor
from darts_async.telemetry import BusyClock
from darts_async.topology.run_files import JOURNAL_FILE
from darts_async.trace import Trace
from darts_async.transport import Event, PeerUp, Received, Unreadable
from launcher.plan.plan import link_addresses, plan_run
from tests.shaper.world import prompts, world_config

CONFIG = RunConfig.model_validate({"roles": {"generator": {"replicas": 2}, "learner": {"replicas": 2}}})
PLAN = plan_run(CONFIG, Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7007)))
HEARD = SampleFinished(3, "stop", 1)


class FakeLink:
    """Takes what is sent, or is full."""

    def __init__(self, *peers: str, is_full: bool = False) -> None:
        self.peers = dict.fromkeys(peers, 2)
        self.is_full = is_full
        self.sent: list[tuple[str, Message]] = []
        self.ended: list[tuple[str, int, bool]] = []

    def send(self, peer: str, message: Message) -> None:
        if self.is_full:
            raise OutboxFullError(f"the outbox for {peer} is full")
        self.sent.append((peer, message))

    def incarnation(self, peer: str) -> int:
        return self.peers.get(peer, -1)

    def num_unacknowledged(self, peer: str) -> int:
        return 1

    def end(self, peer: str, incarnation: int, *, forget: bool) -> None:
        self.ended.append((peer, incarnation, forget))


class Listener:
    """An actor that refuses every message but one."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.heard: list[Event] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Received) and event.message != HEARD:
            self.runtime.refuse(event, "it cannot be meant")
        else:
            self.heard.append(event)


def runtime_of(name: str, **links: FakeLink) -> Runtime:
    nothing: Any = SimpleNamespace()
    runtime = Runtime(name, 1, Path("/runs/a"), CONFIG, PLAN, nothing, nothing, nothing)
    runtime.links.update({"launcher": FakeLink("launcher"), **links})  # type: ignore[arg-type]
    return runtime


def said(message: Message, peer: str = "generator/1", incarnation: int = 2, link: str = "generators") -> Received:
    return Received(link, peer, incarnation, message)


def told(runtime: Runtime) -> list[Message]:
    link: Any = runtime.links["launcher"]
    return [message for _, message in link.sent]


def test_a_hub_hears_nothing_more_of_a_member_that_it_refuses() -> None:
    link = FakeLink("generator/0", "generator/1")
    runtime = runtime_of("shaper/0", generators=link)
    actor: Any = Listener(runtime)
    others = said(HEARD, "generator/0"), said(HEARD, incarnation=3), PeerUp("generators", "generator/1", 3)
    with capture_logs() as logs:
        for event in (said(HEARD), said(WeightsApplied(9, 0.0)), said(HEARD), said(Cancel(3)), *others):
            _dispatch(runtime, actor, event)
    assert actor.heard == [said(HEARD), *others]
    assert link.ended == [("generator/1", 2, True)]
    assert told(runtime) == [PeerRefused("generator/1", 2, "it cannot be meant")]
    assert [line["event"] for line in logs] == ["peer_refused"]


def test_a_peer_that_cannot_be_read_is_refused() -> None:
    link = FakeLink("generator/1")
    runtime = runtime_of("shaper/0", generators=link)
    _dispatch(runtime, Listener(runtime), Unreadable("generators", "generator/1", 2, "x" * 9999))  # type: ignore[arg-type]
    assert told(runtime) == [PeerRefused("generator/1", 2, "x" * MAX_REASON_CHARACTERS)]
    assert link.ended == [("generator/1", 2, True)]


def test_an_incarnation_that_was_never_heard_bars_no_later_one() -> None:
    link = FakeLink("generator/1")
    runtime = runtime_of("shaper/0", generators=link)
    runtime.refuse(Unreadable("generators", "generator/1", 1 << 40, "no"), "no")
    assert link.ended == [("generator/1", 2, True)], "the newest that there is"


def test_a_member_that_reads_nothing_is_refused_and_its_hub_goes_on() -> None:
    runtime = runtime_of("shaper/0", generators=FakeLink("generator/1", is_full=True))
    runtime.send("generators", "generator/1", Cancel(1))
    assert told(runtime) == [PeerRefused("generator/1", 2, "the outbox for generator/1 is full")]
    with pytest.raises(OutboxFullError):  # it is away, and what it would be sent is not its fault
        runtime.send("generators", "generator/0", Cancel(1))


def test_shaper_and_learner_refuse_each_other() -> None:
    link = FakeLink("shaper/0")
    runtime = runtime_of("learner/0", learner=link)
    runtime.refuse(said(Cancel(1), "shaper/0", link="learner"), "no")
    assert link.ended == [("shaper/0", 2, False)], "what it has been told is for the next one"
    assert told(runtime) == [PeerRefused("shaper/0", 2, "no")]


def test_a_member_whose_hub_talks_nonsense_says_so_and_waits_for_the_next_one() -> None:
    link = FakeLink("shaper/0")
    runtime = runtime_of("generator/0", generators=link)
    actor: Any = Listener(runtime)
    for event in (said(Cancel(-1), "shaper/0"), said(HEARD, "shaper/0"), said(HEARD, "shaper/0", incarnation=3)):
        _dispatch(runtime, actor, event)
    assert link.ended == [("shaper/0", 2, False)], "what it has been told is for the next one"
    assert actor.heard == [said(HEARD, "shaper/0", incarnation=3)]
    assert told(runtime) == [PeerRefused("shaper/0", 2, "it cannot be meant")]


def test_a_rank_whose_first_rank_talks_nonsense_says_so_and_ends_for_all_come_back_together() -> None:
    runtime = runtime_of("learner/1", ranks=FakeLink("learner/0"))
    with pytest.raises(ProtocolError, match="learner/0 sends what cannot be meant: no step"):
        runtime.refuse(said(Cancel(-1), "learner/0", link="ranks"), "no step")
    assert told(runtime) == [PeerRefused("learner/0", 2, "no step")]


def test_a_launcher_that_cannot_be_read_is_logged_and_lived_with() -> None:
    runtime = runtime_of("shaper/0")
    with capture_logs() as logs:
        _dispatch(runtime, Listener(runtime), Unreadable("launcher", "launcher", 1, "no"))  # type: ignore[arg-type]
    assert [line["event"] for line in logs] == ["launcher_unreadable"]
    assert told(runtime) == []


async def test_what_the_shaper_refuses_is_not_in_its_journal(tmp_path: Path) -> None:
    """So replaying it needs no refusals."""
    links = {name: FakeLink() for name in ("generators", "rewards", "learner", "launcher")}
    refused: list[tuple[Message, str]] = []
    runtime: Any = SimpleNamespace(
        config=world_config(),
        run_dir=tmp_path,
        plan=SimpleNamespace(life=1, from_checkpoint=False),
        clock=BusyClock(),
        trace=Trace(),
        faults=SimpleNamespace(reach=lambda point: None),
        links=links,
        send=lambda link, peer, message: links[link].send(peer, message),
        refuse=lambda event, reason: refused.append((event.message, reason)),
    )
    actor = ShaperActor(runtime, PromptSets(prompts(20), prompts(2), 0, 0), clock=lambda: 1.0)
    actor.handle(PeerUp("generators", "generator/0", 1))
    taken = [GeneratorReady(1, 8, 1024), WeightsApplied(0, 0.0)]
    wrong = [GeneratorReady(1, 8, 1024), WeightsApplied(7, 0.0)]
    for number, message in enumerate([taken[0], wrong[0], taken[1], wrong[1]]):
        actor.handle(Received("generators", "generator/0", 1, message, number))
    actor.handle(Received("rewards", "reward/0", 1, RewardReady(1), 0))
    actor.tick(1.0)
    await actor.close()
    assert [message for message, _ in refused] == [*wrong, RewardReady(1)]
    assert "answers greeting 1 twice" in refused[0][1]
    inputs = read_journal(tmp_path / JOURNAL_FILE).inputs
    assert [given.message for given in inputs if isinstance(given, Heard)] == taken
    assert sum(isinstance(given, CameUp) for given in inputs) == 1
