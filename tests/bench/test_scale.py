"""The clusters that are simulated grow as they say, and the arithmetic beside them is that of the profile."""

import pytest

from bench.profiles import PROFILES
from bench.scale import (
    COMPARED,
    GROUPS_PER_ACCELERATOR,
    arms_table,
    burden_of,
    load_table,
    profile_of,
    scaling_table,
    simulated,
)
from bench.shaping import SYNTHETIC
from darts_async.shaper.group import Group


@pytest.mark.parametrize("number", [2, 8, 48, 1024])
def test_half_decode_and_half_train(number: int) -> None:
    profile = profile_of(number)
    assert profile.num_generators == profile.num_training == number // 2
    assert profile.num_accelerators == number
    if number in PROFILES:
        assert profile == PROFILES[number]


def test_training_a_token_takes_less_with_more_who_train() -> None:
    assert profile_of(64).token_s == pytest.approx(profile_of(8).token_s / 8)
    assert profile_of(64).decoded_per_s == pytest.approx(profile_of(8).decoded_per_s * 8)


def test_a_larger_cluster_trains_more_groups_at_about_the_same_efficiency() -> None:
    make, cap = SYNTHETIC["fixed"]
    points = [
        simulated(number, GROUPS_PER_ACCELERATOR * number, "asynchronous", make(0, 512), cap, 4) for number in (4, 8)
    ]
    small, large = (point.groups_per_s for point in points)
    assert large == pytest.approx(2 * small, rel=0.2)
    rows = scaling_table(points)
    assert rows[2].split("|")[5].strip() == "100%"


@pytest.mark.parametrize("arm", COMPARED)
def test_a_message_makes_nobody_look_through_all_groups(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: how often a group is asked whether it is decided, per message and in two clusters."""
    num_asked = 0
    is_undecided = Group.undecided.fget

    def undecided(group: Group) -> bool:
        nonlocal num_asked
        num_asked += 1
        return is_undecided(group)

    monkeypatch.setattr(Group, "undecided", property(undecided))
    make, cap = SYNTHETIC["math"]
    per_message = []
    for number in (4, 32):
        num_asked = 0
        point = simulated(number, GROUPS_PER_ACCELERATOR * number, arm, make(0, 512), cap, 4)
        per_message.append(num_asked / point.result.num_events)
    assert per_message[1] < 2 * per_message[0], per_message


def test_every_way_to_shape_has_a_row_with_both_clusters() -> None:
    make, cap = SYNTHETIC["fixed"]
    arms = {arm: [simulated(number, 8, arm, make(0, 512), cap, 2) for number in (2, 4)] for arm in COMPARED[:3]}
    head, _, *rows = arms_table(arms)
    assert "us / event, 4 accelerators" in head
    assert [row.split("|")[1].strip() for row in rows] == list(COMPARED[:3])


def test_the_load_of_a_shaper_grows_with_the_tokens() -> None:
    [_, _, row] = load_table([burden_of(8)])
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2] == "512", "four generators of 128 slots"
    assert cells[3] == "0.03"
