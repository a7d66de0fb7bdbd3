"""Geometry of activations in positions: what each tap reads, where pixels and zeros lie."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastpie.ops.positions import Buffer, Positions, Tiles, tiles_of, views_of

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
IMAGES = st.integers(1, 33)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, int, int], ...]:
    """(size, kernel, stride, padding, dilation) with an output of one pixel at least."""
    axes = []
    for axis in range(3):
        flat = axis < 2 and draw(st.booleans())  # 1D and 2D are as likely as 3D
        kernel, stride = draw(st.integers(1, 1 if flat else 4)), draw(st.integers(1, 3))
        padding, dilation = draw(st.integers(0, 0 if flat else 5)), draw(st.integers(1, 3))
        size = draw(st.integers(1, 1 if flat else 11))
        behind = draw(st.integers(0, 3))
        assume(size + padding + behind > dilation * (kernel - 1))
        axes.append((size, kernel, stride, padding, dilation, behind))
    return tuple(zip(*axes, strict=True))


@st.composite
def geometries(draw: st.DrawFn) -> Positions:
    size, halo = (tuple(draw(st.integers(low, 9)) for _ in range(3)) for low in (1, 0))
    return Positions(size, halo, draw(IMAGES), draw(DTYPES))


def places(positions: Positions, size: tuple[int, ...]) -> np.ndarray:  # [D, H, W, images]
    """Where the pixels of a channel lie, in elements from its beginning."""
    axes = [np.arange(n) * p for n, p in zip(size, positions.pitches, strict=True)]
    pixels = axes[0][:, None, None] + axes[1][:, None] + axes[2]
    return pixels[..., None] + np.arange(positions.images)


@given(convolutions(), st.integers(1, 5), DTYPES, st.tuples(*[st.integers(0, 2)] * 3))
@settings(deadline=None)
def test_each_tap_of_each_output_pixel_reads_its_input_pixel_or_a_zero(
    convolution: tuple[Any, ...], images: int, dtype: torch.dtype, extra: tuple[int, int, int]
) -> None:
    size, kernel, stride, padding, dilation, behind = convolution
    views = views_of(*convolution)
    halo = tuple(h + e for h, e in zip(views.halo, extra, strict=True))
    positions = Positions(views.size, halo, images, dtype)
    # Every pixel of the input has a number of its own, and lies where to_positions puts it.
    numbers = np.arange(1, 1 + math.prod(size) * images).reshape(*size, images)
    planes = len(views.phases) * positions.plane
    memory = np.zeros(2 * positions.guard + planes, dtype=np.int64)
    for index, (phase, stored) in enumerate(zip(views.phases, views.stored, strict=True)):
        z, y, x = (slice(r, None, s) for r, s in zip(phase, stride, strict=True))
        part = numbers[z, y, x][tuple(slice(n) for n in stored)]
        assert part.shape[:3] == stored
        at = positions.guard + index * positions.plane + places(positions, stored)
        assert part.size == 0 or at.max() < positions.guard + (index + 1) * positions.plane
        assert not memory[at].any()
        memory[at] = part
    # What the taps should read: the input with zeros around it.
    padded = np.pad(numbers, [*zip(padding, behind, strict=True), (0, 0)])
    offsets = views.tap_offsets(positions)
    assert len(offsets) == math.prod(kernel)
    output = positions.guard + places(positions, views.size)
    for tap, offset in zip(np.ndindex(*kernel), offsets, strict=True):
        z, y, x = (
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(tap, dilation, views.size, stride, strict=True)
        )
        assert np.array_equal(memory[output + offset], padded[z, y, x])
    # Kernels read whole lines, none of them outside of what a Buffer allocates.
    used = np.flatnonzero(positions.valid) * positions.line
    assert used[0] + min(offsets) >= -positions.guard
    assert used[-1] + positions.line + max(offsets) <= planes + positions.guard


@given(convolutions())
@settings(deadline=None)
def test_output_size_is_that_of_torch(convolution: tuple[Any, ...]) -> None:
    size, kernel, stride, padding, dilation, behind = convolution
    sides = [n for pair in zip(padding[::-1], behind[::-1], strict=True) for n in pair]
    x = F.pad(torch.zeros(1, 1, *size), sides)
    expected = F.conv3d(x, torch.zeros(1, 1, *kernel), None, stride, 0, dilation)
    views = views_of(*convolution)
    assert views.size == tuple(expected.shape[2:])
    assert views.is_shift_only == (len(views.phases) == 1 and views.phases[0] == (0, 0, 0))
    if stride == (1, 1, 1):
        assert views.is_shift_only


@given(geometries())
@settings(deadline=None)
def test_pixels_share_no_position_and_the_valid_bits_are_theirs(positions: Positions) -> None:
    at = places(positions, positions.size).reshape(-1)
    assert len(np.unique(at)) == len(at)
    assert at.max() < positions.plane
    shifts = np.arange(positions.line, dtype=np.uint32)
    bits = (positions.valid[:, None] >> shifts & 1).reshape(-1)
    assert len(bits) == positions.plane
    assert np.array_equal(np.flatnonzero(bits), np.sort(at))
    assert positions.plane // positions.line % 2 == 1
    assert positions.guard % positions.line == 0


@given(geometries(), st.integers(1, 40))
@settings(deadline=None)
def test_tiles_cover_each_pixel_once_and_no_line_without_one(
    positions: Positions, lines: int
) -> None:
    tiles = Tiles(positions, lines)
    table = tiles._tiles.tolist()
    assert tiles.count == len(table)
    covered = [p // positions.line + i for p, n in table for i in range(n)]
    assert covered == np.flatnonzero(positions.valid).tolist()
    assert all(1 <= n <= lines and p % positions.line == 0 for p, n in table)
    full = positions.valid[covered] == 2**positions.line - 1
    assert (tiles.handle[2] == 0) == full.all()
    assert tiles_of(positions, lines) is tiles_of(positions, lines)


@given(geometries(), st.integers(1, 4), st.integers(1, 40), st.sampled_from([0.0, -1.5]))
@settings(deadline=None)
def test_buffer_holds_the_pixels_of_all_images_apart_from_its_halo(
    positions: Positions, channels: int, images: int, fill: float
) -> None:
    buffer = Buffer(positions, channels, images, fill=fill)
    assert buffer.handle[0] % 64 == 0
    pixels = buffer.pixels(images)
    groups = positions.groups(images)
    assert groups * positions.images >= images > (groups - 1) * positions.images
    assert pixels.shape == (groups, channels, *positions.size, positions.images)
    assert pixels.data_ptr() == buffer.handle[0]
    assert (pixels == fill).all()
    pixels.fill_(2)
    written = (buffer._storage == 2).sum().item()
    assert written == pixels.numel()
    end = buffer._begin + groups * channels * positions.plane
    outside = torch.cat([buffer._storage[: buffer._begin], buffer._storage[end:]])
    assert (outside == fill).all()
    assert buffer._begin >= positions.guard
    assert len(buffer._storage) - end >= positions.guard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffer_can_share_memory_and_show_some_channels(dtype: torch.dtype) -> None:
    positions = Positions((1, 5, 6), (0, 1, 1), 2, dtype)
    whole = Buffer(positions, 7, 5)
    some = Buffer(positions, 3, 5, within=whole, first=2, of=7)
    some.pixels(5).fill_(1)
    found = whole.pixels(5)[:, :, 0, 0, 0, 0]
    assert torch.equal(found.float(), torch.tensor([[0, 0, 1, 1, 1, 0, 0]] * 3).float())
    assert some.handle[1:] == whole.handle[1:]
    fewer = Buffer(positions, 2, 5, within=whole)
    assert fewer.handle[0] == whole.handle[0]
    assert fewer.handle[1:] == (2 * positions.plane, positions.plane)


def test_dtypes_fill_the_same_bytes() -> None:
    single, half = (Positions((1, 8, 8), (0, 0, 0), 16, t) for t in (torch.float32, torch.bfloat16))
    assert (single.line, half.line) == (16, 32)
    assert single.strides(3) == (3 * single.plane, single.plane, 1024, 128, 16, 1)
