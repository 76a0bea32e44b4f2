"""Framed records: a torn tail is no record, and no damage is taken for one."""

from hypothesis import given
from hypothesis import strategies as st

from darts_async.wire.framing import HEAD_BYTES, frame, read_frames

PAYLOADS = st.lists(st.binary(max_size=20), max_size=5)


def boundaries(payloads: list[bytes]) -> list[int]:
    ends = [0]
    for payload in payloads:
        ends.append(ends[-1] + HEAD_BYTES + len(payload))
    return ends


@given(payloads=PAYLOADS)
def test_whatever_the_length_of_what_is_left_the_whole_records_before_it_are_read(payloads: list[bytes]) -> None:
    data, ends = b"".join(map(frame, payloads)), boundaries(payloads)
    for size in range(len(data) + 1):
        found = read_frames(data[:size])
        num_whole = sum(end <= size for end in ends[1:])
        assert list(map(bytes, found.payloads)) == payloads[:num_whole]
        assert (found.num_bytes, found.is_damaged) == (ends[num_whole], False)


@given(payloads=PAYLOADS.filter(bool))
def test_no_flipped_bit_is_read_and_none_passes_for_a_torn_tail(payloads: list[bytes]) -> None:
    data, ends = b"".join(map(frame, payloads)), boundaries(payloads)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        num_before = sum(end <= bit // 8 for end in ends[1:])
        found = read_frames(bytes(damaged))
        assert list(map(bytes, found.payloads)) == payloads[:num_before]
        assert (found.num_bytes, found.is_damaged) == (ends[num_before], True)


def test_blocks_that_the_disk_never_wrote_are_no_records() -> None:
    data = frame(b"abc")
    found = read_frames(data + bytes(4096))
    assert (list(map(bytes, found.payloads)), found.num_bytes, found.is_damaged) == ([b"abc"], len(data), True)
