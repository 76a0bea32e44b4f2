"""A simulated process: its links with real sessions, its mailbox, and its faults.

The loop is that of `darts_async.actor`: what has arrived is handled, the process ticks, and then all of it is
acknowledged. Long work is a *script*: a Python generator that yields how long it takes, or what it waits for.
"""

from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, TypeVar, cast

from darts_async.errors import NonsenseError, ProtocolError
from darts_async.protocol import Message, PeerRefused, ProcessEnded
from darts_async.simulation.chaos.lies import lie_instead_of
from darts_async.simulation.chaos.world import Crash, Frame, World
from darts_async.topology.roles import LAUNCHER, role_of
from darts_async.transport import Event, PeerDown, PeerUp, Received
from darts_async.transport.codec import Payload
from darts_async.transport.inbox import NOTHING_HEARD
from darts_async.transport.session import Delivered, Down, Session, SessionEvent, Up

T = TypeVar("T")

Script = Generator[float | Callable[[], bool], None, None]

HANDLED_AFTER_S = 0.001
"""From the arrival of a frame until the process looks."""
TICK_S = 0.025


class SimLink:
    """One link of one process, with the interface of `Link` that an actor uses."""

    def __init__(self, process: "Process", name: str, peers: Iterable[str], *, is_hub: bool) -> None:
        self.name = name
        self.is_hub = is_hub
        self._process = process
        world, heard = process.world, process.heard if is_hub else {}
        self.sessions = {
            peer: Session(
                process.name,
                process.incarnation,
                peer,
                world.config.transport,
                world.now_s,
                heard.get(peer, NOTHING_HEARD),
            )
            for peer in peers
        }

    def send(self, peer: str, message: Message) -> None:
        self.sessions[peer].push(cast(Payload, (message,)))
        self.flush(self.sessions[peer])

    def forget(self, peer: str) -> None:
        self.sessions[peer].forget()

    def end(self, peer: str, incarnation: int, *, forget: bool) -> None:
        self._take(peer, self.sessions[peer].end(incarnation, forget=forget), ())

    def num_unacknowledged(self, peer: str) -> int:
        return len(self.sessions[peer].outbox)

    def receive(self, frame: Frame) -> None:
        """A frame of any incarnation of a peer."""
        session = self.sessions[frame.sender]
        try:
            events = session.receive(frame.envelope, self._process.world.now_s)
        except NonsenseError:
            raise
        except ProtocolError:  # of an incarnation that is gone
            return
        self._take(frame.sender, events, frame.payload)
        self.flush(session)

    def tick(self) -> None:
        """Look at the clock."""
        for peer, session in self.sessions.items():
            self._take(peer, session.tick(self._process.world.now_s), ())
            self.flush(session)

    def flush(self, session: Session) -> None:
        """Hand the network what there is to send."""
        world = self._process.world
        while (found := session.next_frame()) is not None:
            envelope, payload = found
            session.sent(envelope, world.now_s)
            world.transmit(Frame(self.name, session.name, session.peer, envelope, payload))

    def acknowledge(self, peer: str, incarnation: int, seq: int) -> None:
        self.sessions[peer].acknowledge(incarnation, seq)
        self.flush(self.sessions[peer])

    def _take(self, peer: str, events: Iterable[SessionEvent], payload: Payload) -> None:
        for event in events:
            match event:
                case Up(incarnation):
                    self._process.announce(PeerUp(self.name, peer, incarnation))
                case Down(incarnation, reason, is_gone):
                    self._process.announce(PeerDown(self.name, peer, incarnation, reason, is_gone))
                case Delivered(incarnation, seq):
                    message = cast(Message, payload[0])
                    self._process.announce(Received(self.name, peer, incarnation, message, seq))


class Process:
    """The part that all processes have. Subclasses handle events."""

    def __init__(self, world: World, name: str, incarnation: int, links: dict[str, tuple[str, list[str]]]) -> None:
        """`links`: {link: (hub, members)} of the run."""
        self.world = world
        self.name = name
        self.incarnation = incarnation
        self.heard: dict[str, tuple[int, int]] = {}
        self.is_dead = False
        self._plan = links
        self.links: dict[str, SimLink] = {}
        self._events: list[Event] = []
        self._refused: dict[tuple[str, str], int] = {}
        """As `Runtime.refused`."""
        self._is_woken = False
        self._frozen_until_s = 0.0
        self._scripts: list[tuple[Script, Callable[[], bool]]] = []

    def begin(self) -> None:
        """Open the links, and start to tick."""
        for link, (hub, members) in self._plan.items():
            if hub == self.name:
                self.links[link] = SimLink(self, link, members, is_hub=True)
            elif self.name in members:
                self.links[link] = SimLink(self, link, [hub], is_hub=False)
        self.world.living[self.name] = self
        self._tick()

    def handle(self, event: Event) -> None:
        """One event."""

    def settle(self) -> None:
        """All that had arrived has been handled."""

    def died(self) -> None:
        """Give back what the operating system would."""

    def validate(self) -> None:
        """What holds between two batches of events."""
        for link in self.links.values():
            for session in link.sessions.values():
                session.validate()

    def send(self, link: str, peer: str, message: Message) -> None:
        """Queue a message, and nonsense before it now and then."""
        lies, world = self.world.plan.hardship.lies, self.world
        if lies and link != LAUNCHER and world.chance(lies) and (lie := lie_instead_of(message, world.rng)) is not None:
            world.counts[f"nonsense told by a {role_of(self.name)}"] += 1
            world.liars.add((self.name, self.incarnation))
            self.links[link].send(peer, lie)
        self.links[link].send(peer, message)

    def refuse(self, event: Event, reason: str) -> None:
        """As `Runtime.refuse`."""
        is_honest = {(event.peer, event.incarnation), (self.name, self.incarnation)}.isdisjoint(self.world.liars)
        assert not is_honest, f"{event}, which is honest, is refused: {reason}"  # after a lie, an answer may be odd
        self.world.counts[f"nonsense refused by a {role_of(self.name)}"] += 1
        is_hub = self._plan[event.link][0] == self.name
        link = self.links[event.link]
        known = min(event.incarnation, link.sessions[event.peer].peer_incarnation)
        key = event.link, event.peer
        self._refused[key] = max(known, self._refused.get(key, -1))
        link.end(event.peer, known, forget=is_hub)
        self.links[LAUNCHER].send(LAUNCHER, PeerRefused(event.peer, event.incarnation, reason))

    def reach(self, point: str) -> None:
        """A named point: the process may die here. Raises `Crash`."""
        if self.world.chance(self.world.plan.crash):
            self.world.counts[f"killed at {point}"] += 1
            raise Crash

    def run(self, script: Script) -> None:
        """Work on something beside the events, from here on; it ends with the process."""
        for wanted in script:
            if callable(wanted):
                if wanted():
                    continue
                self._scripts.append((script, wanted))
                return
            self.world.after(wanted, lambda: self.guarded(lambda: self._continue(script)))
            return

    def arrive(self, frame: Frame) -> None:
        """A frame, which waits while the process is frozen."""
        if self.is_dead:
            return
        if self.world.now_s < self._frozen_until_s:
            self.world.at(self._frozen_until_s, lambda: self.arrive(frame))
            return
        self.links[frame.link].receive(frame)

    def announce(self, event: Event) -> None:
        """Something for the mailbox."""
        self._events.append(event)
        if not self._is_woken:
            self._is_woken = True
            self.world.after(HANDLED_AFTER_S, self._wake)

    def freeze(self, for_s: float) -> None:
        """It does nothing for a while, without noticing."""
        self.world.counts["processes frozen"] += 1
        self._frozen_until_s = max(self._frozen_until_s, self.world.now_s + for_s)

    def kill(self) -> None:
        """It ends, and loses all that is not on the disk."""
        self.is_dead = True
        del self.world.living[self.name]
        self.died()

    def _is_refused(self, event: Event) -> bool:
        return isinstance(event, Received) and event.incarnation <= self._refused.get((event.link, event.peer), -1)

    def guarded(self, work: Callable[[], None]) -> None:
        """Do something unless dead, later if frozen; a `Crash` in it kills the process."""
        if self.is_dead:
            return
        if self.world.now_s < self._frozen_until_s:
            self.world.at(self._frozen_until_s, lambda: self.guarded(work))
            return
        try:
            work()
        except Crash:
            self.kill()

    def _tick(self) -> None:
        def work() -> None:
            for link in self.links.values():
                link.tick()
            self._handle_all()
            self.world.after(TICK_S, self._tick)

        self.guarded(work)

    def _wake(self) -> None:
        def work() -> None:
            self._is_woken = False
            self._handle_all()

        self.guarded(work)

    def _handle_all(self) -> None:
        events, self._events = self._events, []
        receipts: dict[tuple[str, str], tuple[int, int]] = {}
        for event in events:
            if isinstance(event, Received):
                receipts[event.link, event.peer] = event.incarnation, event.seq
            match event:
                case Received(message=ProcessEnded() as ended):
                    self._ended(ended)
                case _ if self._is_refused(event):
                    continue
                case _ if event.link != LAUNCHER or self.name == LAUNCHER:
                    self.handle(event)
        self.settle()
        self._poll()
        self.validate()
        for (link, peer), (incarnation, seq) in receipts.items():
            self.links[link].acknowledge(peer, incarnation, seq)

    def _ended(self, ended: ProcessEnded) -> None:
        for link in self.links.values():
            if ended.name in link.sessions:
                link.end(ended.name, ended.incarnation, forget=link.is_hub)

    def _poll(self) -> None:
        """Resume the scripts whose time has come."""
        waiting, self._scripts = self._scripts, []
        for script, holds in waiting:
            if holds():
                self.run(script)
            else:
                self._scripts.append((script, holds))

    def _continue(self, script: Script) -> None:
        self.run(script)
        self._poll()


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        return cast(T, stopped.value)
    raise AssertionError(f"{coroutine} waits for something")
