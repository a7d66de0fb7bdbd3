"""Kept weights packed for the sparse kernels, and the calls of those kernels on buffers."""

from __future__ import annotations

import copy
import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native
from fastpie.ops.positions import Buffer, Positions, Views, dtype_code, tiles_of

__all__ = [
    "ACTIVATIONS",
    "PackedConv",
    "PackedInputGradient",
    "PackedWeights",
    "from_positions",
    "to_positions",
]

ACTIVATIONS = {
    name: code
    for code, name in enumerate(
        ("none", "relu", "relu6", "leaky_relu", "hardswish", "silu", "gelu")
    )
}

_L1_BYTES = 24 * 1024  # of 32 KiB: the rest is for the weights and the sums
_NO_ACTIVATIONS = (0, 0, 0)

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous CPU tensors hold the same bits; 30 times as fast as torch.equal."""
    return (
        a.shape == b.shape
        and a.dtype is b.dtype
        and _memcmp(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size()) == 0
    )


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
        self._bf16 = bf16
        self._chunks = chunks
        self._refilled: tuple[Tensor, PackedWeights] | None = None
        self._strided: tuple[tuple[torch.Size, tuple[int, ...]], Tensor] | None = None

    @property
    def handle(self) -> tuple[int, int, int, int, int]:
        """What the native kernels take; valid as long as this object lives."""
        return (
            self.entries.data_ptr(),
            self.rows.data_ptr(),
            self.chunk_channels.data_ptr(),
            self._chunks,
            self.blocks,
        )

    def refilled(self, weight: Tensor) -> PackedWeights:
        """The same kept places with the values of `weight` (any dtype); needs `with_order`.

        The values are read in every call and compared with those of the last one, whose result is
        given again where they are the same bits. The places are shared and nothing is changed in
        place: another thread may be using it. `row_scale` is not applied.
        """
        if weight.is_contiguous():
            values = weight.view(-1).index_select(0, self.order)
        else:  # read where it lies, channels_last for example: no copy
            span = 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
            values = weight.as_strided((span,), (1,)).index_select(0, self._strided_order(weight))
        last = self._refilled  # read once: another thread may replace it
        if last is not None and same_bits(values, last[0]):
            return last[1]
        other = copy.copy(self)
        other._refilled = None
        other.entries = self.entries.clone()
        other.entries.view(torch.float32)[:, 0] = values.bfloat16() if self._bf16 else values
        self._refilled = (values, other)
        return other

    def _strided_order(self, weight: Tensor) -> Tensor:
        """`order` as places in the memory of a weight that is not contiguous."""
        known = self._strided
        if known is not None and known[0] == (weight.shape, weight.stride()):
            return known[1]
        rest, places = self.order, torch.zeros_like(self.order)
        for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
            places += rest % size * stride
            rest = rest // size
        self._strided = ((weight.shape, weight.stride()), places)
        return places


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
        with_order: whether `weights.order` is kept, which `refilled` needs; 8 bytes for each kept
            weight more.
        reading: how the weight is walked through; None: as a convolution.
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
        reading: _Reading | None = None,
    ) -> None:
        """Pack the weights."""
        out_channels, channels = weight.shape[:2]
        taps = weight[0, 0].numel()
        if reading is None:
            reading = _Reading(
                (groups, out_channels // groups, channels, taps),
                (out_channels // groups * channels * taps, channels * taps, taps),
                torch.arange(taps),
                torch.tensor(views.tap_offsets(positions), dtype=torch.int64),
                len(views.phases) * positions.plane if input_plane is None else input_plane,
            )
        _, _, channels, taps = reading.sizes
        bf16 = positions.dtype == torch.bfloat16
        self.positions = positions
        self.views = views
        self.bias = bias
        self.lines = lines or (8 if taps == 1 else 12)
        if bf16:
            block_channels = None
        elif block_channels is None:
            block_channels = default_block(keep, taps, self.lines, views, positions, channels)
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

    def refilled(self, weight: Tensor, bias: Tensor | None = None) -> PackedConv:
        """This convolution with other values at the same kept places; needs `with_order`."""
        other = copy.copy(self)
        other.weights = self.weights.refilled(weight)
        other.bias = bias
        return other

    def add_weight_gradient(
        self,
        input: Buffer,  # fp32, what `run` takes
        output_gradient: Buffer,  # fp32, geometry `positions`, zero in lanes without an image
        images: int,
        sums: Tensor,  # fp32 [kept], added to; in the order of `weights.order`
    ) -> None:
        """Add the gradient of each kept weight over these images; needs one block."""
        _native.call(
            _C.masked_conv_weight_gradient_cpu,
            self.weights.handle,
            input.handle,
            output_gradient.handle,
            self._tiles.handle,
            self.positions.groups(images),
            sums.data_ptr(),
            torch.get_num_threads(),
        )

    def run(
        self,
        input: Buffer,
        output: Buffer,
        images: int,
        *,
        residual: Buffer | None = None,
        activation: str = "none",
        slope: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        """Compute `output` for the first `images` images; the buffers must not overlap.

        With `chunk` the output channels of that chunk alone: they are the channels of `output`, and
        there is no residual.
        """
        weights, bias, source, target, *rest, kind, slope = self.layer(
            input, output, residual=residual, activation=activation, slope=slope
        )
        if chunk is not None:
            entries, rows, chunk_channels, _, blocks = weights
            weights = (entries, rows, chunk_channels + 8 * chunk, 1, blocks)
            address, group, plane = target
            before = int(self.weights.chunk_channels[chunk]) * plane
            target = (address - before * self.positions.dtype.itemsize, group, plane)
        _native.call(
            _C.masked_conv_cpu,
            weights,
            bias,
            source,
            target,
            *rest,
            self._tiles.handle,
            dtype_code(self.positions.dtype),
            self.positions.groups(images),
            kind,
            slope,
            torch.get_num_threads(),
        )

    def layer(
        self,
        input: Buffer,
        output: Buffer,
        *,
        residual: Buffer | None = None,
        activation: str = "none",
        slope: float = 0.0,
    ) -> tuple[Any, ...]:
        """This convolution on these buffers, for `run_chain`."""
        return (
            self.weights.handle,
            0 if self.bias is None else self.bias.data_ptr(),
            input.handle,
            output.handle,
            _NO_ACTIVATIONS if residual is None else residual.handle,
            ACTIVATIONS[activation],
            slope,
        )

    def reach(self, lines: int) -> tuple[int, int]:
        """How many tiles of `lines` lines the views reach behind and ahead of their own."""
        shifts = [self.positions.offset(*shift) for _, shift in self.views.taps]
        least = self.positions.line * min(
            count for _, count in tiles_of(self.positions, lines).tiles()
        )
        return -(min(0, *shifts, 0) // least), -(-max(0, *shifts, 0) // least)


class PackedInputGradient:
    """The gradient of the input of a masked convolution, itself a sum of shifted views.

    The stride takes the input apart into phases, and the gradient of each phase is a masked
    convolution of the output gradient with the transposed weights of the taps that read it::

        gradient[s * j + r] = sum over the taps k with (r + padding - k * dilation) % s == 0 of
                              weight[k]^T output_gradient[j + (r + padding - k * dilation) / s]

    Args:
        weight: fp32 [K, C / groups, kd, kh, kw].
        keep: bool of the same shape, True = kept.
        size: (D, H, W) of the input.
        output_size: (D, H, W) of the output gradient.
        stride: of the convolution, as the next three.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
        images: images interleaved.
        dtype: of the positions.
        chunks: cuts of the input channels, for threads where there are few tiles.

    Attributes:
        positions: geometry of the output gradient.
        views: the pixels of it that are read, for `to_positions`.
        phases: ((rz, ry, rx), the convolution that computes this phase) for each one that some tap
            reads; the gradient of the others is zero.
    """

    def __init__(
        self,
        weight: Tensor,
        keep: Tensor,
        size: tuple[int, int, int],
        output_size: tuple[int, int, int],
        stride: tuple[int, int, int],
        padding: tuple[int, int, int],
        dilation: tuple[int, int, int],
        groups: int,
        images: int,
        dtype: torch.dtype,
        chunks: int = 1,
    ) -> None:
        """Pack the weights of each phase."""
        out_channels, channels, *kernel = weight.shape
        taps = weight[0, 0].numel()
        self._stride = stride
        axes = [
            _gradient_axis(*axis)
            for axis in zip(size, output_size, kernel, stride, padding, dilation, strict=True)
        ]

        def positions_of(pixels: tuple[int, ...]) -> Positions:
            halo = tuple(axis.pitch - n for axis, n in zip(axes, pixels, strict=True))
            return Positions(pixels, halo, images, dtype)  # type: ignore[arg-type]

        stored: tuple[int, int, int] = tuple(axis.stored for axis in axes)  # type: ignore[assignment]
        self.positions = positions_of(stored)
        self.views = Views(stored, ((0, 0, 0),), (), self.positions.halo, (stored,))
        self.phases: list[tuple[tuple[int, int, int], PackedConv]] = []
        for phase in itertools.product(*(range(len(axis.taps)) for axis in axes)):
            reads = [axis.taps[r] for axis, r in zip(axes, phase, strict=True)]
            used = list(itertools.product(*reads))
            if not used:
                continue
            pixels = tuple(-(-(n - r) // s) for n, r, s in zip(size, phase, stride, strict=True))
            shifts = tuple((0, tuple(shift for _, shift in tap)) for tap in used)
            views = Views(pixels, ((0, 0, 0),), shifts, (0, 0, 0), (stored,))  # type: ignore[arg-type]
            index = [(z * kernel[1] + y) * kernel[2] + x for (z, _), (y, _), (x, _) in used]
            reading = _Reading(
                (groups, channels, out_channels // groups, len(used)),
                (out_channels // groups * channels * taps, taps, channels * taps),
                torch.tensor(index, dtype=torch.int64),
                torch.tensor(views.tap_offsets(self.positions), dtype=torch.int64),
                self.positions.plane,
            )
            conv = PackedConv(
                weight,
                keep,
                views,
                positions_of(pixels),
                chunks=chunks,
                with_order=True,
                reading=reading,
            )
            self.phases.append((phase, conv))  # type: ignore[arg-type]

    def refilled(self, weight: Tensor) -> PackedInputGradient:
        """The same with other values at the same kept places."""
        other = copy.copy(self)
        other.phases = [(phase, conv.refilled(weight)) for phase, conv in self.phases]
        return other

    def run(
        self, output_gradient: Buffer, gradient: Tensor, memory: Buffer | None = None
    ) -> Buffer | None:
        """Write the phases that some tap reads into `gradient` [N, C, D, H, W], any strides.

        Returns:
            The memory that was used, for another call with no more images.
        """
        images, channels = gradient.shape[:2]
        for phase, conv in self.phases:
            memory = Buffer(conv.positions, channels, images, within=memory)
            conv.run(output_gradient, memory, images)
            z, y, x = (slice(r, None, s) for r, s in zip(phase, self._stride, strict=True))
            from_positions(memory, gradient[:, :, z, y, x])
        return memory


@dataclass(frozen=True)
class _GradientAxis:
    """One axis of PackedInputGradient."""

    pitch: int  # pixels and zeros
    stored: int  # pixels of the output gradient that are read
    taps: tuple[tuple[tuple[int, int], ...], ...]  # for each phase (tap, shift)


def _gradient_axis(
    size: int, output_size: int, kernel: int, stride: int, padding: int, dilation: int
) -> _GradientAxis:
    taps = tuple(
        tuple(
            (k, (r + padding - k * dilation) // stride)
            for k in range(kernel)
            if (r + padding - k * dilation) % stride == 0
        )
        for r in range(min(stride, size))
    )
    shifts = [shift for phase in taps for _, shift in phase]
    before, behind = max(0, -min(shifts, default=0)), max(0, max(shifts, default=0))
    pixels = -(-size // stride)
    stored = min(output_size, pixels + behind)
    return _GradientAxis(max(pixels + behind, stored + before), stored, taps)


def run_chain(
    layers: list[tuple[Any, ...]], lags: list[int], positions: Positions, lines: int, images: int
) -> None:
    """Compute several convolutions of one geometry, tile by tile; see MaskedConvChainArgs.

    Args:
        layers: of `PackedConv.layer`, each packed in one chunk.
        lags: in tiles.
        positions: the geometry.
        lines: of a tile.
        images: how many.
    """
    _native.call(
        _C.masked_conv_chain_cpu,
        layers,
        lags,
        tiles_of(positions, lines).handle,
        dtype_code(positions.dtype),
        positions.groups(images),
        torch.get_num_threads(),
    )


def default_block(
    keep: Tensor,
    taps: int,
    lines: int,
    views: Views,
    positions: Positions,
    channels: int | None = None,
) -> int | None:
    """Input channels whose part of a tile fits the L1 cache, or None for all of them.

    At least ten kept weights for each output channel: below that, loading and storing the partial
    sums costs more than the cache saves (measured at .9 sparsity on Zen 4).
    """
    channels = keep.shape[1] if channels is None else channels
    footprint = 0  # bytes of a channel that a tile reads
    for index in range(len(views.phases)):
        shifts = [positions.offset(*shift) for phase, shift in views.taps if phase == index]
        spread = -(-(max(shifts) - min(shifts)) // positions.line)
        # Views further apart than a tile touch lines of their own: at most `lines` for each tap.
        footprint += min(lines + spread, lines * len(shifts)) * 64
    density = max(keep.float().mean().item(), 1e-6)
    block = max(_L1_BYTES // footprint, round(10 / (density * taps)), 1)
    blocks = round(channels / block)
    return None if blocks <= 1 else -(-channels // blocks)


def to_positions(
    x: Tensor | Buffer,  # [N, C, D, H, W] fp32 or bf16, any strides
    buffer: Buffer,  # C * phases channels
    views: Views,
    stride: tuple[int, int, int],
    *,
    images: int | None = None,
    scale: Tensor | None = None,  # fp32 [C]
    shift: Tensor | None = None,  # fp32 [C]
    activation: str = "none",
    slope: float = 0.0,
) -> None:
    """Write activations into positions, taken apart into the phases of a stride.

    The halo of `buffer` is not written. Where `scale` or `shift` are given, each value becomes
    ``activation(scale * x + shift)`` on the way.

    Args:
        x: a tensor, or a buffer whose groups have one image or as many as those of `buffer`.
        buffer: the destination.
        views: the convolution that will read it.
        stride: of that convolution.
        images: how many images; those of the tensor by default.
        scale: factor of each channel, or None.
        shift: summand of each channel, or None.
        activation: a key of ACTIVATIONS.
        slope: of "leaky_relu".
    """
    p = buffer.positions
    channels = buffer.channels // len(views.phases)
    count = images if isinstance(x, Buffer) else x.shape[0]
    assert count is not None
    address, dtype, source_strides = _source(x, p.images)
    item = dtype.itemsize
    _, _, *across, _ = source_strides
    for run in _phase_runs(views, stride[2]):
        z, y, x_first = views.phases[run.index]
        origin = z * across[0] + y * across[1] + (x_first + run.column * stride[2]) * across[2]
        strided = tuple(n * s for n, s in zip(stride, across, strict=True))
        target = run.index * p.plane + run.column * p.pitches[2]
        for group, groups, lanes in _whole_groups(count, p.images):
            _native.call(
                _C.relayout_cpu,
                address + (origin + group * source_strides[0]) * item,
                dtype_code(dtype),
                (*source_strides[:2], across[2], *strided, source_strides[5]),
                buffer.handle[0] + (target + group * buffer.handle[1]) * p.dtype.itemsize,
                dtype_code(p.dtype),
                (buffer.handle[1], len(views.phases) * p.plane, p.plane, *p.pitches, 1),
                (groups, channels, run.phases, *run.pixels, lanes),
                0 if scale is None else scale.data_ptr(),
                0 if shift is None else shift.data_ptr(),
                ACTIVATIONS[activation],
                slope,
                torch.get_num_threads(),
            )


@dataclass(frozen=True)
class _PhaseRun:
    """Phases that lie side by side in the input, copied at once."""

    index: int  # of the first phase
    phases: int
    column: int  # the first
    pixels: tuple[int, int, int]


def _phase_runs(views: Views, stride: int) -> list[_PhaseRun]:
    """Both phases of a row with stride 2 at once: each line of the input is then read once."""
    runs = []
    for index, (phase, (z, y, x)) in enumerate(zip(views.phases, views.stored, strict=True)):
        first, second = index, index + 1
        if phase[2] == 1:
            first, second = index - 1, index
        pair = stride == 2 and (*phase[:2], 0) in views.phases and (*phase[:2], 1) in views.phases
        if not pair:
            runs.append(_PhaseRun(index, 1, 0, (z, y, x)))
            continue
        common = min(views.stored[first][2], views.stored[second][2])
        if index == first:
            runs.append(_PhaseRun(index, 2, 0, (z, y, common)))
        if x > common:
            runs.append(_PhaseRun(index, 1, common, (z, y, x - common)))
    return runs


def from_positions(buffer: Buffer, y: Tensor) -> None:  # y: [N, C, D, H, W] fp32 or bf16
    """Read the pixels of a buffer into a tensor of any strides."""
    p = buffer.positions
    address, dtype, strides = _source(y, p.images)
    for group, groups, lanes in _whole_groups(y.shape[0], p.images):
        _native.call(
            _C.relayout_cpu,
            buffer.handle[0] + group * buffer.handle[1] * p.dtype.itemsize,
            dtype_code(p.dtype),
            (buffer.handle[1], p.plane, 0, *p.pitches, 1),
            address + group * strides[0] * dtype.itemsize,
            dtype_code(dtype),
            (*strides[:2], 0, *strides[2:]),
            (groups, y.shape[1], 1, *p.size, lanes),
            0,
            0,
            0,
            0.0,
            torch.get_num_threads(),
        )


def _source(x: Tensor | Buffer, images: int) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """Address, dtype and the strides of (group of `images` images, C, D, H, W, image)."""
    if isinstance(x, Tensor):
        n, *rest = x.stride()
        return x.data_ptr(), x.dtype, (images * n, *rest, n)
    p = x.positions
    if p.images not in (1, images):
        raise FastpieError(
            f"Expected a buffer with 1 or {images} images in a group, but got {p.images}."
        )
    group = x.handle[1]
    across = (group, 1) if p.images == images else (images * group, group)
    return x.handle[0], p.dtype, (across[0], p.plane, *p.pitches, across[1])


def _whole_groups(images: int, per_group: int) -> list[tuple[int, int, int]]:
    """(first group, groups, images of each) of the full groups and of the one that is not."""
    full, rest = divmod(images, per_group)
    parts = [(0, full, per_group)] if full else []
    return parts + ([(full, 1, rest)] if rest else [])


def check_size(positions: Positions, channels: int) -> None:
    """Offsets are 32 bits: one group of images must have fewer than 2^31 elements."""
    if channels * positions.plane >= 2**31:
        raise FastpieError(
            f"Expected a group of images to have fewer than 2^31 elements, but {channels} channels "
            f"of {positions.size} pixels have {channels * positions.plane}."
        )
