"""Receives buckets: into memory beside the running model, or as a stream of tensors that are not kept."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from darts_async.errors import WeightUpdateError
from darts_async.faults import present
from darts_async.protocol import WeightManifest
from darts_async.weights.broadcast.collective import Collective
from darts_async.weights.bucket_layout import Layout, layout_of, views_of
from darts_async.weights.checksum import checksum


@dataclass(frozen=True, slots=True, eq=False)
class Staging:
    """Memory for one copy of the model, and the tensors in it."""

    manifest: WeightManifest
    layout: Layout
    flat: torch.Tensor  # uint8, [layout.total_bytes]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def for_manifest(cls, manifest: WeightManifest, device: torch.device) -> "Staging":
        layout = layout_of(manifest)
        flat = torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)
        return cls(manifest, layout, flat, views_of(flat, layout))

    def fits(self, manifest: WeightManifest, device: torch.device) -> bool:
        return self.manifest == manifest and self.flat.device == device


def receive_buckets(
    collective: Collective, staging: Staging, deadline_at_s: float, posted: Callable[[], object]
) -> list[int]:
    """Receive all buckets in place; runs in the group's thread. `posted` is called once the first receive is posted.
    Returns the checksum of each tensor, computed while later buckets are under way. [num_tensors]"""
    layout, tensors = staging.layout, list(staging.tensors.values())
    checksums = [0] * len(tensors)
    buffers = [staging.flat[slice(*layout.bucket_range(bucket))] for bucket in range(layout.num_buckets)]
    for bucket in _arrived(collective, buffers, deadline_at_s, posted):
        for index in layout.completed[bucket]:
            checksums[index] = checksum(tensors[index])
    for index in layout.empty:
        checksums[index] = checksum(tensors[index])
    return checksums


def _arrived(
    collective: Collective, buffers: Sequence[torch.Tensor], deadline_at_s: float, posted: Callable[[], object]
) -> Iterator[int]:
    """Receive one bucket into each buffer; yields each bucket that is there, while the next one is under way."""
    pending = collective.post(buffers[0], deadline_at_s) if buffers else None
    posted()
    for bucket in range(len(buffers)):
        assert pending is not None
        present().in_thread("generator.bucket")
        pending.wait()
        pending = collective.post(buffers[bucket + 1], deadline_at_s) if bucket + 1 < len(buffers) else None
        yield bucket


_LOOK_S = 0.05
_STREAM_TENSORS = 4
"""Most tensors that wait to be loaded; one more is being received and one is being loaded."""


class TensorStream:
    """Passes tensors from the receiving thread to the loading thread, each in its own memory. The deadline for both
    sides is on `time.monotonic`."""

    def __init__(self, policy_version: int, deadline_at_s: float) -> None:
        self.policy_version = policy_version
        self._deadline_at_s = deadline_at_s
        self._queue: queue.Queue[tuple[str, torch.Tensor] | None] = queue.Queue(_STREAM_TENSORS)
        self._failure: str | None = None

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Hand over a tensor. Raises `WeightUpdateError` if it is not fetched by the deadline, or after `fail`."""
        self._put((name, tensor))

    def end(self) -> None:
        """There are no more tensors. Raises as `put` does."""
        self._put(None)

    def fail(self, reason: str) -> None:
        """The update has failed. The first reason is kept."""
        self._failure = self._failure or reason

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in the order of the manifest. Raises `WeightUpdateError` if some do not arrive."""
        while True:
            try:
                item = self._queue.get(timeout=_LOOK_S)
            except queue.Empty:
                if self._failure is not None:
                    raise WeightUpdateError(self._failure) from None
                if time.monotonic() >= self._deadline_at_s:
                    raise WeightUpdateError("the tensors of an update did not arrive by its deadline") from None
                continue
            if item is None:
                return
            yield item

    def _put(self, item: tuple[str, torch.Tensor] | None) -> None:
        while True:
            if self._failure is not None:
                raise WeightUpdateError(self._failure)
            try:
                self._queue.put(item, timeout=_LOOK_S)
            except queue.Full:
                if time.monotonic() >= self._deadline_at_s:
                    raise WeightUpdateError("the tensors of an update were not fetched by its deadline") from None
            else:
                return


def receive_tensors(
    collective: Collective,
    layout: Layout,
    device: torch.device,
    deadline_at_s: float,
    posted: Callable[[], object],
    stream: TensorStream,
) -> list[int]:
    """The same, but each complete tensor is passed to the stream and not kept."""
    checksums = [0] * len(layout.spans)
    partial: dict[int, torch.Tensor] = {}
    size = min(layout.bucket_bytes, layout.total_bytes)
    memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, layout.num_buckets))]
    ranges = map(layout.bucket_range, range(layout.num_buckets))
    buffers = [memory[bucket % 2][: stop - start] for bucket, (start, stop) in enumerate(ranges)]

    def finish(index: int) -> None:
        span = layout.spans[index]
        content = partial.pop(index, torch.empty(0, dtype=torch.uint8, device=device))
        tensor = content.view(span.dtype).view(span.spec.shape)
        checksums[index] = checksum(tensor)
        stream.put(span.spec.name, tensor)

    for bucket in _arrived(collective, buffers, deadline_at_s, posted):
        for piece in layout.pieces[bucket]:
            num_bytes = layout.spans[piece.tensor].num_bytes
            if piece.tensor not in partial:
                partial[piece.tensor] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            source = buffers[bucket][piece.bucket_start : piece.bucket_start + piece.num_bytes]
            partial[piece.tensor][piece.tensor_start : piece.tensor_start + piece.num_bytes].copy_(source)
        for index in layout.completed[bucket]:
            finish(index)
    for index in layout.empty:
        finish(index)
    stream.end()
    return checksums
