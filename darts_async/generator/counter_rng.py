"""Counter-based random numbers: a draw only depends on a sample's seed and the token's position in the response.

So another engine continues a response in another batch as if nothing had happened. The generator is the output function
of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) applied to the seed and
then to seed and counter, so that neighbouring seeds share nothing.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_UNIFORM_BITS: Final = 48


def seed_word(seed: int) -> int:
    """A seed of any size and sign as an unsigned 64-bit word."""
    return seed % (1 << 64)


def hash_words(seeds: NDArray[np.uint64], counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 random bits for each pair of seed and counter. Shapes broadcast."""
    return _mix(_mix(seeds + _GOLDEN) + counters.astype(np.uint64) * _GOLDEN)


def uniforms(seeds: NDArray[np.uint64], counters: NDArray[np.integer]) -> NDArray[np.float64]:
    """Uniform numbers strictly between 0 and 1, one for each pair of seed and counter. They carry 48 bits, so
    `u * total < total` holds for every positive float64 `total`."""
    words = hash_words(seeds, counters) >> np.uint64(64 - _UNIFORM_BITS)
    return (words.astype(np.float64) + 0.5) * 2.0**-_UNIFORM_BITS


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))
