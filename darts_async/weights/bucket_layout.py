"""The position of each tensor on the wire. Pure; both sides derive it from the manifest.

Theory. The tensors are laid out one after another in a flat address space, each at the next multiple of 16 bytes. A
bucket is a slice of `bucket_bytes` of that space (the last one is shorter). So a tensor may span several buckets. The
sender copies the pieces of one bucket at a time out of the live parameters. The receiver's staging memory *is* the flat
space: buckets arrive in place, and its tensors are views.

Invariants: offsets ascend without overlap; every byte of every tensor is in exactly one piece of one bucket.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from darts_async.errors import ModelError, ProtocolError
from darts_async.protocol import TensorSpec, WeightManifest

ALIGNMENT_BYTES = 16
MIN_BUCKET_BYTES = 1 << 12
MAX_TOTAL_BYTES = 1 << 42

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor in the flat space."""

    spec: TensorSpec
    dtype: torch.dtype
    offset: int
    num_bytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """`num_bytes` of tensor number `tensor`, from its byte `tensor_start` on, at `bucket_start` of a bucket."""

    tensor: int
    tensor_start: int
    bucket_start: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """The flat space and its buckets."""

    spans: tuple[TensorSpan, ...]
    bucket_bytes: int

    @cached_property
    def total_bytes(self) -> int:
        """Bytes on the wire, padding included."""
        return self.spans[-1].stop

    @property
    def num_buckets(self) -> int:
        """Broadcasts per update; none if no tensor has an element."""
        return -(-self.total_bytes // self.bucket_bytes)

    def bucket_range(self, bucket: int) -> tuple[int, int]:
        """First byte of a bucket in the flat space, and the first byte after it."""
        start = bucket * self.bucket_bytes
        return start, min(start + self.bucket_bytes, self.total_bytes)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """What to copy into each bucket. [num_buckets]"""
        pieces: list[list[Piece]] = [[] for _ in range(self.num_buckets)]
        for index, span in enumerate(self.spans):
            for bucket in range(span.offset // self.bucket_bytes, -(-span.stop // self.bucket_bytes)):
                start, stop = self.bucket_range(bucket)
                begin, end = max(start, span.offset), min(stop, span.stop)
                if begin < end:
                    pieces[bucket].append(Piece(index, begin - span.offset, begin - start, end - begin))
        return tuple(map(tuple, pieces))

    @cached_property
    def completed(self) -> tuple[tuple[int, ...], ...]:
        """Tensors whose last byte is in each bucket, after which their checksums can be computed. [num_buckets]"""
        completed: list[list[int]] = [[] for _ in range(self.num_buckets)]
        for index, span in enumerate(self.spans):
            if span.num_bytes:
                completed[(span.stop - 1) // self.bucket_bytes].append(index)
        return tuple(map(tuple, completed))

    @property
    def empty(self) -> tuple[int, ...]:
        """Tensors without elements, which are in no bucket."""
        return tuple(index for index, span in enumerate(self.spans) if not span.num_bytes)


def distinct_tensors(named_tensors: NamedTensors) -> dict[str, torch.Tensor]:
    """The tensors without aliases: tied parameters appear once, under their first name. Raises `ModelError` if a name
    appears twice, or there is no tensor."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in named_tensors:
        if name in tensors:
            raise ModelError(f"two tensors are named {name!r}; every parameter needs its own name")
        storage = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and storage in seen:
            continue
        seen.add(storage)
        tensors[name] = tensor.detach()
    if not tensors:
        raise ModelError("the model has no parameters, so there is nothing to broadcast")
    return tensors


def specs_of(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())


def layout_of(manifest: WeightManifest) -> Layout:
    """The layout that follows from a manifest. Raises `ProtocolError` if it is invalid."""
    if manifest.bucket_bytes < MIN_BUCKET_BYTES:
        raise ProtocolError(f"the manifest's bucket_bytes is {manifest.bucket_bytes}, below {MIN_BUCKET_BYTES}")
    if not manifest.tensors:
        raise ProtocolError("the manifest names no tensor")
    spans: list[TensorSpan] = []
    names: set[str] = set()
    stop = 0
    for spec in manifest.tensors:
        if not spec.name or spec.name in names:
            raise ProtocolError(f"the manifest names {spec.name!r} twice" if spec.name else "a tensor has no name")
        names.add(spec.name)
        dtype, num_bytes = _size_of(spec)
        offset = -(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        spans.append(TensorSpan(spec, dtype, offset, num_bytes))
        stop = offset + num_bytes
        if stop > MAX_TOTAL_BYTES:
            raise ProtocolError(f"the manifest's tensors up to {spec.name!r} exceed {MAX_TOTAL_BYTES} bytes")
    return Layout(tuple(spans), manifest.bucket_bytes)


def views_of(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Views of the tensors in a flat space: uint8, [layout.total_bytes], aligned as torch allocates."""
    return {
        p.spec.name: flat[p.offset : p.stop].view(p.dtype).view(p.spec.shape)
        if p.num_bytes
        else torch.empty(p.spec.shape, dtype=p.dtype, device=flat.device)
        for p in layout.spans
    }


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order: a view where it is contiguous, else a copy. uint8, [num_bytes]"""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _size_of(spec: TensorSpec) -> tuple[torch.dtype, int]:
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ProtocolError(f"tensor {spec.name!r} has the unknown dtype {spec.dtype!r}")
    if any(size < 0 for size in spec.shape):
        raise ProtocolError(f"tensor {spec.name!r} has a negative size in its shape {spec.shape}")
    return dtype, prod(spec.shape) * dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
