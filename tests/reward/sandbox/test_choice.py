"""Which walls are chosen, given what was found."""

import pytest

from darts_async.errors import ConfigError
from darts_async.reward.sandbox import choice
from darts_async.reward.sandbox.choice import Choice, choose_isolation
from darts_async.reward.sandbox.isolation import Isolation

STRONG = Isolation("processes", "python", landlock=7, namespaces=True)
MIDDLE = Isolation("processes", "python", landlock=7)
BARE = Isolation("processes", "python")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """What the trial of each candidate finds."""
    results: list[Choice] = []
    monkeypatch.setattr(choice, "_candidates", lambda *_: [each.isolation for each in results])
    monkeypatch.setattr(choice, "look_at", lambda walls: next(each for each in results if each.isolation == walls))
    monkeypatch.setattr(choice, "choose_isolation", choose_isolation.__wrapped__)
    return results


def chosen(*, allow_weaker: bool = False) -> Choice:
    return choice.choose_isolation("processes", "python", allow_weaker=allow_weaker)


def test_the_first_without_a_gap_is_taken(found: list[Choice]) -> None:
    found += [Choice(STRONG, complaint="not permitted"), Choice(MIDDLE), Choice(BARE)]
    assert chosen().isolation == MIDDLE


def test_walls_with_gaps_are_refused_with_all_reasons(found: list[Choice]) -> None:
    found += [Choice(STRONG, complaint="not permitted"), Choice(MIDDLE, ("reach the network",))]
    with pytest.raises(ConfigError, match=r"not permitted.*could reach the network.*`allow_weaker: true`"):
        chosen()


def test_those_with_the_fewest_gaps_are_taken_where_that_is_allowed(found: list[Choice]) -> None:
    found += [Choice(STRONG, complaint="not permitted"), Choice(BARE, ("a", "b")), Choice(MIDDLE, ("c",))]
    assert chosen(allow_weaker=True).describe() == "processes with limits, Landlock 7; a program can c"


def test_where_nothing_runs_nothing_is_allowed(found: list[Choice]) -> None:
    found += [Choice(STRONG, complaint="not permitted")]
    with pytest.raises(ConfigError, match="not permitted") as told:
        chosen(allow_weaker=True)
    assert "allow_weaker" not in str(told.value)
