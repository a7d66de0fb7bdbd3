"""Kept weights packed for the sparse kernels, and the calls of those kernels on buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native
from fastpie.ops.positions import Buffer, Positions, Views, dtype_code, tiles_of

__all__ = ["ACTIVATIONS", "PackedConv", "PackedWeights", "from_positions", "to_positions"]

ACTIVATIONS = {
    name: code
    for code, name in enumerate(
        ("none", "relu", "relu6", "leaky_relu", "hardswish", "silu", "gelu")
    )
}

_L1_BYTES = 24 * 1024  # of 32 KiB: the rest is for the weights and the sums
_NO_ACTIVATIONS = (0, 0, 0)


@dataclass(frozen=True)
class _Reading:
    """How the packing walks through a weight tensor."""

    sizes: tuple[int, int, int, int]  # groups, rows, channels, taps
    strides: tuple[int, int, int]  # of group, row, channel, in elements of the weight
    tap_index: Tensor  # int64 [taps]
    tap_offset: Tensor  # int64 [taps]
    plane: int


class PackedWeights:
    """Kept weights as {value, offset} in the order in which a kernel uses them.

    8 bytes for each kept weight and 16 for each output channel and block of input channels.

    Attributes:
        entries: int32 [kept, 2].
        order: int64 [kept], the flat index of each in the weight, where asked for.
        blocks: blocks of input channels.
    """

    def __init__(
        self,
        weight: Tensor,  # fp32 contiguous
        keep: Tensor,  # bool contiguous, same shape
        reading: _Reading,
        *,
        row_scale: Tensor | None = None,  # fp32 [rows of all groups]
        chunks: int = 1,
        block_channels: int | None = None,
        bf16: bool = False,
        with_order: bool = False,
    ) -> None:
        """Pack; see csrc/include/fastpie/masked_conv.h."""
        groups, rows, channels, _ = reading.sizes
        total = groups * rows
        chunks = max(1, min(chunks, total))
        self.chunk_channels = torch.tensor(
            [total * i // chunks for i in range(chunks + 1)], dtype=torch.int64
        )
        args = (
            weight.data_ptr(),
            keep.data_ptr(),
            0 if row_scale is None else row_scale.data_ptr(),
            reading.sizes,
            reading.strides,
            reading.tap_index.data_ptr(),
            reading.tap_offset.data_ptr(),
            reading.plane,
            max(1, channels if block_channels is None else block_channels),
            self.chunk_channels.data_ptr(),
            chunks,
            bf16,
        )
        count, self.blocks = _C.count_masked_conv(*args)
        self.entries = torch.empty((count, 2), dtype=torch.int32)
        self.rows = torch.empty((total * self.blocks, 2), dtype=torch.int64)
        self.order = torch.empty(count if with_order else 0, dtype=torch.int64)
        _native.call(
            _C.pack_masked_conv,
            self.entries.data_ptr(),
            self.rows.data_ptr(),
            self.order.data_ptr() if with_order else 0,
            *args,
        )
        self.handle = (
            self.entries.data_ptr(),
            self.rows.data_ptr(),
            self.chunk_channels.data_ptr(),
            chunks,
            self.blocks,
        )


class PackedConv:
    """A masked convolution (or linear layer) for one geometry.

    Args:
        weight: fp32 [K, C / groups, kd, kh, kw].
        keep: bool of the same shape, True = kept.
        views: the convolution as shifted views.
        positions: geometry of the output; the input has its pitches.
        groups: as in torch.nn.functional.conv2d.
        bias: fp32 [K] or None.
        row_scale: fp32 [K] factor of each output channel (a folded BatchNorm), or None.
        lines: lines of a tile; None: a default that suits the shape.
        block_channels: input channels of a block; None: as many as fit the L1 cache; fp32 only.
        chunks: cuts of the output channels, for threads where there are few tiles.
        input_plane: elements from one channel of the input to the next; None: as in the output
            geometry, one plane for each phase.
    """

    def __init__(
        self,
        weight: Tensor,
        keep: Tensor,
        views: Views,
        positions: Positions,
        *,
        groups: int = 1,
        bias: Tensor | None = None,
        row_scale: Tensor | None = None,
        lines: int | None = None,
        block_channels: int | None = None,
        chunks: int = 1,
        input_plane: int | None = None,
        with_order: bool = False,
    ) -> None:
        """Pack the weights."""
        out_channels, channels = weight.shape[:2]
        taps = weight[0, 0].numel()
        bf16 = positions.dtype == torch.bfloat16
        self.positions = positions
        self.views = views
        self.bias = bias
        self.lines = lines or (8 if taps == 1 else 12)
        if bf16:
            block_channels = None
        elif block_channels is None:
            block_channels = default_block(keep, taps, self.lines, views, positions)
        reading = _Reading(
            (groups, out_channels // groups, channels, taps),
            (out_channels // groups * channels * taps, channels * taps, taps),
            torch.arange(taps),
            torch.tensor(views.tap_offsets(positions), dtype=torch.int64),
            len(views.phases) * positions.plane if input_plane is None else input_plane,
        )
        self.weights = PackedWeights(
            weight,
            keep,
            reading,
            row_scale=row_scale,
            chunks=chunks,
            block_channels=block_channels,
            bf16=bf16,
            with_order=with_order,
        )
        self._tiles = tiles_of(positions, self.lines)

    def run(
        self,
        input: Buffer,
        output: Buffer,
        images: int,
        *,
        residual: Buffer | None = None,
        activation: str = "none",
        slope: float = 0.0,
    ) -> None:
        """Compute `output` for the first `images` images; the buffers must not overlap."""
        _native.call(
            _C.masked_conv_cpu,
            self.weights.handle,
            0 if self.bias is None else self.bias.data_ptr(),
            input.handle,
            output.handle,
            _NO_ACTIVATIONS if residual is None else residual.handle,
            self._tiles.handle,
            dtype_code(self.positions.dtype),
            self.positions.groups(images),
            ACTIVATIONS[activation],
            slope,
            torch.get_num_threads(),
        )


def default_block(
    keep: Tensor, taps: int, lines: int, views: Views, positions: Positions
) -> int | None:
    """Input channels whose part of a tile fits the L1 cache, or None for all of them.

    At least six kept weights for each output channel: below that, loading and storing the partial
    sums costs more than the cache saves (measured at .9 sparsity on Zen 4).
    """
    channels = keep.shape[1]
    shifts = [positions.offset(*shift) for _, shift in views.taps]
    spread = -(-(max(shifts) - min(shifts)) // positions.line)
    # Views further apart than a tile touch lines of their own: at most `lines` for each tap.
    footprint = min(lines + spread, lines * taps) * 64
    density = max(keep.float().mean().item(), 1e-6)
    block = max(_L1_BYTES // footprint, round(6 / (density * taps)), 1)
    blocks = round(channels / block)
    return None if blocks <= 1 else -(-channels // blocks)


def to_positions(
    x: Tensor,  # [N, C, D, H, W] fp32 or bf16, any strides
    buffer: Buffer,  # channels: C * phases
    views: Views,
    stride: tuple[int, int, int],
    *,
    scale: Tensor | None = None,  # fp32 [C]
    shift: Tensor | None = None,  # fp32 [C]
    activation: str = "none",
    slope: float = 0.0,
) -> None:
    """Write a tensor into positions, taken apart into the phases of a stride.

    The halo of `buffer` is not written. Where `scale` or `shift` are given, each value becomes
    ``activation(scale * x + shift)`` on the way.
    """
    p = buffer.positions
    phases = len(views.phases)
    channels = x.shape[1]
    s_n, s_c, s_z, s_y, s_x = x.stride()
    item = x.element_size()
    into = p.dtype.itemsize
    for index, phase in enumerate(views.phases):
        stored = views.stored[index]
        source = phase[0] * s_z + phase[1] * s_y + phase[2] * s_x
        for first, count, images in _whole_groups(x.shape[0], p.images):
            _native.call(
                _C.relayout_cpu,
                x.data_ptr() + (source + first * s_n) * item,
                dtype_code(x.dtype),
                (p.images * s_n, s_c, stride[0] * s_z, stride[1] * s_y, stride[2] * s_x, s_n),
                buffer.handle[0] + (index * p.plane + first // p.images * buffer.handle[1]) * into,
                dtype_code(p.dtype),
                (buffer.handle[1], phases * p.plane, *p.pitches, 1),
                (count, channels, *stored, images),
                0 if scale is None else scale.data_ptr(),
                0 if shift is None else shift.data_ptr(),
                ACTIVATIONS[activation],
                slope,
                torch.get_num_threads(),
            )


def from_positions(buffer: Buffer, y: Tensor) -> None:  # y: [N, C, D, H, W] fp32 or bf16
    """Read the pixels of a buffer into a tensor of any strides."""
    p = buffer.positions
    s_n, s_c, s_z, s_y, s_x = y.stride()
    for first, count, images in _whole_groups(y.shape[0], p.images):
        _native.call(
            _C.relayout_cpu,
            buffer.handle[0] + first // p.images * buffer.handle[1] * p.dtype.itemsize,
            dtype_code(p.dtype),
            (buffer.handle[1], p.plane, *p.pitches, 1),
            y.data_ptr() + first * s_n * y.element_size(),
            dtype_code(y.dtype),
            (p.images * s_n, s_c, s_z, s_y, s_x, s_n),
            (count, y.shape[1], *p.size, images),
            0,
            0,
            0,
            0.0,
            torch.get_num_threads(),
        )


def _whole_groups(images: int, per_group: int) -> list[tuple[int, int, int]]:
    """(first image, groups, images of each) of the full groups and of the one that is not."""
    full = images // per_group
    parts = [(0, full, per_group)] if full else []
    if images % per_group:
        parts.append((full * per_group, 1, images % per_group))
    return parts


def check_size(positions: Positions, channels: int) -> None:
    """Offsets are 32 bits: one group of images must have fewer than 2^31 elements."""
    if channels * positions.plane >= 2**31:
        raise FastpieError(
            f"Expected a group of images to have fewer than 2^31 elements, but {channels} channels "
            f"of {positions.size} pixels have {channels * positions.plane}."
        )
