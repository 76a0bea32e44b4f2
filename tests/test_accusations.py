"""Who is restarted when members of a link say that its hub is wrong."""

from hypothesis import given
from hypothesis import strategies as st

from darts_async.accusations import Accusations

MEMBERS = [f"generator/{number}" for number in range(5)]
LINKS = {"generators": ("shaper/0", MEMBERS), "rewards": ("shaper/0", ["reward/0"]), "weights": ("learner/0", MEMBERS)}


def test_each_voice_restarts_the_voice_and_more_than_half_the_hub() -> None:
    votes = Accusations(LINKS)
    heard = [votes.hear(member, "shaper/0", 1) for member in MEMBERS[:4]]
    assert heard == [("generator/0",), ("generator/1",), ("shaper/0",), ("shaper/0",)]
    assert votes.hear("generator/0", "shaper/0", 2) == ("generator/0",), "another incarnation begins with no voice"


def test_a_voice_counts_for_the_hub_that_it_names() -> None:
    votes = Accusations(LINKS)
    assert votes.hear("generator/0", "shaper/0", 1) == ("generator/0",)
    assert votes.hear("generator/1", "learner/0", 1) == ("generator/1",)


def test_the_only_member_of_a_link_is_restarted_with_its_hub() -> None:
    assert Accusations(LINKS).hear("reward/0", "shaper/0", 1) == ("shaper/0", "reward/0")


@given(st.lists(st.tuples(st.sampled_from(MEMBERS[:2]), st.integers(1, 3)), max_size=30))
def test_less_than_half_never_restart_the_hub_however_often_they_say_it(said: list[tuple[str, int]]) -> None:
    votes = Accusations(LINKS)
    for member, incarnation in said:
        assert votes.hear(member, "shaper/0", incarnation) == (member,), "it takes nothing from that hub any more"
