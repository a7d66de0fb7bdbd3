"""Where activations lie for the sparse kernels: positions, halos, tiles, shifted views.

A kernel of `masked_conv` knows no rows and columns: it adds `weight * input[position + offset]` for
a run of positions (csrc/include/fastpie/masked_conv.h). Here is the geometry that makes this a
convolution. A channel is one plane of positions::

    position(z, y, x, image) = ((z * (H + halo_y) + y) * (W + halo_x) + x) * images + image

with zeros after each row, each slice of rows and each volume (the halo). Zeros after one row are
also the zeros before the next one. 1D and 2D are the cases D = 1 and H = 1; a linear layer is the
case of one pixel. With `images` = 1 pixels lie side by side in a register, with 16 each register
holds one pixel of 16 images.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Buffer", "Positions", "Tiles", "Views", "dtype_code", "tiles_of", "views_of"]

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LINE_BYTES = 64
_HUGE_PAGE = 1 << 21  # bytes


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def dtype_code(dtype: torch.dtype) -> int:
    """The number of a dtype in csrc/include/fastpie/status.h."""
    return _CODES[dtype]


@dataclass(frozen=True)
class Positions:
    """The geometry of one channel.

    Attributes:
        size: (D, H, W) pixels.
        halo: zeros behind each volume, slice and row, in pixels.
        images: images interleaved, 1 or more.
        dtype: torch.float32 or torch.bfloat16.
    """

    size: tuple[int, int, int]
    halo: tuple[int, int, int]
    images: int
    dtype: torch.dtype

    @property
    def line(self) -> int:
        """Elements of a cache line."""
        return _LINE_BYTES // self.dtype.itemsize

    @property
    def pitches(self) -> tuple[int, int, int]:
        """Elements from one slice, row and pixel to the next."""
        _, h, w = self.size
        _, halo_y, halo_x = self.halo
        x = self.images
        y = (w + halo_x) * x
        return (h + halo_y) * y, y, x

    @functools.cached_property
    def plane(self) -> int:
        """Elements from one channel to the next.

        An odd number of lines, which spreads the channels over all sets of a cache.
        """
        lines = -(-(self.size[0] + self.halo[0]) * self.pitches[0] // self.line)
        return (lines | 1) * self.line

    @functools.cached_property
    def guard(self) -> int:
        """Elements of zeros before the first and behind the last channel that a view may reach."""
        reach = sum(h * p for h, p in zip(self.halo, self.pitches, strict=True))
        return (reach // self.line + 2) * self.line

    def offset(self, z: int, y: int, x: int) -> int:
        """Elements from one pixel to the one that lies (z, y, x) further."""
        return z * self.pitches[0] + y * self.pitches[1] + x * self.pitches[2]

    @functools.cached_property
    def valid(self) -> np.ndarray[Any, Any]:  # [lines] uint32
        """One bit for each position of each line: whether it is a pixel."""
        bits = np.zeros(self.plane, dtype=bool)
        grid = [np.arange(n) * p for n, p in zip(self.size, self.pitches, strict=True)]
        pixels = (grid[0][:, None, None] + grid[1][:, None] + grid[2]).reshape(-1, 1)
        bits[(pixels + np.arange(self.images)).reshape(-1)] = True
        weights = np.left_shift(np.uint64(1), np.arange(self.line, dtype=np.uint64))
        words = (bits.reshape(-1, self.line) * weights).sum(1)
        return np.asarray(words, dtype=np.uint32)

    def groups(self, images: int) -> int:
        """Groups that hold this many images."""
        return -(-images // self.images)

    def strides(self, channels: int) -> tuple[int, int, int, int, int, int]:
        """Elements from (group, channel, slice, row, pixel, image) to the next."""
        return (channels * self.plane, self.plane, *self.pitches, 1)


@functools.lru_cache(maxsize=512)
def tiles_of(positions: Positions, lines: int) -> Tiles:
    """The tiles of at most `lines` lines that cover every pixel; see Tiles."""
    return Tiles(positions, lines)


class Tiles:
    """Runs of lines that a kernel works on at a time, and which of their positions are pixels.

    Lines without a pixel are left out. Runs are cut evenly.

    Attributes:
        count: number of tiles.
        handle: (address of the tiles, count, address of the valid bits or 0) for `_C`.
    """

    def __init__(self, positions: Positions, lines: int) -> None:
        """See the class."""
        valid = positions.valid
        used = np.flatnonzero(valid)
        runs = np.split(used, np.flatnonzero(np.diff(used) != 1) + 1)
        cuts = []
        for run in runs:
            parts = -(-len(run) // lines)
            edges = [len(run) * i // parts for i in range(parts + 1)]
            cuts += [(run[a] * positions.line, b - a) for a, b in itertools.pairwise(edges)]
        self._tiles = torch.tensor(cuts, dtype=torch.int32).reshape(-1, 2)
        full = np.uint32(2**positions.line - 1)
        self._valid = None
        if not (valid[used] == full).all():
            self._valid = torch.from_numpy(valid.view(np.int32).copy())
        self.count = len(cuts)
        self.handle = (
            self._tiles.data_ptr(),
            self.count,
            0 if self._valid is None else self._valid.data_ptr(),
        )

    def tiles(self) -> list[list[int]]:
        """[first position, lines] of each tile."""
        return list(self._tiles.tolist())


class Buffer:
    """Memory for some channels of some images, with its halo zero.

    Attributes:
        positions: the geometry.
        channels: how many each image has.
        handle: (address of the first channel, elements from group to group, from channel to
            channel) for `_C`.
    """

    def __init__(
        self,
        positions: Positions,
        channels: int,
        images: int,
        *,
        fill: float = 0.0,
        within: Buffer | None = None,
        first: int = 0,
        of: int | None = None,
    ) -> None:
        """Allocate for `images` images, or look into memory that there is.

        Args:
            positions: the geometry.
            channels: of each image.
            images: how many images.
            fill: value of every element.
            within: a buffer of the same geometry and at least as many planes, to share.
            first: the first channel seen, where `channels` are some of `of` channels.
            of: all channels of an image in memory; `channels` by default.
        """
        self.positions = positions
        self.channels = channels
        self._of = channels if of is None else of
        itemsize = positions.dtype.itemsize
        if within is None:
            count = 2 * positions.guard + positions.groups(images) * self._of * positions.plane
            self._storage = _aligned(count, positions.dtype).fill_(fill)
        else:
            self._storage = within._storage
        self._begin = positions.guard + first * positions.plane
        self.handle = (
            self._storage.data_ptr() + self._begin * itemsize,
            self._of * positions.plane,
            positions.plane,
        )

    def from_image(self, first: int) -> Buffer:
        """The same memory, seen from an image on that begins a group."""
        if first == 0:
            return self
        later = object.__new__(Buffer)
        later.__dict__.update(self.__dict__)
        address, group, plane = self.handle
        skipped = first // self.positions.images * group
        later._begin = self._begin + skipped
        later.handle = (address + skipped * self.positions.dtype.itemsize, group, plane)
        return later

    def pixels(self, images: int) -> Tensor:  # [groups, C, D, H, W, images of a group]
        """The pixels of the first groups that hold `images` images, as a strided view."""
        p = self.positions
        shape = (p.groups(images), self.channels, *p.size, p.images)
        begin = self._storage.storage_offset() + self._begin
        return self._storage.as_strided(shape, p.strides(self._of), begin)


def _aligned(count: int, dtype: torch.dtype) -> Tensor:
    """Memory that begins at a cache line, or at a huge page where it is as large as one.

    The kernels go from channel to channel, each on a page of its own: with pages of 4 KiB the
    address translation misses at nearly every weight. Linux gives huge pages on request.
    """
    size = count * dtype.itemsize
    large = size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    step = _HUGE_PAGE if large else _LINE_BYTES
    memory = torch.empty(count + step // dtype.itemsize, dtype=dtype)
    skip = -memory.data_ptr() % step
    if large:  # advice: without effect where it is refused
        whole = size // _HUGE_PAGE * _HUGE_PAGE
        _madvise(memory.data_ptr() + skip, whole, mmap.MADV_HUGEPAGE)
    return memory[skip // dtype.itemsize :][:count]


@dataclass(frozen=True)
class Views:
    """A convolution as a sum of shifted views.

    The stride takes the input apart: phase (rz, ry, rx) of a channel holds the pixels
    ``input[z * stride_z + rz, ...]``. In phases every filter tap is a shift by whole pixels.

    Attributes:
        size: (D, H, W) of the output.
        phases: the phases that some tap reads, each (rz, ry, rx).
        taps: for each filter tap in C order the phase's place in `phases` and its shift (z, y, x).
        halo: the zeros that the geometry needs at least.
        stored: for each phase how many slices, rows and pixels of it are stored.
    """

    size: tuple[int, int, int]
    phases: tuple[tuple[int, int, int], ...]
    taps: tuple[tuple[int, tuple[int, int, int]], ...]
    halo: tuple[int, int, int]
    stored: tuple[tuple[int, int, int], ...]

    @property
    def is_shift_only(self) -> bool:
        """Whether the input can be read where it lies: stride 1."""
        return self.phases == ((0, 0, 0),)

    def tap_offsets(self, positions: Positions) -> list[int]:
        """Elements from a position of the output to what each tap reads."""
        return [phase * positions.plane + positions.offset(*shift) for phase, shift in self.taps]


@functools.lru_cache(maxsize=512)
def views_of(
    size: tuple[int, int, int],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    padding_behind: tuple[int, int, int] | None = None,
) -> Views:
    """The shifted views of a convolution of an input of `size` (D, H, W).

    `padding` is on both sides, unless `padding_behind` says otherwise.
    """
    out = tuple(
        (n + p + b - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d, b in zip(
            size, kernel, stride, padding, dilation, padding_behind or padding, strict=True
        )
    )
    axes = []  # for each axis and tap the phase and the shift
    for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True):
        axes.append([((i * d - p) % s, (i * d - p) // s) for i in range(k)])
    used = sorted({tuple(a[0] for a in tap) for tap in itertools.product(*axes)})
    taps = tuple(
        (used.index(tuple(a[0] for a in tap)), tuple(a[1] for a in tap))
        for tap in itertools.product(*axes)
    )
    halo = []
    stored = [[0, 0, 0] for _ in used]
    for axis in range(3):
        shifts = [shift[axis] for _, shift in taps]
        before, behind = max(0, -min(shifts)), max(0, max(shifts))
        need = behind
        for i, phase in enumerate(used):
            pixels = max(0, -(-(size[axis] - phase[axis]) // stride[axis]))
            stored[i][axis] = min(pixels, out[axis] + behind)
            need = max(need, stored[i][axis] - out[axis] + before, before)
        halo.append(need)
    return Views(
        out,
        tuple(used),  # type: ignore[arg-type]
        taps,  # type: ignore[arg-type]
        tuple(halo),  # type: ignore[arg-type]
        tuple(tuple(s) for s in stored),  # type: ignore[misc]
    )
