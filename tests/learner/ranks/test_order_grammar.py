"""What rank 0 may order of another rank, and when."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.learner.ranks.order_grammar import OrderGrammar
from darts_async.protocol import (
    AddGroups,
    Dismiss,
    FinishStep,
    GatherWeights,
    LeaderToRank,
    Prepare,
    SaveCheckpoint,
    StoreValue,
    TrainGroup,
)
from tests.learner.test_boundary import group
from tests.support.nonsense import messages

PREPARE, VALUE, GATHER = Prepare(1, ""), StoreValue(1, "a", b""), GatherWeights(1, of_checkpoint=False)


def reasons(*orders: LeaderToRank) -> list[str]:
    grammar = OrderGrammar(8)
    return [reason for order in orders if (reason := grammar.refusal(order)) is not None]


def test_a_learners_life_is_in_order() -> None:
    step = [AddGroups(2), group(), VALUE, group(), GATHER, FinishStep(0)]
    assert reasons(PREPARE, VALUE, *step, SaveCheckpoint(1), *step, Dismiss()) == []
    assert reasons(Dismiss()) == []


@pytest.mark.parametrize(
    ("orders", "reason"),
    [
        ([FinishStep(0)], "before Prepare"),
        ([VALUE], "before Prepare"),
        ([PREPARE, PREPARE], "twice"),
        ([Prepare(1, "../../etc")], "'../../etc' is not the name of a checkpoint"),
        ([PREPARE, group()], "a group without AddGroups"),
        ([PREPARE, AddGroups(1), group(), group()], "a group without AddGroups"),
        ([PREPARE, AddGroups(2), group(), FinishStep(0)], "while 1 groups are due"),
        ([PREPARE, AddGroups(0)], "0 groups"),
        ([PREPARE, AddGroups(1 << 40)], f"{1 << 40} groups"),
    ],
)
def test_what_is_out_of_order_is_refused(orders: list[LeaderToRank], reason: str) -> None:
    assert reasons(*orders) == [reason]


@pytest.mark.slow
@given(orders=st.lists(messages(LeaderToRank), max_size=12))
def test_what_is_let_through_can_be_carried_out(orders: list[Any]) -> None:
    """Until the first refusal, which ends the rank."""
    grammar, num_due, is_prepared = OrderGrammar(8), 0, False
    for order in [PREPARE, *orders]:
        if grammar.refusal(order) is not None:
            break
        match order:
            case Prepare():
                assert not is_prepared
                is_prepared = True
            case AddGroups(num_groups=num_groups):
                assert num_due == 0
                num_due = num_groups
            case TrainGroup():
                num_due -= 1
                assert num_due >= 0
            case FinishStep() | SaveCheckpoint():
                assert num_due == 0
