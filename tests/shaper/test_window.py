"""The window: hard bound in any completion order, no deadlock, capacity conserved."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.errors import StalenessError
from darts_async.shaper.window import StalenessWindow


@settings(max_examples=200, deadline=None)
@given(
    groups_per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 4),
    seed=st.integers(0, 2**32),
    drop_share=st.floats(0, 0.3),
)
def test_any_completion_order_meets_every_deadline_and_the_run_ends(
    groups_per_step: int, max_staleness: int, seed: int, drop_share: float
) -> None:
    rng = random.Random(seed)
    window = StalenessWindow(groups_per_step=groups_per_step, max_staleness=max_staleness)
    total = 6 * groups_per_step
    version, next_id = 0, 0
    running: list[int] = []
    complete: list[int] = []
    floors: dict[int, int] = {}
    while window.num_shipped < total:
        while window.may_admit(version) and window.num_shipped + window.num_open < total:
            window.admit(next_id, version)
            floors[next_id] = version
            running.append(next_id)
            next_id += 1
        window.validate()
        assert window.num_open + window.num_shipped <= groups_per_step * (version + max_staleness + 1)
        moves = ["finish"] * bool(running) + ["ship"] * any(map(window.may_ship, complete))
        moves += ["publish"] * (version < window.next_step)
        assert moves, "deadlock"
        match rng.choice(moves):
            case "finish":  # any of them, not the oldest
                group = running.pop(rng.randrange(len(running)))
                if rng.random() < drop_share:
                    window.drop(group)
                else:
                    complete.append(group)
            case "ship":
                group = rng.choice([g for g in complete if window.may_ship(g)])
                complete.remove(group)
                step = window.ship(group)
                assert 0 <= step - floors[group] <= max_staleness
            case "publish":
                version += 1
    assert window.num_open == 0


def test_a_slow_group_is_waited_for_and_not_overtaken_past_its_deadline() -> None:
    window = StalenessWindow(groups_per_step=1, max_staleness=1)
    window.admit(0, 0)
    window.admit(1, 0)
    assert window.may_ship(1)
    assert window.ship(1) == 0
    assert window.may_admit(1)
    window.admit(2, 1)
    assert not window.may_ship(2), "group 0 must enter step 1"
    assert window.ship(0) == 1
    assert window.may_ship(2)


def test_the_count_rule_is_the_admission_rule_without_slow_groups() -> None:
    window = StalenessWindow(groups_per_step=4, max_staleness=2)
    admitted = 0
    while window.may_admit(0):
        window.admit(admitted, 0)
        admitted += 1
    assert admitted == 4 * (2 + 1)


def test_shipping_past_the_deadline_raises_and_changes_nothing() -> None:
    window = StalenessWindow(groups_per_step=1, max_staleness=0)
    window.admit(0, 0)
    window.ship(0)
    window._floors[1] = 0  # no sequence of calls leads here
    window._open_by_deadline[0] += 1
    with pytest.raises(StalenessError, match=r"group 1 has tokens of version 0; step 1 .* max_staleness is 0"):
        window.ship(1)
    assert (window.num_shipped, window.num_open) == (1, 1)


def test_newer_tokens_than_feared_give_time_back() -> None:
    window = StalenessWindow(groups_per_step=1, max_staleness=1)
    window.admit(0, 0)
    window.admit(1, 0)
    window.ship(1)
    window.admit(2, 1)
    assert not window.may_ship(2)
    window.set_floor(0, 1)
    assert window.may_ship(2)
