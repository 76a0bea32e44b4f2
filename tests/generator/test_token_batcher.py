"""Coalescing of tokens on their way to the shaper."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from darts_async.generator.engine import SampleEnd, StepEvents
from darts_async.generator.token_batcher import Outgoing
from darts_async.protocol import SampleCancelled, SampleFinished, SampleRejected, TokensDecoded


def step(tokens: dict[int, int], *ended: SampleEnd, rejected: tuple[tuple[int, str], ...] = ()) -> StepEvents:
    values = np.array(list(tokens.values()), np.int32)
    return StepEvents(np.array(list(tokens), np.int64), values, -values.astype(np.float32), ended, rejected)


@given(st.lists(st.dictionaries(st.integers(0, 9), st.integers(0, 99), max_size=6), max_size=12))
def test_every_token_leaves_once_in_the_order_it_was_decoded(steps: list[dict[int, int]]) -> None:
    outgoing = Outgoing(flush_every_steps=4)
    received: dict[int, list[int]] = {}
    for tokens in steps:
        outgoing.add(step(tokens))
    for message in outgoing.flush(3):
        assert isinstance(message, TokensDecoded)
        assert message.policy_version == 3
        assert (message.logprobs == -message.token_ids).all()
        ends = np.cumsum(message.num_tokens)
        for sample_id, begin, end in zip(message.sample_ids, ends - message.num_tokens, ends, strict=True):
            received.setdefault(int(sample_id), []).extend(message.token_ids[begin:end].tolist())
    expected: dict[int, list[int]] = {}
    for tokens in steps:
        for sample_id, token in tokens.items():
            expected.setdefault(sample_id, []).append(token)
    assert received == expected
    assert outgoing.flush(4) == []


def test_several_tokens_of_a_sample_in_one_step_keep_their_order() -> None:
    outgoing = Outgoing(flush_every_steps=4)
    ids, tokens = np.array([7, 3, 7, 3, 7], np.int64), np.array([1, 10, 2, 11, 3], np.int32)
    outgoing.add(StepEvents(ids, tokens, -tokens.astype(np.float32)))
    outgoing.add(step({7: 4}))
    (message,) = outgoing.flush(0)
    assert isinstance(message, TokensDecoded)
    assert message.sample_ids.tolist() == [3, 7]
    assert message.num_tokens.tolist() == [2, 4]
    assert message.token_ids.tolist() == [10, 11, 1, 2, 3, 4]
    assert message.logprobs.tolist() == [-10, -11, -1, -2, -3, -4]


def test_an_end_is_sent_at_once_and_behind_the_tokens() -> None:
    outgoing = Outgoing(flush_every_steps=100)
    outgoing.add(step({1: 5, 2: 6}))
    assert not outgoing.is_due
    outgoing.add(step({1: 7}, SampleEnd(1, 2, "stop"), SampleEnd(2, 1, None), rejected=((9, "too long"),)))
    assert outgoing.is_due
    kinds = outgoing.flush(0)
    assert isinstance(kinds[0], TokensDecoded)
    assert kinds[1:] == [SampleRejected(9, "too long"), SampleFinished(1, "stop", 2), SampleCancelled(2, 1)]


def test_steps_are_coalesced_up_to_the_limit() -> None:
    outgoing = Outgoing(flush_every_steps=3)
    due = []
    for _ in range(3):
        outgoing.add(step({1: 1}))
        due.append(outgoing.is_due)
    assert due == [False, False, True]
