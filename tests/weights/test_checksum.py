"""The checksum sees single bits, order and length, and nothing but the bytes."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from darts_async.weights.checksum import WORDS_PER_CHUNK, checksum

contents = st.binary(max_size=200)


def tensor_of(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_flipped_bit_is_seen(content: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert checksum(tensor_of(content)) != checksum(tensor_of(bytes(flipped)))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=50), st.data())
def test_any_two_swapped_words_are_seen(words: list[int], data: st.DataObject) -> None:
    i, j = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    assume(words[i] != words[j])
    swapped = list(words)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    one, other = (torch.tensor(values, dtype=torch.int32) for values in (words, swapped))
    assert checksum(one) != checksum(other)


@given(st.sampled_from(["bfloat16", "float32", "float64"]), st.integers(0, 2**31))
def test_a_permutation_of_elements_is_seen(dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(64, generator=generator).to(getattr(torch, dtype))
    permuted = tensor[torch.randperm(64, generator=generator)]
    assume(not torch.equal(tensor, permuted))
    assert checksum(tensor) != checksum(permuted)


@given(contents, contents)
def test_equal_checksums_mean_equal_bytes(one: bytes, other: bytes) -> None:
    assert (checksum(tensor_of(one)) == checksum(tensor_of(other))) == (one == other)


@given(st.integers(1, 200))
def test_the_number_of_zeros_is_seen(length: int) -> None:
    assert checksum(torch.zeros(length, dtype=torch.uint8)) != checksum(torch.zeros(length - 1, dtype=torch.uint8))


@given(contents, st.integers(0, 7))
def test_alignment_in_memory_does_not_matter(content: bytes, offset: int) -> None:
    shifted = torch.cat((torch.zeros(offset, dtype=torch.uint8), tensor_of(content)))[offset:]
    assert checksum(shifted) == checksum(tensor_of(content))


def test_strides_dtype_and_shape_do_not_matter_but_order_does() -> None:
    tensor = torch.randn(6, 8)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())
    assert checksum(tensor) == checksum(tensor.view(torch.int32)) == checksum(tensor.reshape(48))
    assert checksum(tensor) != checksum(tensor.t())


def test_swapping_whole_chunks_is_seen() -> None:
    one, other = torch.randn(WORDS_PER_CHUNK), torch.randn(WORDS_PER_CHUNK)
    assert checksum(torch.cat((one, other))) != checksum(torch.cat((other, one)))


def test_the_last_bit_of_many_chunks_is_seen_and_the_result_is_a_signed_64_bit_number() -> None:
    tensor = torch.zeros(2 * WORDS_PER_CHUNK + 3, dtype=torch.int32)
    before = checksum(tensor)
    tensor[-1] = 1
    assert checksum(tensor) != before
    assert torch.tensor([checksum(tensor), before], dtype=torch.int64).tolist() == [checksum(tensor), before]


def test_the_definition_does_not_change() -> None:
    assert checksum(torch.empty(0)) == -2152535657050944081
    assert checksum(torch.arange(1000, dtype=torch.int32)) == -9214012688700883999
