"""Groups that come: each is given out once, in the order of the steps."""

from darts_async.learner.intake import ConsumedGroups, Intake
from tests.learner.world import make_group


def ids_of(intake: Intake, step: int, max_groups: int = 1, max_tokens: int = 1000) -> list[int]:
    return [group.group_id for group in intake.together(step, max_groups, max_tokens)]


def test_groups_are_given_out_once_and_in_the_order_of_their_steps() -> None:
    intake = Intake()
    for group_id, step in ((8, 1), (9, 1), (4, 0), (8, 1), (2, 0)):
        intake.take(make_group([2], group_id=group_id, step=step))
    assert intake.num_waiting == 4
    assert [ids_of(intake, step) for step in (0, 0, 1, 1)] == [[4], [2], [8], [9]]
    intake.take(make_group([2], group_id=4, step=0))
    assert ids_of(intake, 0) == [], "it is being trained"
    intake.commit(0, [4, 2])
    intake.take(make_group([2], group_id=4, step=0))
    assert ids_of(intake, 0) == [], "it has been trained"


def test_groups_of_a_step_that_are_there_go_together_as_far_as_they_fit() -> None:
    intake = Intake()
    for group_id, step in ((1, 0), (2, 0), (3, 1), (4, 0), (5, 0), (6, 0)):
        intake.take(make_group([2, 3], group_id=group_id, step=step, prompt_length=4))  # 7 packed tokens
    intake.consumed = ConsumedGroups([(4, 5)])
    assert ids_of(intake, 0, max_groups=5, max_tokens=6) == [1], "one in any case"
    assert ids_of(intake, 0, max_groups=5, max_tokens=14) == [2, 5]
    assert ids_of(intake, 0, max_groups=0) == []
    assert ids_of(intake, 0, max_groups=5) == [6]
    assert intake.num_waiting == 1


def test_groups_that_came_before_the_checkpoint_was_read_are_not_trained_again() -> None:
    intake = Intake()
    for group_id in (1, 7):
        intake.take(make_group([2], group_id=group_id, step=3))
    intake.consumed = ConsumedGroups([(0, 5)])
    assert ids_of(intake, 3) == [7]
