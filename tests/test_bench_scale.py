"""The clusters that are simulated grow as they say, and the arithmetic beside them is that of the profile."""

import pytest

from bench.profiles import PROFILES
from bench.scale import GROUPS_PER_ACCELERATOR, burden_of, load_table, profile_of, scaling_table, simulated
from bench.shaping import SYNTHETIC


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


def test_the_load_of_a_shaper_grows_with_the_tokens() -> None:
    [_, _, row] = load_table([burden_of(8)])
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2] == "512", "four generators of 128 slots"
    assert cells[3] == "0.03"
