import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from darts_async.learner.intake import num_packed_tokens
from darts_async.learner.packing.batch import PackedBatch, micro_batches
from darts_async.learner.packing.tree import Tree
from darts_async.learner.ranks.rank_info import RankInfo
from darts_async.protocol import TrainGroup
from tests.learner.world import make_group, weighted

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_packing_equals_the_layout_written_by_hand(share_prompts: bool) -> None:
    group = TrainGroup(
        group_id=0,
        step=7,
        prompt_tokens=np.array([10, 11], np.int32),
        num_tokens=np.array([3, 1], np.int32),
        token_ids=np.array([1, 2, 3, 4], np.int32),
        logprobs=np.array([-0.1, -0.2, -0.3, -0.4], np.float32),
        versions=np.array([6, 6, 7, 7], np.int32),
        rewards=np.array([1, 0], np.float32),
        weights=np.ones(2, np.float32),
    )
    parts = [weighted(group, np.array([0.5, -0.5], np.float32))]
    (batch,) = micro_batches(parts, 100, share_prompts=share_prompts)
    if share_prompts:
        assert batch.input_ids.tolist() == [10, 11, 1, 2]
        assert batch.position_ids.tolist() == [0, 1, 2, 3]
        assert batch.trees == (Tree(2, (2, 0)),)
        assert batch.logit_places.tolist() == [1, 2, 3, 1]
    else:
        assert batch.input_ids.tolist() == [10, 11, 1, 2, 10, 11]
        assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
        assert batch.trees == (Tree(4), Tree(2))
        assert batch.logit_places.tolist() == [1, 2, 3, 5]
    assert batch.num_samples == 2
    assert batch.targets.tolist() == [1, 2, 3, 4]
    assert batch.advantages.tolist() == [0.5, 0.5, 0.5, -0.5]
    assert batch.on_policy.tolist() == [False, False, True, True]
    assert batch.staleness.tolist() == [1, 1, 0, 0]
    assert batch.owners.tolist() == [0, 0, 0, 1]
    assert batch.shares.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(batch.behaviour_logprobs, torch.tensor([-0.1, -0.2, -0.3, -0.4]))


def samples_of(batch: PackedBatch) -> list[list[int]]:
    """The tokens that the prediction of each sample's last target sees, found by the layout alone."""
    found = []
    places = torch.arange(len(batch.input_ids)).split([tree.num_tokens for tree in batch.trees])
    for tree, rows in zip(batch.trees, places, strict=True):
        trunk, *branches = rows.split([tree.trunk, *tree.branches])
        found += [torch.cat([trunk, branch]) for branch in branches] or [trunk]
    for place, rows in enumerate(found):
        own = batch.logit_places[batch.owners == place]
        assert rows[-len(own) :].equal(own)
        assert batch.position_ids[rows].tolist() == [*range(len(rows))]
    assert len(found) == batch.num_samples
    return [batch.input_ids[rows].tolist() for rows in found]


@given(
    st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.booleans()
)
def test_every_response_token_is_a_target_once_and_on_one_rank(
    lengths: list[list[int]], budget: int, prompt: int, num_ranks: int, share_prompts: bool
) -> None:
    groups = [
        make_group(each, group_id=place, prompt_length=prompt + place, step=3, version=place)
        for place, each in enumerate(lengths)
    ]
    samples = [
        (group, slice(end - count, end))
        for group in groups
        for end, count in zip(np.cumsum(group.num_tokens), group.num_tokens, strict=True)
    ]
    numbers = np.split(np.arange(len(samples), dtype=np.float32), np.cumsum([len(each) for each in lengths])[:-1])
    parts = [weighted(group, number) for group, number in zip(groups, numbers, strict=True)]
    found = set()
    for rank in range(num_ranks):
        for batch in micro_batches(parts, budget, share_prompts=share_prompts, rank_info=RankInfo(rank, num_ranks)):
            if batch.idle:
                continue
            for place, inputs in enumerate(samples_of(batch)):
                tokens = batch.owners == place
                (number,) = batch.advantages[tokens].unique().long().tolist()
                assert number not in found
                found.add(number)
                group, flat = samples[number]
                assert batch.targets[tokens].tolist() == group.token_ids[flat].tolist()
                assert batch.behaviour_logprobs[tokens].tolist() == group.logprobs[flat].tolist()
                assert inputs == [*group.prompt_tokens, *group.token_ids[flat][:-1]]
                assert (batch.staleness[tokens] == 3 - group.group_id).all()
    assert found == {number for number, (_, flat) in enumerate(samples) if flat.start < flat.stop}


@given(st.lists(LENGTHS, max_size=3), st.integers(1, 5))
def test_the_tokens_of_a_batch_are_known_before_it_is_packed(lengths: list[list[int]], prompt: int) -> None:
    groups = [make_group(each, prompt_length=prompt) for each in lengths]
    parts = [weighted(group, np.ones(len(group.num_tokens), np.float32)) for group in groups]
    packed = sum(len(batch.input_ids) for batch in micro_batches(parts, 10_000))
    assert packed == sum(num_packed_tokens(group) for group in groups)


@given(LENGTHS, st.integers(1, 40), st.integers(1, 4))
def test_all_ranks_make_the_same_number_of_passes(lengths: list[int], budget: int, num_ranks: int) -> None:
    group = make_group(lengths)
    passes = [
        list(
            micro_batches(
                [weighted(group, np.ones(len(lengths), np.float32))], budget, rank_info=RankInfo(rank, num_ranks)
            )
        )
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in passes}) == 1
    for batch in (batch for batches in passes for batch in batches):
        assert not batch.idle or not batch.shares.any()


@given(LENGTHS, st.integers(1, 40), st.integers(1, 5))
def test_only_a_single_sample_exceeds_the_budget(lengths: list[int], budget: int, prompt: int) -> None:
    group = make_group(lengths, prompt_length=prompt)
    for batch in micro_batches([weighted(group, np.zeros(len(lengths), np.float32))], budget):
        num_tokens = sum(tree.num_tokens for tree in batch.trees)
        assert len(batch.input_ids) == len(batch.position_ids) == num_tokens
        assert num_tokens <= budget or batch.num_samples == 1


def test_a_group_without_tokens_has_no_batches() -> None:
    assert list(micro_batches([weighted(make_group([0, 0]), np.zeros(2, np.float32))], 10)) == []


def test_micro_batches_are_about_equally_large() -> None:
    batches = list(
        micro_batches([weighted(make_group([30, 1, 1, 1, 25, 2, 2], prompt_length=1), np.ones(7, np.float32))], 32)
    )
    assert sorted(len(batch.input_ids) for batch in batches) == [27, 30]
