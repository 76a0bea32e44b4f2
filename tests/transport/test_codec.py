"""Messages to frames and back, and bytes that are no messages."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darts_async import protocol as p
from darts_async.errors import ProtocolError
from darts_async.transport.codec import MessageCodec
from darts_async.transport.link import decode_envelope

ALL = (
    p.ShaperToGenerator | p.GeneratorToShaper | p.ShaperToLearner | p.LearnerToShaper | p.ShaperToReward
    | p.RewardToShaper | p.GeneratorToLearner
)  # fmt: skip
LIMIT_BYTES = 1 << 16


def codec(receives: object = ALL, sends: object = ALL) -> MessageCodec:
    return MessageCodec(receives=receives, sends=sends, max_message_bytes=LIMIT_BYTES)


def tokens(num_samples: int = 3) -> p.TokensDecoded:
    return p.TokensDecoded(
        policy_version=2,
        sample_ids=np.arange(num_samples, dtype=np.int64),
        num_tokens=np.full(num_samples, 2, np.int32),
        token_ids=np.arange(2 * num_samples, dtype=np.int32),
        logprobs=-np.ones(2 * num_samples, np.float32),
    )


def test_arrays_arrive_equal_typed_and_read_only() -> None:
    sent = tokens()
    payload = codec().encode(sent)
    assert len(payload) == 5
    got = codec().decode(payload)
    assert isinstance(got, p.TokensDecoded)
    for name in ("sample_ids", "num_tokens", "token_ids", "logprobs"):
        array, original = getattr(got, name), getattr(sent, name)
        np.testing.assert_array_equal(array, original)
        assert array.dtype == original.dtype
        assert not array.flags.writeable


def test_later_changes_of_the_senders_array_do_not_show() -> None:
    ids = np.arange(3, dtype=np.int64)
    payload = codec().encode(p.GroupsCommitted(step=0, group_ids=ids))
    ids[:] = 9
    got = codec().decode(payload)
    assert isinstance(got, p.GroupsCommitted)
    assert got.group_ids.tolist() == [0, 1, 2]


def test_strided_and_empty_arrays_round_trip() -> None:
    for ids in (np.arange(6, dtype=np.int64)[::2], np.array([], np.int64)):
        got = codec().decode(codec().encode(p.GroupsCommitted(step=0, group_ids=ids)))
        assert isinstance(got, p.GroupsCommitted)
        assert got.group_ids.tolist() == ids.tolist()


@pytest.mark.parametrize("ids", [np.arange(3, dtype=np.int32), np.zeros((2, 2), np.int64), [1, 2]])
def test_array_of_the_wrong_kind_is_refused_by_the_sender(ids: object) -> None:
    with pytest.raises(ProtocolError, match=r"GroupsCommitted\.group_ids"):
        codec().encode(p.GroupsCommitted(step=0, group_ids=ids))  # type: ignore[arg-type]


def test_message_outside_the_union_is_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError, match=r"Cancel is not a message .*RewardReady \| SampleScored"):
        codec(sends=p.RewardToShaper).encode(p.Cancel(1))
    with pytest.raises(ProtocolError, match="Cancel"):
        codec(receives=p.RewardToShaper).decode(codec().encode(p.Cancel(1)))


def test_oversized_message_is_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError, match="max_message_bytes is 65536"):
        codec().encode(tokens(10_000))
    with pytest.raises(ProtocolError, match="max_message_bytes is 65536"):
        codec().decode([b"x", bytes(LIMIT_BYTES)])


def test_invariant_of_a_message_is_checked_on_arrival() -> None:
    header, *arrays = codec().encode(tokens())
    arrays[3] = arrays[3][:-4]
    with pytest.raises(ProtocolError, match="5 logprobs"):
        codec().decode([header, *arrays])


def test_frames_that_are_missing_surplus_or_ragged_are_refused() -> None:
    header, *arrays = codec().encode(tokens())
    for frames in ([header], [header, *arrays, b""], [header, arrays[0][:-1], *arrays[1:]], []):
        with pytest.raises(ProtocolError):
            codec().decode(frames)


def test_codec_works_again_after_a_malformed_message() -> None:
    both = codec()
    payload = both.encode(tokens())
    with pytest.raises(ProtocolError):
        both.decode(payload[:2])
    assert isinstance(both.decode(payload), p.TokensDecoded)


def accepts_or_refuses(frames: list[bytes]) -> None:
    """Nothing but a message or a `ProtocolError` comes out."""
    try:
        message = codec().decode(frames)
    except ProtocolError:
        return
    assert isinstance(message, p.Message)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_arbitrary_frames_raise_nothing_but_protocol_errors(frames: list[bytes]) -> None:
    accepts_or_refuses(frames)
    if frames:
        try:
            decode_envelope(frames[0])
        except ProtocolError:
            return


VALID = [
    tokens(),
    p.Generate(1, np.arange(4, dtype=np.int32), np.array([], np.int32), 7, p.SamplingParams(1.0, 1.0, 0, 9)),
    p.Score(1, "a", "b", '{"k": 1}', np.arange(3, dtype=np.int32), "stop"),
    p.StoreValue(1, "key", b"\x00\xff"),
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.integers(0, 200),
)
def test_mutated_and_truncated_messages_raise_nothing_but_protocol_errors(
    message: p.Message, flips: list[tuple[int, int, int]], keep: int
) -> None:
    frames = [bytearray(frame) for frame in codec().encode(message)]
    for frame, position, value in flips:
        target = frames[frame % len(frames)]
        if target:
            target[position % len(target)] = value
    frames[0] = frames[0][: max(keep, 1)]
    accepts_or_refuses([bytes(frame) for frame in frames])


def test_deeply_nested_bytes_are_refused() -> None:
    accepts_or_refuses([b"\x91" * 50_000])
