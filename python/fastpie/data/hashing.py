"""64-bit hashes of the strings of an Arrow column, without a Python object a string."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

__all__ = ["hash64", "mixed"]

# A polynomial over the bytes modulo 2^64. The base is odd, so that it has an inverse and the hash of
# any stretch of bytes comes from one running sum: (sum[end] - sum[start]) / base^start.
_BASE = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_BASE, -1, 1 << 64)
_BLOCK = 1 << 20  # bytes hashed at a time: the temporary arrays take 32 bytes for each


def hash64(values: pa.ChunkedArray) -> np.ndarray:  # large_string [N] -> uint64 [N]
    """Hash strings, the same on every machine and in every version. A null is the empty string.

    Two strings of one hash are possible; who needs certainty compares those few.
    """
    parts = [_hash_chunk(chunk) for chunk in values.chunks]
    return mixed(np.concatenate(parts) if parts else np.empty(0, np.uint64))


def mixed(hashes: np.ndarray, seed: int = 0) -> np.ndarray:  # uint64 [N]
    """Spread hashes over all 64 bits, in another way for each seed.

    The finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators",
    2014).
    """
    # The seed goes through the finaliser too: added as it is, nearby seeds would give nearby hashes.
    x = hashes if seed == 0 else hashes ^ mixed(np.array([seed % (1 << 64)], np.uint64))
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)


def _hash_chunk(chunk: pa.LargeStringArray) -> np.ndarray:
    if chunk.null_count:
        chunk = chunk.fill_null("")
    count = len(chunk)
    _, offset_buffer, data_buffer = chunk.buffers()
    if count == 0 or data_buffer is None:
        return np.zeros(count, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64)[chunk.offset : chunk.offset + count + 1]
    data = np.frombuffer(data_buffer, np.uint8)
    longest = int(np.diff(offsets).max())
    size = min(max(_BLOCK, longest), int(offsets[-1] - offsets[0])) + 1
    powers, inverses = _powers(_BASE, size), _powers(_INVERSE, size)
    hashes = np.empty(count, np.uint64)
    first = 0
    while first < count:
        last = int(np.searchsorted(offsets, offsets[first] + size - 1, side="right")) - 1
        last = min(last, count)
        block = data[offsets[first] : offsets[last]].astype(np.uint64)
        block += np.uint64(1)  # or "a" and "a\0" would be one
        sums = np.zeros(len(block) + 1, np.uint64)
        np.cumsum(block * powers[: len(block)], out=sums[1:])
        local = offsets[first : last + 1] - offsets[first]
        hashes[first:last] = (sums[local[1:]] - sums[local[:-1]]) * inverses[local[:-1]]
        first = last
    return hashes


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
