import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.learner.balance import balance, token_batches

LENGTHS = st.lists(st.integers(0, 500), max_size=20)
RANKS = st.integers(1, 6)


def loads(lengths: list[int], shares: tuple[tuple[int, ...], ...]) -> list[int]:
    return [sum(lengths[item] for item in share) for share in shares]


@given(LENGTHS, RANKS)
def test_every_item_is_on_one_rank(lengths: list[int], num_ranks: int) -> None:
    shares = balance(lengths, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(itertools.chain(*shares)) == list(range(len(lengths)))
    assert all(list(share) == sorted(share) for share in shares)


@given(LENGTHS, RANKS)
def test_loads_differ_by_at_most_one_item(lengths: list[int], num_ranks: int) -> None:
    found = loads(lengths, balance(lengths, num_ranks))
    assert max(found) - min(found) <= max(lengths, default=0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_largest_load_is_within_the_bound_of_the_best(lengths: list[int], num_ranks: int) -> None:
    splits = itertools.product(range(num_ranks), repeat=len(lengths))
    best = min(
        max(sum(n for n, r in zip(lengths, split, strict=True) if r == rank) for rank in range(num_ranks))
        for split in splits
    )
    assert max(loads(lengths, balance(lengths, num_ranks))) <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def test_a_long_sample_counts_its_attention() -> None:
    lengths = [1000, 400, 400, 400, 400]
    assert balance(lengths, 2) == ((0, 4), (1, 2, 3))
    # 1000 + 1000 of attention against 400 + 160 each: the long one alone is still no lighter than three others.
    assert balance(lengths, 2, attention_tokens=1000) == ((0,), (1, 2, 3, 4))


def test_more_ranks_than_items_leave_ranks_empty() -> None:
    assert balance([5], 3) == ((0,), (), ())


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "message"), [([1], 0, "num_ranks is 0"), ([3, -1], 2, "-1 at place 1")]
)
def test_bad_arguments_are_named(lengths: list[int], num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balance(lengths, num_ranks)


@given(LENGTHS, st.integers(1, 300), RANKS)
def test_batches_keep_to_the_budget_and_come_in_rounds_of_all_ranks(
    lengths: list[int], budget: int, num_ranks: int
) -> None:
    batches = token_batches(lengths, budget, num_ranks=num_ranks)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert len(batches) % num_ranks == 0
    assert all(len(batch) <= 1 or sum(lengths[item] for item in batch) <= budget for batch in batches)


@pytest.mark.parametrize(
    ("budget", "num_ranks", "message"), [(0, 1, "tokens_per_batch is 0"), (1, 0, "num_ranks is 0")]
)
def test_bad_budgets_are_named(budget: int, num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_batches([1], budget, num_ranks=num_ranks)
