"""The order of prompts: each epoch visits all, a mixture keeps to its weights, and a cursor says everything."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from darts_async.prompts.source import MixedPrompts, Prompt, ShuffledPrompts


def prompts(**sizes: int) -> tuple[Prompt, ...]:
    """So many of each part."""
    parts = [name for name, size in sizes.items() for _ in range(size)]
    return tuple(Prompt(number, "", np.ones(1, np.int32), "", part=name) for number, name in enumerate(parts))


WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=5).map(
    lambda found: {f"p{place}": weight for place, weight in enumerate(found)}
)


def mixed(weights: dict[str, float], seed: int, size: int = 3) -> MixedPrompts:
    return MixedPrompts(prompts(**dict.fromkeys(weights, size)), weights, seed=seed)


@given(WEIGHTS, st.integers(0, 99), st.integers(0, 400))
def test_a_mixture_continues_exactly_where_its_cursor_was(weights: dict[str, float], seed: int, cursor: int) -> None:
    through, resumed = mixed(weights, seed), mixed(weights, seed)
    for _ in range(cursor):
        through.draw()
    resumed.seek(cursor)
    assert resumed.cursor == through.cursor == cursor
    assert [resumed.draw().prompt_id for _ in range(20)] == [through.draw().prompt_id for _ in range(20)]


@given(WEIGHTS, st.integers(0, 99), st.integers(0, 10_000))
def test_every_stretch_of_draws_has_the_shares_of_the_weights(weights: dict[str, float], seed: int, start: int) -> None:
    source = mixed(weights, seed)
    source.seek(start)
    drawn = Counter(source.draw().part for _ in range(200))
    for name, weight in weights.items():
        assert abs(drawn[name] - 200 * weight / sum(weights.values())) < 6


def test_each_part_is_visited_completely_before_a_prompt_comes_again() -> None:
    source = MixedPrompts(prompts(small=2, large=50), {"small": 1.0, "large": 1.0}, seed=0)
    drawn = [source.draw() for _ in range(98)]
    large = [each.prompt_id for each in drawn if each.part == "large"]
    assert len(large) == len(set(large)) > 45


def test_seeds_give_different_orders() -> None:
    orders = {
        tuple(source.draw().prompt_id for _ in range(12)) for source in (mixed({"a": 1, "b": 1}, s) for s in range(5))
    }
    assert len(orders) == 5


def test_an_epoch_visits_each_prompt_once() -> None:
    source = ShuffledPrompts(prompts(a=7), seed=3)
    for _ in range(3):
        assert sorted(source.draw().prompt_id for _ in range(7)) == list(range(7))
