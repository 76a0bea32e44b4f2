"""Spares know the window and the open groups, and nothing else of the training."""

from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.spares import Spares
from darts_async.shaper.window import StalenessWindow
from tests.shaper.world import prompts, world_config


class Opened:
    """Two groups to a step, one step of staleness, and as many spares as groups."""

    def __init__(self) -> None:
        sections = {"learner": {"steps": 4, "groups_per_step": 2}, "shaping": {"overcommit": 2.0}}
        self.groups: dict[int, Group] = {}
        self.window = StalenessWindow(groups_per_step=2, max_staleness=1)
        self.spares = Spares(world_config(**sections), self.window, self.groups)

    def group(self, group_id: int, *, floor: int = 0, asked_again: bool = False) -> Group:
        sample = Sample(group_id, Stage.DECODING, oldest_version=floor)
        group = Group(group_id, prompts(1)[0], "train", [sample], floor, asked_again=asked_again)
        self.groups[group_id] = group
        return group

    def in_window(self, *group_ids: int, asked_again: bool = False) -> None:
        for group_id in group_ids:
            group = self.group(group_id, asked_again=asked_again)
            self.window.admit(group_id, group.floor)
            self.spares.add_rival(group)

    def spare(self, group_id: int, *, is_complete: bool = True) -> Group:
        group = self.group(group_id)
        self.spares.add(group)
        if is_complete:
            (sample,) = group.samples
            sample.stage, group.weights = Stage.SCORED, {sample.sample_id: 1.0}
        return group


def test_a_complete_spare_enters_at_a_free_place() -> None:
    opened = Opened()
    opened.in_window(0, 1)
    spare = opened.spare(2)
    assert opened.spares.use(num_steps=0) == [spare]
    assert 2 not in opened.spares
    assert opened.window.num_open == 3
    opened.spares.validate()


def test_a_complete_spare_takes_the_place_of_the_last_group_that_is_waited_for() -> None:
    opened = Opened()
    opened.in_window(0, 1, 2, 3)
    assert not opened.window.may_admit(0)
    spare = opened.spare(4)
    assert opened.spares.use(num_steps=0) == [spare]
    assert (3 in opened.spares, opened.window.num_open) == (True, 4)
    assert [group.group_id for group in opened.spares.waited_for()] == [0, 1, 2]
    opened.spares.validate()


def test_no_spare_takes_the_place_of_a_prompt_that_is_asked_again() -> None:
    opened = Opened()
    opened.in_window(0, 1, 2, 3, asked_again=True)
    opened.spare(4)
    assert opened.spares.use(num_steps=0) == []
    assert 4 in opened.spares


def test_a_spare_that_is_not_complete_waits() -> None:
    opened = Opened()
    opened.spare(0, is_complete=False)
    assert opened.spares.use(num_steps=0) == []


def test_spares_that_no_step_may_take_any_more_are_cut() -> None:
    opened = Opened()
    spare = opened.spare(9, is_complete=False)
    assert opened.spares.cut() == []
    for group_id in range(4):
        opened.window.admit(group_id, 0)
        opened.window.ship(group_id)
    assert opened.window.next_step == 2, "and tokens of version 0 may be trained on in steps 0 and 1"
    assert not opened.spares.has_room(0)
    assert opened.spares.cut() == [spare]
    assert 9 not in opened.spares
