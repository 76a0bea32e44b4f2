"""Fills the buckets of a broadcast from a source that yields complete tensors one after another.

Memory: the bucket, and the tensors with pieces in it. Each tensor is taken from the source for the first bucket that
needs it, and released after its checksum.
"""

from collections.abc import Iterator

import torch

from darts_async.weights.bucket_layout import Layout, bytes_of
from darts_async.weights.checksum import checksum


class Packer:
    """Packs the buckets of a layout in ascending order. `tensors` are those of the layout, in its order."""

    def __init__(self, layout: Layout, tensors: Iterator[torch.Tensor]) -> None:
        self._layout = layout
        self._tensors = tensors
        self._num_taken = 0
        self._held: dict[int, torch.Tensor] = {}
        self._checksums = [0] * len(layout.spans)

    def pack(self, buffer: torch.Tensor, bucket: int) -> None:
        """Copy what belongs into one bucket into `buffer`: uint8, at least as long as the bucket."""
        for piece in self._layout.pieces[bucket]:
            self._take_until(piece.tensor)
            content = bytes_of(self._held[piece.tensor])
            source = content[piece.tensor_start : piece.tensor_start + piece.num_bytes]
            buffer[piece.bucket_start : piece.bucket_start + piece.num_bytes].copy_(source)

    def digest(self, bucket: int) -> None:
        """Compute the checksums of the tensors that end in a packed bucket, and release them."""
        for index in self._layout.completed[bucket]:
            self._checksums[index] = checksum(self._held.pop(index))

    def checksums(self) -> list[int]:
        """Of all tensors, when all buckets are packed and digested. [num_tensors]"""
        self._take_until(len(self._checksums) - 1)
        for index in self._layout.empty:
            self._checksums[index] = checksum(self._held.pop(index))
        assert not self._held, "a tensor was not digested"
        return self._checksums

    def _take_until(self, index: int) -> None:
        while self._num_taken <= index:
            self._held[self._num_taken] = next(self._tensors)
            self._num_taken += 1
