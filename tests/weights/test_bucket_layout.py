"""The bucket layout: the same on both sides, every byte once, whatever the tensors are."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from darts_async.errors import ModelError, ProtocolError
from darts_async.protocol import TensorSpec, WeightManifest
from darts_async.weights.bucket_layout import (
    ALIGNMENT_BYTES,
    MIN_BUCKET_BYTES,
    bytes_of,
    distinct_tensors,
    layout_of,
    specs_of,
    views_of,
)
from darts_async.weights.checksum import checksum
from darts_async.weights.sending.pack import Packer

DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool", "float8_e4m3fn"]
specs = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3)), min_size=1, max_size=12
).map(lambda items: tuple(TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(items)))
bucket_sizes = st.integers(MIN_BUCKET_BYTES, MIN_BUCKET_BYTES + 5000)


@given(specs, bucket_sizes)
def test_every_byte_of_every_tensor_is_in_one_piece(tensors: tuple[TensorSpec, ...], bucket_bytes: int) -> None:
    layout = layout_of(WeightManifest(tensors, bucket_bytes))
    seen = [bytearray(p.num_bytes) for p in layout.spans]
    for bucket, pieces in enumerate(layout.pieces):
        start, stop = layout.bucket_range(bucket)
        for piece in pieces:
            span = layout.spans[piece.tensor]
            assert start + piece.bucket_start == span.offset + piece.tensor_start
            assert piece.bucket_start + piece.num_bytes <= stop - start <= bucket_bytes
            for at in range(piece.tensor_start, piece.tensor_start + piece.num_bytes):
                seen[piece.tensor][at] += 1
    assert all(set(counts) <= {1} for counts in seen)


@given(specs, bucket_sizes)
def test_tensors_are_aligned_and_do_not_overlap(tensors: tuple[TensorSpec, ...], bucket_bytes: int) -> None:
    layout = layout_of(WeightManifest(tensors, bucket_bytes))
    stop = 0
    for span in layout.spans:
        assert span.offset % ALIGNMENT_BYTES == 0
        assert span.offset >= stop
        stop = span.stop
    assert layout.total_bytes == stop
    assert layout.num_buckets == -(-stop // bucket_bytes)


@given(specs, bucket_sizes)
def test_each_tensor_is_completed_by_the_bucket_of_its_last_byte(
    tensors: tuple[TensorSpec, ...], bucket_bytes: int
) -> None:
    layout = layout_of(WeightManifest(tensors, bucket_bytes))
    for bucket, completed in enumerate(layout.completed):
        start, stop = layout.bucket_range(bucket)
        assert all(start < layout.spans[index].stop <= stop for index in completed)
    everything = sorted([index for completed in layout.completed for index in completed] + list(layout.empty))
    assert everything == list(range(len(tensors)))


@given(specs, bucket_sizes, st.integers(0, 2**31))
def test_packed_buckets_read_back_as_the_tensors(tensors: tuple[TensorSpec, ...], bucket_bytes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of(WeightManifest(tensors, bucket_bytes))
    source = {
        p.spec.name: torch.randint(0, 2, (p.num_bytes,), dtype=torch.uint8, generator=generator)
        .view(p.dtype)
        .view(p.spec.shape)
        if p.num_bytes
        else torch.empty(p.spec.shape, dtype=p.dtype)
        for p in layout.spans
    }
    flat = torch.full((layout.total_bytes,), 255, dtype=torch.uint8)
    packer = Packer(layout, iter(source.values()))
    for bucket in range(layout.num_buckets):
        start, stop = layout.bucket_range(bucket)
        packer.pack(flat[start:stop], bucket)
        packer.digest(bucket)
    assert packer.checksums() == [checksum(tensor) for tensor in source.values()]
    for name, tensor in views_of(flat, layout).items():
        assert tensor.dtype == source[name].dtype
        assert tensor.shape == source[name].shape
        assert torch.equal(bytes_of(tensor), bytes_of(source[name]))
    assert specs_of(source) == tensors


def test_a_tensor_larger_than_a_bucket_straddles_buckets() -> None:
    layout = layout_of(WeightManifest((TensorSpec("big", "float32", (3000,)),), 4096))
    assert layout.num_buckets == 3
    assert [[piece.num_bytes for piece in pieces] for pieces in layout.pieces] == [[4096], [4096], [3808]]
    assert layout.completed == ((), (), (0,))


def test_tied_parameters_appear_once() -> None:
    shared, other = torch.zeros(4, 4), torch.zeros(4, 4)
    tensors = distinct_tensors([("embed", shared), ("head", shared), ("other", other)])
    assert list(tensors) == ["embed", "other"]


def test_different_views_of_one_storage_are_different_tensors() -> None:
    base = torch.zeros(4, 4)
    assert list(distinct_tensors([("base", base), ("transposed", base.t()), ("row", base[0])])) == [
        "base",
        "transposed",
        "row",
    ]


def test_a_module_without_contiguous_parameters_is_packed_in_row_major_order() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4).t()
    layout = layout_of(WeightManifest(specs_of({"t": tensor}), 4096))
    flat = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    Packer(layout, iter([tensor])).pack(flat, 0)
    assert torch.equal(views_of(flat, layout)["t"], tensor)


def test_packing_takes_a_tensor_when_its_bucket_comes_and_lets_it_go_with_its_checksum() -> None:
    alive: set[int] = set()

    def fresh(index: int) -> torch.Tensor:
        tensor = torch.full((1024,), index, dtype=torch.float32)
        alive.add(index)
        weakref.finalize(tensor, alive.discard, index)
        return tensor

    specs = tuple(TensorSpec(str(index), "float32", (1024,)) for index in range(6))
    layout = layout_of(WeightManifest(specs, 8192))
    packer = Packer(layout, map(fresh, range(6)))
    buffer = torch.zeros(8192, dtype=torch.uint8)
    for bucket in range(3):
        packer.pack(buffer, bucket)
        assert alive == {2 * bucket, 2 * bucket + 1}
        packer.digest(bucket)
        assert alive == set()


@pytest.mark.parametrize(
    ("tensors", "bucket_bytes", "complaint"),
    [
        ((), 4096, "no tensor"),
        ((TensorSpec("a", "float32", (1,)),), 100, "bucket_bytes is 100"),
        ((TensorSpec("a", "float33", (1,)),), 4096, "unknown dtype 'float33'"),
        ((TensorSpec("a", "nn", (1,)),), 4096, "unknown dtype 'nn'"),
        ((TensorSpec("a", "float32", (-1,)),), 4096, "negative size"),
        ((TensorSpec("", "float32", (1,)),), 4096, "no name"),
        ((TensorSpec("a", "float32", (1,)), TensorSpec("a", "float32", (1,))), 4096, "'a' twice"),
        ((TensorSpec("a", "float32", (1 << 50,)),), 4096, "exceed"),
    ],
)
def test_a_bad_manifest_is_refused(tensors: tuple[TensorSpec, ...], bucket_bytes: int, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        layout_of(WeightManifest(tensors, bucket_bytes))


def test_a_model_without_parameters_or_with_equal_names_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameters"):
        distinct_tensors([])
    with pytest.raises(ModelError, match="'a'"):
        distinct_tensors([("a", torch.zeros(1)), ("a", torch.ones(1))])
