"""Any interleaving of joins, losses, restarts, answers of every kind and age, and deadlines."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.protocol import (
    EpochFormed,
    LearnerToGenerator,
    MemberJoined,
    TensorSpec,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightManifest,
)
from darts_async.weights.sending.coordinator import Coordinator
from darts_async.weights.sending.events import (
    Broadcast,
    BroadcastDone,
    BroadcastFailed,
    CoordinatorAction,
    CoordinatorEvent,
    DropGroup,
    FormGroup,
    MemberDropped,
    MemberLost,
    MemberMessage,
    Published,
    PublishFailed,
    SendToMember,
    Superseded,
)

MANIFEST = WeightManifest((TensorSpec("w", "float32", (4,)),), 4096)
NAMES = ("a", "b", "c")
RANKS = {"a": 1, "b": 2, "c": 4}
RIGHT, WRONG = (1, 2), (1, 3)

# Progress is likelier than trouble, or hardly any round would live to see its commit.
KINDS = [
    *["progress"] * 12,
    *["cooperate", "sent", "offer"] * 4,
    *["join", "restart", "lose", "corrupt", "fail", "stale", "ready", "stage", "apply"],
    *["broken", "expire", "pass", "withdraw"],
]
Steps = list[tuple[str, str]]
steps = st.tuples(st.sampled_from(KINDS), st.sampled_from(NAMES))


class World:
    """The coordinator, members that answer what they are told to, and what must never happen."""

    def __init__(self) -> None:
        self.coordinator = Coordinator(backend="gloo", interface="127.0.0.1", deadline_s=10.0)
        self.now = 0.0
        self.version = 0
        self.incarnations = dict.fromkeys(NAMES, 0)
        self.told: dict[str, list[LearnerToGenerator]] = {name: [] for name in NAMES}
        self.offered: set[int] = set()
        self.ended: list[int] = []
        self.learner_epoch: int | None = None
        self.broadcasting: int | None = None
        self.epochs: list[int] = []
        self.open_offers: dict[str, tuple[int, int]] = {}  # member -> (epoch, version) it waits for the end of
        self.corrupt: set[str] = set()
        self.dropped: set[str] = set()  # by the last input
        self.aborted_epochs: set[int] = set()
        self.committed: dict[str, tuple[int, int]] = {}
        self.staged: dict[tuple[str, int], tuple[int, ...]] = {}

    def run(self, steps: Steps) -> None:
        for kind, name in steps:
            self.step(kind, name)

    def step(self, kind: str, name: str) -> None:
        self.now += 0.01
        match kind:
            case "join":
                self.say(name, MemberJoined(-1, RANKS[name]))
            case "restart":
                self.incarnations[name] += 1
                self.open_offers.pop(name, None)
                self.say(name, MemberJoined(-1, RANKS[name]))
            case "lose":
                self.open_offers.pop(name, None)
                self.feed(MemberLost(name))
            case "progress":
                for each in NAMES:
                    self.cooperate(each)
                self.broadcast(is_whole=True)
            case "cooperate":
                self.cooperate(name)
            case "corrupt":
                self.corrupt.add(name)
            case "offer":
                self.version += 1
                self.offered.add(self.version)
                self.take(self.coordinator.offer(self.version, MANIFEST, self.now))
            case "sent" | "broken":
                self.broadcast(is_whole=kind == "sent")
            case "expire":
                self.expire()
            case "pass":
                self.now += 1
                self.take(self.coordinator.tick(self.now))
            case "withdraw":
                self.committed.clear()  # what was committed stays in use, but the group is left
                self.take(self.coordinator.withdraw("the test says so", self.now))
            case _:
                self.answer(kind, name)

    def answer(self, kind: str, name: str) -> None:
        epoch, version = self.open_offers.get(name, (0, 0))
        match kind:
            case "ready":
                self.say(name, UpdateReady(epoch, version))
            case "stage":
                self.stage(name, epoch, version)
            case "apply":
                self.say(name, UpdateApplied(*self.committed.get(name, (0, 0)), 0.1))
            case "fail":
                self.say(name, UpdateFailed(epoch, version, "it broke"))
                self.say(name, MemberJoined(-1, RANKS[name]))
            case "stale":
                self.say(name, UpdateApplied(epoch - 1, version, 0.1))
                self.say(name, UpdateFailed(epoch - 1, version, "it broke long ago"))

    def cooperate(self, name: str) -> None:
        """Answer what was heard last as a sound member does."""
        match self.told[name][-1] if self.told[name] else None:
            case UpdateOffered(epoch, version):
                self.say(name, UpdateReady(epoch, version))
                if self.broadcasting == epoch:
                    self.stage(name, epoch, version)
            case UpdateCommitted(epoch, version):
                self.say(name, UpdateApplied(epoch, version, 0.1))
            case UpdateAborted() | None:
                self.say(name, MemberJoined(-1, RANKS[name]))

    def stage(self, name: str, epoch: int, version: int) -> None:
        sums = self.staged.setdefault((name, epoch), WRONG if name in self.corrupt else RIGHT)
        self.corrupt.discard(name)
        self.say(name, UpdateStaged(epoch, version, np.array(sums, np.int64)))

    def broadcast(self, *, is_whole: bool) -> None:
        epoch = self.broadcasting if is_whole else self.learner_epoch
        if epoch is not None:
            self.feed(BroadcastDone(epoch, RIGHT) if is_whole else BroadcastFailed(epoch, "reset by peer"))

    def expire(self) -> None:
        if self.coordinator.deadline is not None:
            assert self.coordinator.deadline <= self.now + 10.0, "never a wait beyond the deadline of a phase"
            self.now = max(self.now, self.coordinator.deadline)
            self.take(self.coordinator.tick(self.now))

    def say(self, name: str, message: object) -> None:
        self.feed(MemberMessage(name, self.incarnations[name], message))  # type: ignore[arg-type]

    def feed(self, event: CoordinatorEvent) -> None:
        self.take(self.coordinator.handle(event, self.now))

    def take(self, actions: list[CoordinatorAction]) -> None:
        self.dropped.clear()
        for action in actions:
            match action:
                case SendToMember(name, message):
                    self.hear(name, message)
                case FormGroup(epoch, world_size, members):
                    assert world_size == 1 + sum(RANKS[name] for name in members)
                    assert self.learner_epoch is None, "the learner leaves a group before it joins another"
                    self.epochs.append(epoch)
                    self.learner_epoch, self.broadcasting = epoch, None
                case Broadcast(epoch):
                    assert epoch == self.learner_epoch
                    self.broadcasting = epoch
                    self.staged = {key: sums for key, sums in self.staged.items() if key[1] != epoch}
                case DropGroup(epoch):
                    assert epoch == self.learner_epoch
                    self.learner_epoch = self.broadcasting = None
                case Published(version) | PublishFailed(version) | Superseded(version):
                    self.ended.append(version)
                case MemberDropped(name):
                    self.dropped.add(name)
        self.coordinator.validate()
        assert self.epochs == sorted(set(self.epochs)), "epochs ascend"
        assert len(self.ended) == len(set(self.ended)), "an offer ends once"
        if not self.coordinator.is_busy:
            assert set(self.ended) == self.offered, "no offer is forgotten"

    def hear(self, name: str, message: LearnerToGenerator) -> None:
        self.told[name].append(message)
        match message:
            case EpochFormed():
                assert name not in self.open_offers, "a round that ended was told to everyone in it"
            case UpdateOffered(epoch, version):
                assert name not in self.open_offers
                assert epoch not in self.aborted_epochs, "an epoch that was given up is never used again"
                self.open_offers[name] = (epoch, version)
            case UpdateCommitted(epoch, version):
                assert self.open_offers[name] == (epoch, version)
                assert self.staged[name, epoch] == RIGHT, "a wrong checksum is never committed"
                self.committed[name] = self.open_offers.pop(name)
            case UpdateAborted(epoch, version):
                is_committed = self.committed.get(name) == (epoch, version)
                assert not is_committed or name in self.dropped, "there is no way back from a commit"
                self.aborted_epochs.add(epoch)
                if self.open_offers.get(name) == (epoch, version):
                    del self.open_offers[name]


@settings(max_examples=400)
@given(st.lists(steps, max_size=80))
def test_whatever_happens_every_offer_ends_once_and_nothing_wrong_is_committed(steps: Steps) -> None:
    world = World()
    world.run(steps)
    for _ in range(100):
        if not world.coordinator.is_busy:
            break
        world.expire()
    assert not world.coordinator.is_busy, "silence ends every update"
    assert set(world.ended) == world.offered


@settings(max_examples=200)
@given(st.lists(steps, max_size=80), st.permutations(NAMES))
def test_after_any_trouble_sound_members_get_the_next_version(steps: Steps, names: tuple[str, ...]) -> None:
    world = World()
    world.run(steps)
    world.corrupt.clear()
    for name in names:
        world.step("restart", name)
    while world.coordinator.is_busy:
        world.expire()
    for name in names:
        world.step("join", name)
    world.step("offer", "")
    for _ in range(4):
        for name in names:
            world.step("cooperate", name)
        world.step("sent", "")
    assert world.ended[-1] == world.version
    assert world.coordinator.lagging(world.version) == []
