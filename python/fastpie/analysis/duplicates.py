"""Near-identical images: a perceptual hash of each, and groups of those that agree."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from fastpie.errors import FastpieError

__all__ = ["COEFFICIENTS", "coefficients", "first_alike"]

COEFFICIENTS = 64
"""Length of what is kept of an image."""

# The DCT hash of pHash (Zauner, "Implementation and benchmarking of perceptual image hash functions",
# 2010, section 3.2.1): 32 x 32 pixels, frequencies 1 to 8 of each axis. Without frequency 0, brightness
# and even illumination do not count.
_SIDE = 32
_FREQUENCIES = np.arange(1, 9)
_BASIS = np.cos(np.pi / _SIDE * _FREQUENCIES[:, None] * (np.arange(_SIDE) + 0.5))  # [8, 32]
# Amplitudes of natural images fall as 1/f (Field, J. Opt. Soc. Am. A 4, 1987): so that all frequencies
# count alike.
_WHITENING = np.hypot(*np.meshgrid(_FREQUENCIES, _FREQUENCIES))

# Signs alone cannot tell chest films apart by the million: of 125,000 pairs of generated ones the
# nearest differ in 8 to 10, and an image differs from itself cut by 2 % at its border in 4 (median) to
# 7 (nine in ten). docs/design/analysis.md has what the two together find.
_BITS = 7  # of the 64 that may differ
_COSINE = 0.95

# Two hashes that differ in at most 7 bits agree in at least 3 of 10 blocks (Manku, Jain, Das Sarma,
# "Detecting near-duplicates for web crawling", WWW 2007): one sort for each choice of three.
_AGREEING = 3
_BLOCKS = _BITS + _AGREEING
_ROW_BITS = 40  # of a row number beside the bits of three blocks
_MOST = 2**_ROW_BITS


def coefficients(image: np.ndarray) -> np.ndarray:  # fp32 [H, W] -> fp32 [64]
    """What of an image is compared: whitened DCT coefficients of unit length; 0 without structure.

    A change of brightness or contrast, another size or a recompression leave it nearly as it is.
    """
    # Pillow's box filter averages what it makes smaller; what is smaller already is interpolated.
    shrinks = min(image.shape) >= _SIDE
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), method), dtype=np.float64)
    values = (_BASIS @ small @ _BASIS.T * _WHITENING).ravel()
    # Rounding of fp32 pixels is no structure.
    if np.abs(values).max() <= 1e-4 * max(np.abs(small).max(), np.finfo(np.float32).tiny):
        return np.zeros(COEFFICIENTS, np.float32)
    result: np.ndarray = (values / np.linalg.norm(values)).astype(np.float32)
    return result


def first_alike(values: np.ndarray) -> np.ndarray:  # [N, 64] -> int64 [N]
    """The first image of the group of near-identical ones that each image is in.

    Two images are near-identical if their coefficients differ in sign in at most 7 places and have a
    cosine of at least .95. An image of zeros (no structure) or NaN (not read) is alone. No two
    images that are the first of their groups are near-identical, and an image is near-identical to
    its first or to another of the group.

    Time is that of 120 sorts of the images that have no group yet, and of comparing those whose
    hashes agree in three of ten blocks of bits.

    Args:
        values: of `coefficients`; any float.

    Returns:
        Row indices, each at most its own.

    Raises:
        FastpieError: for an array of another shape.
    """
    if values.ndim != 2 or values.shape[1] != COEFFICIENTS or len(values) >= _MOST:
        raise FastpieError(
            f"Expected coefficients of shape [N, {COEFFICIENTS}], but got {list(values.shape)}."
        )
    first = np.arange(len(values))
    hashes = _hashes(values)
    usable = (values != 0).any(1) & ~np.isnan(values).any(1)
    rows = np.flatnonzero(usable)
    for blocks in itertools.combinations(range(_BLOCKS), _AGREEING):
        _link(first, hashes, values, rows, blocks)
        rows = rows[first[rows] == rows]
    # An image can have been the first of a group before it went into another one.
    while (first[first] != first).any():
        first = first[first]
    return first


def _hashes(values: np.ndarray) -> np.ndarray:  # [N, 64] -> uint64 [N]
    """The signs, those of a block side by side. A block has frequencies from all over."""
    order = np.concatenate([np.arange(b, COEFFICIENTS, _BLOCKS) for b in range(_BLOCKS)])
    bits = np.packbits(np.ascontiguousarray(values[:, order] > 0), axis=1, bitorder="little")
    hashes: np.ndarray = bits.view("<u8").ravel()
    return hashes


def _link(
    first: np.ndarray,
    hashes: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    blocks: Sequence[int],
) -> None:
    """Compare those of some images whose hashes agree in some blocks; write what is found to `first`.

    Each round compares the first image of every bucket with the rest of it. Those alike leave, and so
    does the first: a bucket takes as many rounds as it has groups, and copies cost nothing more.
    """
    keys = np.zeros(len(rows), np.uint64)
    for block in blocks:
        width = len(range(block, COEFFICIENTS, _BLOCKS))
        at = sum(len(range(b, COEFFICIENTS, _BLOCKS)) for b in range(block))
        keys = (keys << np.uint64(width)) | (
            (hashes[rows] >> np.uint64(at)) & np.uint64(2**width - 1)
        )
    # Sorted with the row in the lower bits: stable, and several times as fast as argsort.
    keys = np.sort((keys << np.uint64(_ROW_BITS)) | rows.astype(np.uint64))
    rows = (keys & np.uint64(_MOST - 1)).astype(np.int64)
    keys >>= np.uint64(_ROW_BITS)
    while len(rows) > 1:
        same = keys[1:] == keys[:-1]  # as the one before
        leads = np.append(True, ~same) & np.append(same, False)
        one = rows[np.maximum.accumulate(np.where(leads, np.arange(len(rows)), 0))]
        rest = np.flatnonzero(same) + 1
        one, rows, keys = one[rest], rows[rest], keys[rest]
        alike = _differing(hashes[one], hashes[rows]) <= _BITS
        near = np.flatnonzero(alike)
        cosines = np.einsum("ij,ij->i", values[one[near]], values[rows[near]], dtype=np.float32)
        alike[near] = cosines >= _COSINE
        first[rows[alike]] = one[alike]
        rows, keys = rows[~alike], keys[~alike]


def _differing(one: np.ndarray, other: np.ndarray) -> np.ndarray:  # uint64 [n] twice -> uint64 [n]
    """Bits that differ, counted in parallel (numpy has bitwise_count from 2.0 on only)."""
    x = one ^ other
    for shift, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        x = (x & np.uint64(mask)) + ((x >> np.uint64(shift)) & np.uint64(mask))
    counts: np.ndarray = (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return counts
