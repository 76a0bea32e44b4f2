"""What the learner decides, without model and weights: whatever comes in whatever order."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig
from darts_async.learner.boundary import Boundary
from darts_async.learner.moves import (
    FOR_GENERATORS,
    Action,
    Leave,
    Move,
    Publish,
    Refuse,
    Save,
    TakeStep,
    Tell,
    Train,
    Wait,
    WriteModel,
)
from darts_async.learner.state import LearnerState
from darts_async.protocol import (
    CatchUp,
    Greet,
    GroupsCommitted,
    LearnerReady,
    MemberJoined,
    Message,
    ShaperSnapshot,
    Shutdown,
    VersionPublished,
    VersionSaved,
)
from darts_async.transport import PeerDown, PeerUp, Received
from darts_async.weights.sending.events import MemberLost, MemberMessage
from tests.learner.world import make_group

STEPS, GROUPS_PER_STEP = 4, 2
GENERATORS = ("generator/0", "generator/1")
CONFIG = RunConfig.model_validate(
    {
        "roles": {"generator": {"replicas": len(GENERATORS)}},
        "learner": {"steps": STEPS, "groups_per_step": GROUPS_PER_STEP, "checkpoint_every": 2},
    }
)


class Learner:
    """The decisions; an owner of a trainer that makes every move; what the others hear."""

    def __init__(self, version: int = 0, *, is_first: bool = True, has_shaper: bool = True) -> None:
        self.state = LearnerState(CONFIG, Boundary(CONFIG), is_first=is_first)
        self.told: list[Message] = []
        self.trained: list[int] = []
        """Groups, in the order of the steps that they are in."""
        self.publishing: int | None = None
        self.published: list[int] = []
        self.saving: Save | None = None
        self.saved: list[int] = []
        self.is_model_written = False
        self.is_lent = False
        if has_shaper:
            self.hear(Greet(1))
        consumed = ((0, version * GROUPS_PER_STEP),) if version else ()
        self.do(self.state.loaded(policy_version=version, consumed=consumed))

    def hear(self, message: Message, link: str = "learner", peer: str = "shaper/0") -> None:
        self.do(self.state.handle(Received(link, peer, 1, message), newest_epoch=0))

    def joins(self, name: str, version: int = -1) -> None:
        self.hear(MemberJoined(version), link="weights", peer=name)

    def start(self, floor: int = 0) -> None:
        for name in GENERATORS:
            self.joins(name)
        self.hear(CatchUp(floor, STEPS))

    def send_groups(self, step: int) -> None:
        for group_id in range(step * GROUPS_PER_STEP, (step + 1) * GROUPS_PER_STEP):
            self.hear(make_group([2, 3], group_id=group_id, step=step))

    def do(self, actions: list[Action]) -> None:
        self.told += [action.message for action in actions if isinstance(action, Tell)]
        assert not any(isinstance(action, Refuse) for action in actions)
        self.state.validate()
        if (save := self.state.farewell()) is not None:
            self._save(save)

    def move(self) -> Move:
        """Make the next move; publishing and saving continue beside it."""
        move = self.state.next_move()
        match move:
            case Wait():
                assert self.state.next_move() == move, "a wait changes nothing"
            case TakeStep(groups):
                assert self.publishing is None, "generators read the parameters"
                assert {group.step for group in groups} == {self.state.policy_version}
                self.trained += [group.group_id for group in groups]
                self.do(self.state.step_taken())
            case Publish(version):
                assert self.publishing is None
                assert version >= self.state.floor
                self.publishing = version
            case Save():
                self._save(move)
            case WriteModel():
                assert self.saving is None
                self.is_model_written = True
                self.do(self.state.model_written())
        self.state.validate()
        return move

    def moves(self) -> Move:
        """Make moves until there is nothing to do."""
        while not isinstance(move := self.move(), Wait | Leave):
            pass
        return move

    def _save(self, save: Save) -> None:
        assert self.saving is None
        self.saving = save

    def end_publishing(self) -> None:
        if self.publishing is not None:
            version, self.publishing = self.publishing, None
            self.published.append(version)
            self.do(self.state.published(version))

    def end_saving(self) -> None:
        if self.saving is not None:
            save, self.saving = self.saving, None
            self.saved.append(save.version)
            self.do(self.state.saved(save.version, oldest_kept=0))

    def take(self, what: str, *values: Any) -> None:
        """Anything that can happen."""
        match what:
            case "joins":
                self.joins(values[0], min(values[1], self.state.policy_version))
            case "group":
                self.hear(make_group([2], group_id=values[0], step=values[0] // GROUPS_PER_STEP))
            case "told":
                self.hear(CatchUp(self.state.policy_version, STEPS))
            case "lend" if self.is_lent:
                self.is_lent = False
                self.state.give_back()
            case "lend":
                self.is_lent = self.state.lend()
            case "stopped" if self.state.leaving is None:
                self.state.leave(Shutdown("stopped", finished=False, num_steps=self.state.policy_version))
                self.do([])
            case _:
                self._take_more(what, *values)

    def _take_more(self, what: str, *values: Any) -> None:
        match what:
            case "lost":
                self.do(self.state.handle(PeerDown("weights", values[0], 1, "gone"), newest_epoch=0))
            case "move":
                for _ in range(values[0]):
                    self.move()
            case "greeted":
                self.hear(Greet(1))
            case "late":
                self.state.timed_out(FOR_GENERATORS)
            case "published":
                self.end_publishing()
            case "saved":
                self.end_saving()


def test_a_run_trains_every_group_publishes_every_version_and_leaves_its_model_behind() -> None:
    learner = Learner()
    learner.start()
    for step in range(STEPS):
        learner.send_groups(step)
    while not isinstance(learner.moves(), Leave):
        learner.end_publishing()
        learner.end_saving()
    assert learner.trained == list(range(STEPS * GROUPS_PER_STEP))
    assert learner.published == list(range(STEPS + 1))
    assert [message.policy_version for message in learner.told if isinstance(message, VersionSaved)] == [2, STEPS]
    learner.state.leave(Shutdown("all steps taken", finished=True))
    assert learner.state.is_done


def test_the_first_version_waits_for_all_generators_and_not_forever() -> None:
    learner = Learner()
    learner.joins(GENERATORS[0])
    learner.hear(CatchUp(0, 0))
    assert learner.move() == FOR_GENERATORS
    learner.state.timed_out(FOR_GENERATORS)
    assert learner.move() == Publish(0)


def test_the_next_step_waits_until_the_version_before_is_published_and_its_groups_do_not() -> None:
    learner = Learner()
    learner.start()
    learner.send_groups(0)
    assert [type(learner.move()) for _ in range(3)] == [Publish, Train, Wait]
    learner.end_publishing()
    assert isinstance(learner.move(), TakeStep)


def test_nothing_older_than_what_a_generator_may_use_is_published() -> None:
    learner = Learner(version=2, is_first=False)
    learner.start(floor=3)
    learner.send_groups(2)
    assert learner.state.is_catching_up
    learner.moves()
    assert learner.publishing == 3


def test_members_that_join_before_the_shaper_has_spoken_are_heard_of_when_it_has() -> None:
    learner = Learner(is_first=False)
    for name in GENERATORS:
        learner.joins(name)
    learner.do(learner.state.handle(PeerDown("weights", GENERATORS[0], 1, "it has ended"), newest_epoch=0))
    assert learner.state.joined == set()
    learner.hear(CatchUp(0, 0))
    assert learner.state.joined == {GENERATORS[1]}


def test_what_is_said_of_a_generator_goes_to_the_coordinator_and_it_is_greeted() -> None:
    learner = Learner()
    learner.start()
    state, name = learner.state, GENERATORS[0]
    joined = MemberJoined(-1)
    assert state.handle(Received("weights", name, 3, joined), newest_epoch=0) == [MemberMessage(name, 3, joined)]
    assert state.handle(PeerDown("weights", name, 3, "gone"), newest_epoch=0) == [MemberLost(name)]
    assert state.handle(PeerUp("weights", name, 4), newest_epoch=0) == [Tell("weights", name, Greet(1))]
    assert isinstance(state.handle(Received("weights", name, 4, MemberJoined(9)), newest_epoch=0)[0], Refuse)


def test_parameters_are_lent_to_late_joiners_between_publishing_and_the_next_step_alone() -> None:
    learner = Learner()
    assert not learner.state.lend(), "nothing is published yet"
    learner.start()
    learner.send_groups(0)
    learner.moves()
    assert not learner.state.lend(), "it is being published"
    learner.end_publishing()
    assert learner.state.lend()
    assert learner.moves() == Wait("publishing")
    learner.state.give_back()
    assert isinstance(learner.move(), TakeStep)
    assert not learner.state.lend(), "the parameters are of no published version"


def test_a_shaper_that_greets_hears_where_training_is() -> None:
    learner = Learner(version=2, is_first=False, has_shaper=False)
    assert learner.told == []
    learner.hear(Greet(1))
    assert learner.told == [LearnerReady(2, b"", 2 * GROUPS_PER_STEP), VersionSaved(2, 0)]
    learner.start(floor=2)
    learner.moves()
    learner.end_publishing()
    learner.told.clear()
    learner.hear(Greet(2))
    assert [type(message) for message in learner.told] == [LearnerReady, VersionPublished, VersionSaved]


@pytest.mark.parametrize("is_theirs", [True, False])
def test_a_learner_that_is_stopped_leaves_a_checkpoint_of_a_step_that_the_shaper_knows(is_theirs: bool) -> None:
    learner = Learner()
    learner.start()
    learner.send_groups(0)
    learner.moves()
    learner.end_publishing()
    learner.moves()
    learner.hear(ShaperSnapshot(1, b"known"))
    learner.state.leave(Shutdown("stopped", finished=False, num_steps=1 if is_theirs else 0))
    learner.do([])
    assert learner.saving == (Save(1, has_shaper=True) if is_theirs else None)
    assert learner.state.is_done != is_theirs
    learner.end_saving()
    assert learner.state.is_done
    assert learner.saved == [1] * is_theirs, "once"


def test_no_step_is_taken_by_a_learner_that_leaves() -> None:
    learner = Learner()
    learner.start()
    learner.send_groups(0)
    learner.moves()
    learner.state.leave(Shutdown("stopped", finished=False, num_steps=0))
    learner.end_publishing()
    assert isinstance(learner.moves(), Leave)
    assert learner.state.is_done


def test_a_complete_run_is_left_when_its_model_is_written_even_if_the_shaper_says_nothing() -> None:
    learner = Learner(version=STEPS, is_first=False)
    assert learner.move() == Wait("the shaper")
    learner.state.leave(Shutdown("all steps taken", finished=True))
    assert not learner.state.is_done
    assert [type(learner.move()) for _ in range(2)] == [WriteModel, Leave]
    assert learner.state.is_done


names, numbers = st.sampled_from(GENERATORS), st.integers(0, STEPS * GROUPS_PER_STEP - 1)
inputs: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("joins"), names, st.integers(-1, 1)),
    st.tuples(st.just("lost"), names),
    st.tuples(st.just("group"), numbers),
    st.tuples(st.just("move"), st.integers(1, 4)),
    st.tuples(st.sampled_from(("told", "greeted", "late", "published", "saved", "lend", "stopped"))),
)


@pytest.mark.slow
@settings(max_examples=400)
@given(st.lists(inputs, max_size=50), st.sampled_from((0, 2)))
def test_steps_are_taken_once_in_order_and_the_run_ends(said: list[tuple[Any, ...]], version: int) -> None:
    learner = Learner(version, is_first=version == 0)
    state = learner.state
    for each in said:
        learner.take(*each)
    if learner.is_lent:
        state.give_back()
    learner.start(floor=max(state.policy_version, 0))
    for step in range(state.policy_version, STEPS):
        learner.send_groups(step)
    while not isinstance(learner.moves(), Leave):
        learner.end_publishing()
        learner.end_saving()
    learner.end_saving()
    first, last = version * GROUPS_PER_STEP, state.policy_version * GROUPS_PER_STEP
    assert sorted(learner.trained) == list(range(first, last))
    steps = [group_id // GROUPS_PER_STEP for group_id in learner.trained]
    assert steps == sorted(steps)
    committed = [message.step for message in learner.told if isinstance(message, GroupsCommitted)]
    assert committed == list(range(version, state.policy_version))
    assert learner.published == sorted(set(learner.published))
    assert learner.saved == sorted(set(learner.saved))
    assert learner.is_model_written == (state.policy_version == STEPS)
    if state.leaving is not None:
        assert state.is_done
        assert max([version, *learner.saved]) == state.policy_version, "nothing that was committed is lost"
