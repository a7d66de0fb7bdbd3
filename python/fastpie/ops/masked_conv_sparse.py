"""The sparse kernels behind `masked_conv`: which calls they take, and their packed weights.

Packing depends on the mask and the geometry alone and is kept for each mask. The *values* of the
kept weights are read and compared in every call, because nothing tells reliably that they changed:
``weight.data.add_()`` leaves the version counter, the address and the object as they were. The mask is
compared with a copy, byte by byte.

Images go through in slices whose activations fit the cache; the memory of a slice serves the next.
"""

from __future__ import annotations

import collections
import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastpie.ops.packing import (
    PackedConv,
    PackedInputGradient,
    from_positions,
    same_bits,
    to_positions,
)
from fastpie.ops.positions import Buffer, Positions, Views, views_of

Triple = tuple[int, int, int]
T = TypeVar("T")

_GEOMETRIES = 16
"""Packed geometries that one mask keeps: sizes of images, last batches, the backward kernels."""

FORWARD_DENSITY = 0.35
"""Density at which the sparse kernels take as long as oneDNN, for the output and for the gradient of
the input (KERNELS.md; 3x3 layers of ResNet-50 .4 to .5, 1x1 layers .3 to .4)."""

WEIGHT_GRADIENT_DENSITY = {torch.float32: 0.12, torch.bfloat16: 0.06}
"""The same for the gradient of the weight, whose kernel reads two activations for each multiply-add.
In bf16 torch multiplies bf16 and we fp32."""

_CALL = 5e6
"""80 us for a call."""

_MOVE = 12
""".4 ns for each element of the input and of the output."""

_PRODUCT = 40
"""1 ns for each element of ``weight * mask``."""

_SLICE_BYTES = 2 * 2**20
"""Activations that one thread works on at a time: they stay in its L2 cache and near it. 1 to 4 MiB
make no difference, 8 MiB cost 10 %, 16 MiB 30 % (1x1, 256 to 64 channels at 56x56, Zen 4)."""

_SMALL_MAP = 400
"""Pixels up to which the images of a batch are interleaved."""

_LINEAR_LINES = 8
"""Cache lines of images that a linear layer interleaves: the sums of so many are independent."""

_TAPS = 4096
"""Filter taps of a call at most: their list is made in Python."""

_MASKS = 1024
"""Masks whose packed weights are kept: more than any network has layers."""


class KnownMask:
    """A mask as it was when its weights were packed.

    Attributes:
        kept: number of True.
        numel: number of weights.
    """

    def __init__(self, mask: Tensor) -> None:  # bool
        """Copy the mask."""
        self._bytes = _as_it_lies(mask).clone()
        self._keep = self._bytes if mask.is_contiguous() else mask.contiguous()
        self.kept = int(mask.sum())
        self.numel = mask.numel()
        self._packed: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def density(self) -> float:
        """Fraction of kept weights."""
        return self.kept / max(1, self.numel)

    def equals(self, mask: Tensor) -> bool:  # bool, same shape and strides
        """Whether the mask is still the same."""
        return same_bits(self._bytes, _as_it_lies(mask))

    def packed(self, key: Hashable, pack: Callable[[Tensor], T]) -> T:
        """What `pack(mask)` made for this geometry, now or before."""
        with self._lock:
            if key in self._packed:
                self._packed.move_to_end(key)
                return self._packed[key]  # type: ignore[no-any-return]
            made = pack(self._keep)
            self._packed[key] = made
            if len(self._packed) > _GEOMETRIES:
                self._packed.popitem(last=False)
            return made


def _as_it_lies(mask: Tensor) -> Tensor:
    """The mask as a contiguous tensor of any order of dimensions, a copy only where it must be."""
    if mask.ndim in (4, 5) and not mask.is_contiguous():
        mask = mask.movedim(1, -1)  # channels_last
    return mask.contiguous()


_known: collections.OrderedDict[Any, tuple[weakref.ref[Any], KnownMask]] = collections.OrderedDict()
_lock = threading.RLock()  # reentrant: a mask may be freed, and so forgotten, inside of it


def _begin_anew() -> None:
    """In a forked process: another thread may have held a lock."""
    global _lock
    _lock = threading.RLock()
    _known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def known_mask(mask: Tensor) -> KnownMask:  # bool, CPU
    """The mask and what was packed for it, kept as long as the mask's memory lives.

    The key (address, shape, strides) only finds a candidate; its content decides.
    """
    key = (mask.data_ptr(), tuple(mask.shape), mask.stride())
    with _lock:
        found = _known.get(key)
    if found is not None and found[1].equals(mask):
        return found[1]
    known = KnownMask(mask)

    def forget(reference: weakref.ref[Any]) -> None:
        with _lock:
            if key in _known and _known[key][0] is reference:
                del _known[key]

    with _lock:
        _known[key] = (weakref.ref(mask.untyped_storage(), forget), known)
        _known.move_to_end(key)
        if len(_known) > _MASKS:
            _known.popitem(last=False)
    return known


def interleaved_images(images: int, size: Triple, dtype: torch.dtype) -> int:
    """Images whose pixels lie side by side: one for large maps, for small ones about 16 (32)."""
    pixels = size[0] * size[1] * size[2]
    line = 64 // dtype.itemsize
    most = _LINEAR_LINES * line if pixels == 1 else line if pixels <= _SMALL_MAP else 1
    groups = -(-images // most)
    return -(-images // groups)


def _slices(images: int, positions: Positions, planes: int) -> list[slice]:
    """Runs of whole groups of images whose planes take _SLICE_BYTES."""
    groups = max(
        1,
        _SLICE_BYTES
        * torch.get_num_threads()
        // (planes * positions.plane * positions.dtype.itemsize),
    )
    step = groups * positions.images
    return [slice(first, min(first + step, images)) for first in range(0, images, step)]


def _chunks(images: int, positions: Positions, channels: int) -> int:
    """Cuts of the channels, so that each thread has four shares of the work at least."""
    threads = torch.get_num_threads()
    tiles = max(1, positions.groups(images) * positions.plane // (12 * positions.line))
    return 1 if threads == 1 else max(1, min(channels, -(-4 * threads // tiles)))


@dataclass(frozen=True)
class Geometry:
    """A convolution's numbers but for the batch and the channels.

    Attributes:
        size: (D, H, W) of the input, as the following.
        kernel: of the filter.
        stride: see torch.nn.functional.conv3d, as the following.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
    """

    size: Triple
    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int

    @property
    def views(self) -> Views:
        """The convolution as shifted views."""
        return views_of(self.size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def output_size(self) -> Triple:
        """(D, H, W) of the output; below 1 where the filter does not fit."""
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(  # type: ignore[return-value]
            (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes
        )


def is_possible(geometry: Geometry, images: int, channels: int) -> bool:
    """Whether the kernels can compute a convolution of `channels` channels at most."""
    taps = math.prod(geometry.kernel)
    if taps > _TAPS:
        return False
    lanes = interleaved_images(images, geometry.output_size, torch.bfloat16)
    # An upper bound of the plane of either direction, all phases together.
    axes = zip(geometry.size, geometry.kernel, geometry.padding, geometry.dilation, strict=True)
    plane = math.prod(n + 2 * p + 2 * d * k for n, k, p, d in axes) * lanes
    return channels * plane < 2**31


def is_worth(
    geometry: Geometry,
    images: int,
    in_channels: int,
    out_channels: int,
    density: float,
    highest: float,
    reads_weight: bool = True,
) -> bool:
    """Whether the sparse kernel is expected to be the faster one.

    The time that it saves must pay for the call and for bringing the activations into positions
    and back. All in multiply-adds of torch's convolution (.02 ns), measured on one core of Zen 4
    with AVX-512: shapes and density decide, so that the same call always takes the same path.

    Args:
        geometry: of the convolution.
        images: batch.
        in_channels: of the input.
        out_channels: of the output.
        density: fraction of kept weights.
        highest: density at which both are equally fast.
        reads_weight: whether the alternative has to form `weight * mask`.
    """
    pixels, input_pixels = math.prod(geometry.output_size), math.prod(geometry.size)
    weights = out_channels * (in_channels // geometry.groups) * math.prod(geometry.kernel)
    dense = images * pixels * weights + (_PRODUCT * weights if reads_weight else 0)
    moved = images * (input_pixels * in_channels + pixels * out_channels)
    return density < highest and dense * (1 - density / highest) >= _CALL + _MOVE * moved


def forward(
    geometry: Geometry,
    input: Tensor,  # [N, C, D, H, W]
    weight: Tensor,  # [K, C / groups, kd, kh, kw]
    mask: KnownMask,
    bias: Tensor | None,  # [K]
    output: Tensor,  # [N, K, D', H', W'], any strides; written
) -> None:
    """Compute masked_conv."""
    images, out_channels = output.shape[:2]
    views = geometry.views
    lanes = interleaved_images(images, views.size, input.dtype)
    positions = Positions(views.size, views.halo, lanes, input.dtype)
    planes = input.shape[1] * len(views.phases)
    slices = _slices(images, positions, planes + out_channels)
    chunks = _chunks(slices[0].stop, positions, out_channels)

    def pack(keep: Tensor) -> PackedConv:
        keep = keep.view(weight.shape)
        return PackedConv(
            torch.zeros(weight.shape),
            keep,
            views,
            positions,
            groups=geometry.groups,
            chunks=chunks,
            with_order=True,
        )

    key = ("forward", geometry, lanes, input.dtype, chunks)
    conv = mask.packed(key, pack).refilled(weight, None if bias is None else bias.float())
    source = target = None
    for part in slices:
        x, y = input[part], output[part]
        source = Buffer(positions, planes, x.shape[0], within=source)
        target = Buffer(positions, out_channels, x.shape[0], within=target)
        to_positions(x, source, views, geometry.stride)
        conv.run(source, target, x.shape[0])
        from_positions(target, y)


def input_gradient(
    geometry: Geometry,
    output_gradient: Tensor,  # [N, K, D', H', W']
    weight: Tensor,  # [K, C / groups, kd, kh, kw]
    mask: KnownMask,
    gradient: Tensor,  # [N, C, D, H, W], any strides, zero; written
) -> None:
    """Compute the gradient of the input."""
    images, channels = gradient.shape[:2]
    dtype = output_gradient.dtype
    views = geometry.views
    lanes = interleaved_images(images, views.size, dtype)
    positions = Positions(views.size, views.halo, lanes, dtype)
    slices = _slices(images, positions, output_gradient.shape[1] + channels)
    chunks = _chunks(slices[0].stop, positions, channels)

    def pack(keep: Tensor) -> PackedInputGradient:
        keep = keep.view(weight.shape)
        g = geometry
        return PackedInputGradient(
            torch.zeros(weight.shape),
            keep,
            g.size,
            views.size,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            lanes,
            dtype,
            chunks,
        )

    key = ("input_gradient", geometry, lanes, dtype, chunks)
    packed = mask.packed(key, pack).refilled(weight)
    source = target = None
    for part in slices:
        dy, dx = output_gradient[part], gradient[part]
        source = Buffer(packed.positions, dy.shape[1], dy.shape[0], within=source)
        to_positions(dy, source, packed.views, (1, 1, 1))
        target = packed.run(source, dx, target)


def weight_gradient(
    geometry: Geometry,
    output_gradient: Tensor,  # [N, K, D', H', W']
    input: Tensor,  # [N, C, D, H, W]
    mask: KnownMask,
    shape: torch.Size,  # of the weight, 5 dimensions
) -> Tensor:  # fp32 [K, C / groups, kd, kh, kw]
    """Compute the gradient of the weight, zero where it is masked; in fp32 for bf16 too."""
    images = input.shape[0]
    views = geometry.views
    lanes = interleaved_images(images, views.size, torch.float32)
    positions = Positions(views.size, views.halo, lanes, torch.float32)
    whole = views_of(views.size, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1))

    def pack(keep: Tensor) -> PackedConv:
        return PackedConv(
            torch.zeros(shape),
            keep.view(shape),
            views,
            positions,
            groups=geometry.groups,
            lines=8,  # what the kernel keeps in registers
            block_channels=shape[1],
            with_order=True,
        )

    conv = mask.packed(("weight_gradient", geometry, lanes), pack)
    order = conv.weights.order
    sums = torch.zeros(len(order))
    planes = input.shape[1] * len(views.phases)
    source = target = None
    for part in _slices(images, positions, planes + shape[0]):
        x, dy = input[part], output_gradient[part]
        if x.shape[0] % lanes:
            source = target = None  # lanes without an image must be zero
        source = Buffer(positions, planes, x.shape[0], within=source)
        target = Buffer(positions, shape[0], x.shape[0], within=target)
        to_positions(x, source, views, geometry.stride)
        to_positions(dy, target, whole, (1, 1, 1))
        conv.add_weight_gradient(source, target, x.shape[0], sums)
    return torch.zeros(shape.numel()).index_copy_(0, order, sums).view(shape)
