import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from darts_async.learner.batch import micro_batches
from darts_async.protocol import TrainGroup
from tests.learner_world import make_group

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def test_packing_equals_the_layout_written_by_hand() -> None:
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
    (batch,) = micro_batches(group, np.array([0.5, -0.5], np.float32), 100)
    assert batch.input_ids.tolist() == [10, 11, 1, 2, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.lengths == (4, 2)
    assert batch.logit_places.tolist() == [1, 2, 3, 5]
    assert batch.targets.tolist() == [1, 2, 3, 4]
    assert batch.advantages.tolist() == [0.5, 0.5, 0.5, -0.5]
    assert batch.on_policy.tolist() == [False, False, True, True]
    assert batch.staleness.tolist() == [1, 1, 0, 0]
    assert batch.owners.tolist() == [0, 0, 0, 1]
    assert batch.shares.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(batch.behaviour_logprobs, torch.tensor([-0.1, -0.2, -0.3, -0.4]))


@given(LENGTHS, st.integers(1, 40), st.integers(1, 5), st.integers(1, 3))
def test_every_response_token_is_a_target_once_and_on_one_rank(
    lengths: list[int], budget: int, prompt: int, num_ranks: int
) -> None:
    group = make_group(lengths, prompt_length=prompt)
    ends = np.cumsum(lengths)
    found = {}
    for rank in range(num_ranks):
        sample_numbers = np.arange(len(lengths), dtype=np.float32)
        for batch in micro_batches(group, sample_numbers, budget, rank=rank, num_ranks=num_ranks):
            if batch.idle:
                continue
            for place in range(len(batch.lengths)):
                tokens = batch.owners == place
                (sample,) = batch.advantages[tokens].unique().long().tolist()
                assert sample not in found
                found[sample] = batch.targets[tokens].tolist()
                flat = slice(ends[sample] - lengths[sample], ends[sample])
                assert batch.behaviour_logprobs[tokens].tolist() == group.logprobs[flat].tolist()
    responses = np.split(group.token_ids, ends[:-1])
    assert found == {i: response.tolist() for i, response in enumerate(responses) if len(response)}


@given(LENGTHS, st.integers(1, 40), st.integers(1, 4))
def test_all_ranks_make_the_same_number_of_passes(lengths: list[int], budget: int, num_ranks: int) -> None:
    group = make_group(lengths)
    passes = [
        list(micro_batches(group, np.ones(len(lengths), np.float32), budget, rank=rank, num_ranks=num_ranks))
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in passes}) == 1
    for batch in (batch for batches in passes for batch in batches):
        assert not batch.idle or not batch.shares.any()


@given(LENGTHS, st.integers(1, 40), st.integers(1, 5))
def test_only_a_single_sample_exceeds_the_budget(lengths: list[int], budget: int, prompt: int) -> None:
    group = make_group(lengths, prompt_length=prompt)
    for batch in micro_batches(group, np.zeros(len(lengths), np.float32), budget):
        assert len(batch.input_ids) == len(batch.position_ids) == sum(batch.lengths)
        assert sum(batch.lengths) <= budget or len(batch.lengths) == 1


@given(LENGTHS, st.integers(1, 5))
def test_the_place_of_a_target_holds_the_token_before_it(lengths: list[int], prompt: int) -> None:
    group = make_group(lengths, prompt_length=prompt)
    for batch in micro_batches(group, np.zeros(len(lengths), np.float32), 1000):
        first = batch.position_ids[batch.logit_places] == prompt - 1
        before = batch.input_ids[batch.logit_places]
        assert (before[first] == int(group.prompt_tokens[-1])).all()
        later = (~first).nonzero()[:, 0]
        assert before[later].tolist() == batch.targets[later - 1].tolist()


def test_a_group_without_tokens_has_no_batches() -> None:
    assert list(micro_batches(make_group([0, 0]), np.zeros(2, np.float32), 10)) == []


def test_micro_batches_are_about_equally_large() -> None:
    batches = list(micro_batches(make_group([30, 1, 1, 1, 25, 2, 2], prompt_length=1), np.ones(7, np.float32), 32))
    assert sorted(sum(batch.lengths) for batch in batches) == [31, 31]
