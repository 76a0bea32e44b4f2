import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.learner.packing.balance import balance, tree_batches
from darts_async.learner.packing.tree import Tree

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


def test_the_longest_sample_is_placed_first() -> None:
    assert balance([1000, 400, 400, 400, 400], 2) == ((0, 4), (1, 2, 3))


def test_more_ranks_than_items_leave_ranks_empty() -> None:
    assert balance([5], 3) == ((0,), (), ())


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "message"), [([1], 0, "num_ranks is 0"), ([3, -1], 2, "-1 at place 1")]
)
def test_bad_arguments_are_named(lengths: list[int], num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balance(lengths, num_ranks)


TREES = st.lists(
    st.builds(Tree, st.integers(1, 60), st.lists(st.integers(0, 200), min_size=1, max_size=8).map(tuple)), max_size=6
)


def tokens(trees: list[Tree], batch: tuple[tuple[int, int], ...]) -> int:
    """Each trunk once."""
    trunks = sum(trees[tree].trunk for tree in {tree for tree, _ in batch})
    return trunks + sum(trees[tree].branches[branch] for tree, branch in batch)


@given(TREES, st.integers(1, 300), RANKS)
def test_batches_keep_to_the_budget_and_come_in_rounds_of_all_ranks(
    trees: list[Tree], budget: int, num_ranks: int
) -> None:
    batches = tree_batches(trees, budget, num_ranks=num_ranks)
    branches = [(place, branch) for place, tree in enumerate(trees) for branch in range(len(tree.branches))]
    assert sorted(itertools.chain(*batches)) == branches
    assert len(batches) % num_ranks == 0
    assert all(list(batch) == sorted(batch) for batch in batches)
    assert all(len(batch) <= 1 or tokens(trees, batch) <= budget for batch in batches)
    loads = [tokens(trees, batch) for batch in batches]
    assert loads == sorted(loads, reverse=True), "ranks that wait for each other have batches that are alike"


@given(TREES)
def test_what_fits_into_one_batch_holds_each_trunk_once(trees: list[Tree]) -> None:
    total = sum(tree.num_tokens for tree in trees)
    assert len(tree_batches(trees, total + 1)) == bool(trees)


def test_a_tree_is_cut_only_where_that_pays() -> None:
    long_prompt, short_prompt = Tree(100, (10,) * 8), Tree(5, (100,) * 8)
    # Two ranks: 180 and nothing, or 140 each.
    assert [len(batch) for batch in tree_batches([long_prompt], 1000, num_ranks=2)] == [4, 4]
    # 180 each as they are, 280 each when each is cut.
    whole = tree_batches([long_prompt, long_prompt], 1000, num_ranks=2)
    assert [{tree for tree, _ in batch} for batch in whole] == [{0}, {1}]
    # 805 and 180, or 405 + 140 each.
    cut = tree_batches([long_prompt, short_prompt], 1000, num_ranks=2)
    assert [tokens([long_prompt, short_prompt], batch) for batch in cut] == [545, 545]


@pytest.mark.parametrize(
    ("budget", "num_ranks", "message"), [(0, 1, "tokens_per_batch is 0"), (1, 0, "num_ranks is 0")]
)
def test_bad_budgets_are_named(budget: int, num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_batches([Tree(1, (0,))], budget, num_ranks=num_ranks)
