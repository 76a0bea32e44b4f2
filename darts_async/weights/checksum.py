"""A checksum per tensor that is the same on every device, depends on the order of elements and runs at memory speed.

Theory. The bytes are read as 32-bit words, in chunks. Word i of a chunk is multiplied by weight w[i] and summed in
wrap-around 64-bit integers, which is exact, hence the same on any device and in any order of summation. The weights are
distinct numbers in [1, 2^31). The chunk sums are folded on the host, in order, through a bijective mixer that starts
from the number of bytes.

- A change confined to one word changes the sum by d * w[i], with 0 < |d| < 2^32 and 0 < w[i] < 2^31: never 0
  modulo 2^64. The fold is a bijection of each chunk sum: the change is always seen, single flipped bits included.
- Swapping two different words of one chunk changes the sum by d * (w[i] - w[j]), by the same bound never 0.
- Any other damage is missed with a probability of about 2^-64.

This protects against accidents on the wire and in memory; the link's authentication protects against attackers.
"""

from functools import lru_cache

import torch

from darts_async.weights.bucket_layout import bytes_of

WORDS_PER_CHUNK = 1 << 17
"""Chunk, weights and products (4, 8 and 8 bytes a word) stay in a processor's cache; a GPU gets 512 KiB a call."""

_MASK = (1 << 64) - 1


def checksum(tensor: torch.Tensor) -> int:
    """The checksum of a tensor's bytes in row-major order, as a signed 64-bit number. Neither dtype, shape, device nor
    strides change it."""
    content = bytes_of(tensor)
    words = _words_of(content)
    state = _mix(len(content))
    for chunk_sum in _chunk_sums(words) if len(words) else []:
        state = _mix(state ^ (chunk_sum & _MASK))
    return state - (1 << 64) if state >> 63 else state


def _chunk_sums(words: torch.Tensor) -> list[int]:
    """The weighted sum of each chunk: one transfer for all, so a device is not synchronised in the loop."""
    weights = _weights(words.device)
    # Written to one buffer: allocating new memory for the products would cost ten times the arithmetic.
    products = torch.empty(min(len(words), WORDS_PER_CHUNK), dtype=torch.int64, device=words.device)
    chunks = [words[start : start + WORDS_PER_CHUNK] for start in range(0, len(words), WORDS_PER_CHUNK)]
    sums = [torch.mul(chunk, weights[: len(chunk)], out=products[: len(chunk)]).sum() for chunk in chunks]
    result: list[int] = torch.stack(sums).tolist()
    return result


def _words_of(content: torch.Tensor) -> torch.Tensor:
    """Bytes as 32-bit words, the last one filled up with zeros. int32, [ceil(num_bytes / 4)]"""
    missing = -len(content) % 4
    if missing:
        content = torch.cat((content, content.new_zeros(missing)))
    elif content.storage_offset() % 4:
        content = content.clone()
    return content.view(torch.int32)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> torch.Tensor:
    """Distinct numbers in [1, 2^31) in scrambled order. int64, [WORDS_PER_CHUNK]

    Multiplication by an odd number and xor with a right shift are bijections of 31-bit numbers that map 0,
    and only 0, to 0; scrambling 1, 2, ... so gives distinct numbers that are not 0. Scrambled, because under a
    linear sequence swapping pairs of neighbouring words could cancel.
    """
    low_bits = (1 << 31) - 1
    weights = torch.arange(1, WORDS_PER_CHUNK + 1, dtype=torch.int64)
    for multiplier, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 13)):
        weights = (weights * multiplier) & low_bits
        weights = weights ^ (weights >> shift)
    return weights.to(device)


def _mix(value: int) -> int:
    """A bijection of 64-bit numbers that spreads every bit (the finaliser of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
