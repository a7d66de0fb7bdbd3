"""Steps on positions: which can be computed there, and how (fastpie.ops.positions)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.dual.program import (
    Activation,
    Affine,
    Call,
    Convolution,
    Linear,
    Program,
    Step,
    TensorName,
)
from fastpie.dual.states import ModelState, fold, norm_scale_shift
from fastpie.dual.tensor_steps import known_slope
from fastpie.ops import _native
from fastpie.ops.packing import ACTIVATIONS, PackedConv, from_positions, to_positions
from fastpie.ops.positions import Buffer, Positions, Views, dtype_code, views_of

__all__ = [
    "Layer",
    "PackedStep",
    "Size",
    "as_5d",
    "layer_of",
    "pack",
    "position_step",
    "same_views",
    "unpack",
]

Size = tuple[int, int, int]

_MAX_DENSITY = 0.6
"""Above it no layer was faster on positions than by oneDNN (docs/design/cpu-engine.md), but for
depthwise ones, which memory binds in either form."""

_MAX_HALO = 0.34
"""Zeros that a geometry may hold for each pixel along an axis: wide dilations go to oneDNN."""


@dataclass(frozen=True)
class Layer:
    """A step that can be computed on positions.

    Attributes:
        kind: "convolution" (also a linear layer), "max_pool", "average_pool", "affine" or
            "concatenate".
        step: as captured.
        channels: of the result.
        size: (D, H, W) of the result.
        input_size: of the input.
        views: the input as shifted views; of one tap for "affine" and "concatenate".
        stride: of the views.
        window: kernel, stride, padding and dilation of "max_pool".
    """

    kind: str
    step: Step
    channels: int
    size: Size
    input_size: Size
    views: Views
    stride: Size
    window: tuple[Size, Size, Size, Size] | None = None

    @property
    def reads_in_place(self) -> bool:
        """Whether the input can be read where it lies, on positions."""
        if self.kind == "max_pool":  # walks through both geometries
            return True
        return self.views.is_shift_only and self.input_size == self.size


def as_5d(x: Tensor) -> Tensor:  # [N, C, ...] -> [N, C, D, H, W], a view
    """The same elements with three spatial dimensions."""
    return x[(slice(None), slice(None)) + (None,) * (5 - x.ndim)]


def same_views(size: Size) -> Views:
    """The view of each pixel by itself."""
    return views_of(size, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1))


def _known_size(
    program: Program, value: Any, ranks: tuple[int, ...] = (1, 2, 3)
) -> tuple[int, Size] | None:
    """Channels and size of a value [N, C, spatial dimensions], if known."""
    meta = program.meta.get(value)
    if meta is None or len(meta.shape) - 2 not in ranks or meta.shape[0] is not None:
        return None
    if meta.dtype != torch.float32 or any(n is None or n == 0 for n in meta.shape[1:]):
        return None
    _, channels, *rest = meta.shape
    return int(channels or 0), _three([int(n or 0) for n in rest], len(rest), 1)


def _three(values: Any, rank: int, fill: int) -> Size:
    """One number for each of three axes, from a number or `rank` of them."""
    given = [values] if isinstance(values, int) else list(values)
    given = given * rank if len(given) == 1 else given
    z, y, x = [fill] * (3 - rank) + given
    return z, y, x


def layer_of(program: Program, step: Step, state: ModelState) -> Layer | None:
    """The step as a layer on positions in one model, or None if it cannot be one."""
    source = step.values()[0] if step.values() else None
    ranks = (0,) if isinstance(step, Linear) else (1, 2, 3)
    before, after = _known_size(program, source, ranks), _known_size(program, step.result, ranks)
    if before is None or after is None:
        return None
    channels, size = after
    rank = len(program.meta[step.result].shape) - 2
    one = same_views(size)
    if isinstance(step, Convolution | Linear):
        keep = state.keep.get(step.weight)
        weight = state.tensors[step.weight]
        dense = keep is None or keep.sum() > _MAX_DENSITY * keep.numel()
        depthwise = isinstance(step, Convolution) and weight.shape[1] == 1 and step.groups > 1
        if weight.numel() == 0 or (dense and not depthwise):
            return None
        if not _known_activation(known_slope(step.activation, state)):
            return None
        if isinstance(step, Linear):
            return Layer("convolution", step, channels, size, before[1], one, (1, 1, 1))
        stride = _three(step.stride, rank, 1)
        kernel = _three(list(weight.shape[2:]), rank, 1)
        padding = _three(step.padding, rank, 0)
        behind = _three(step.padding_behind or step.padding, rank, 0)
        dilation = _three(step.dilation, rank, 1)
        views = views_of(before[1], kernel, stride, padding, dilation, behind)
        return _if_halo_fits(Layer("convolution", step, channels, size, before[1], views, stride))
    if isinstance(step, Affine):
        if not _known_activation(known_slope(step.activation, state)):
            return None
        return Layer("affine", step, channels, size, before[1], one, (1, 1, 1))
    if not isinstance(step, Call) or step.kwargs:
        return None
    name = str(step.target)
    if name == "aten.cat.default" and len(step.args) == 2 and step.args[1] == 1:
        if all(_known_size(program, value) is not None for value in step.args[0]):
            return Layer("concatenate", step, channels, size, size, one, (1, 1, 1))
        return None
    pools = {f"aten.{kind}_pool{rank}d.default": kind for kind in ("max", "avg")}
    if name not in pools:
        return None
    kernel, *rest = step.args[1:]
    defaults: list[Any] = [[], 0, 1, False] if pools[name] == "max" else [[], 0, False, True, None]
    stride, padding, *options = [*rest, *defaults[len(rest) :]]
    spread: Any = 1
    if pools[name] == "max":
        spread, ceil = options
        if ceil:
            return None
    else:
        ceil, include_padding, divisor = options
        if ceil or divisor is not None or not (include_padding or _all_zero(padding)):
            return None
    window = (
        _three(kernel, rank, 1),
        _three(stride or kernel, rank, 1),
        _three(padding, rank, 0),
        _three(spread, rank, 1),
    )
    if pools[name] == "max":
        return Layer("max_pool", step, channels, size, before[1], one, (1, 1, 1), window)
    views = views_of(before[1], *window)
    return _if_halo_fits(Layer("average_pool", step, channels, size, before[1], views, window[1]))


def _all_zero(padding: Any) -> bool:
    return not any([padding] if isinstance(padding, int) else padding)


def _if_halo_fits(layer: Layer) -> Layer | None:
    small = all(
        halo <= max(1, _MAX_HALO * n) for halo, n in zip(layer.views.halo, layer.size, strict=True)
    )
    return layer if small and layer.views.size == layer.size else None


def _known_activation(activation: Activation | None) -> bool:
    if activation is None:
        return True
    return activation.name in ACTIVATIONS and not isinstance(activation.slope, TensorName)


PositionStep = Callable[[Any, Buffer | None, Buffer, Buffer | None, int], None]
"""run(source, apart, output, residual, images): `source` is a tensor [N, C, D, H, W] or a buffer,
`apart` the buffer for its phases where the layer does not read in place."""


def position_step(
    layer: Layer, state: ModelState, positions: Positions, *, lines: int, blocked: bool, chunks: int
) -> PositionStep:
    """Lower a layer to positions, with its own copy of the weights.

    Args:
        layer: from `layer_of`.
        state: the model's tensors.
        positions: the geometry of the result.
        lines: cache lines of a tile.
        blocked: whether input channels are cut into blocks for the L1 cache.
        chunks: cuts of the output channels, for threads.
    """
    if layer.kind == "convolution":
        return _convolution(layer, state, positions, lines, blocked, chunks)
    if layer.kind == "average_pool":
        return _average_pool(layer, positions, lines)
    if layer.kind == "max_pool":
        return _max_pool(layer)
    assert layer.kind == "affine"
    return _affine(layer, state)


@dataclass(frozen=True)
class PackedStep:
    """A convolution as a PositionStep, open to be chained with others."""

    layer: Layer
    packed: PackedConv
    activation: str
    slope: float

    def __call__(
        self,
        source: Any,
        apart: Buffer | None,
        output: Buffer,
        residual: Buffer | None,
        images: int,
    ) -> None:
        """Compute the layer; see PositionStep."""
        if apart is not None:
            to_positions(source, apart, self.layer.views, self.layer.stride, images=images)
            source = apart
        self.packed.run(
            source,
            output,
            images,
            residual=residual,
            activation=self.activation,
            slope=self.slope,
        )


def _run_packed(layer: Layer, packed: PackedConv, activation: Activation | None) -> PackedStep:
    if activation is None:
        return PackedStep(layer, packed, "none", 0.0)
    return PackedStep(layer, packed, activation.name, float(activation.slope))


def _convolution(
    layer: Layer, state: ModelState, positions: Positions, lines: int, blocked: bool, chunks: int
) -> PositionStep:
    step = layer.step
    assert isinstance(step, Convolution | Linear)
    folded = fold(step, state)
    keep = torch.ones_like(folded.weight, dtype=torch.bool) if folded.keep is None else folded.keep
    packed = PackedConv(
        as_5d(folded.weight),
        as_5d(keep),
        layer.views,
        positions,
        groups=step.groups if isinstance(step, Convolution) else 1,
        bias=folded.bias,
        row_scale=folded.scale,
        lines=lines,
        block_channels=None if blocked else folded.weight.shape[1],
        chunks=chunks,
    )
    return _run_packed(layer, packed, known_slope(step.activation, state))


def _average_pool(layer: Layer, positions: Positions, lines: int) -> PositionStep:
    """A convolution of each channel by itself with equal weights."""
    taps = len(layer.views.taps)
    weight = torch.full((layer.channels, 1, taps, 1, 1), 1.0 / taps)
    packed = PackedConv(
        weight,
        torch.ones_like(weight, dtype=torch.bool),
        layer.views,
        positions,
        groups=layer.channels,
        lines=lines,
        block_channels=1,
    )
    return _run_packed(layer, packed, None)


def _max_pool(layer: Layer) -> PositionStep:
    window = layer.window
    assert window is not None

    def run(
        source: Any, apart: Buffer | None, output: Buffer, residual: Buffer | None, images: int
    ) -> None:
        before, after = source.positions, output.positions
        _native.call(
            _C.max_pool_cpu,
            source.handle[0],
            (source.handle[1], source.handle[2], *before.pitches[:2]),
            before.size,
            output.handle[0],
            (output.handle[1], output.handle[2], *after.pitches[:2]),
            after.size,
            *window,
            dtype_code(after.dtype),
            after.groups(images),
            layer.channels,
            after.images,
            torch.get_num_threads(),
        )

    return run


def _affine(layer: Layer, state: ModelState) -> PositionStep:
    step = layer.step
    assert isinstance(step, Affine)
    scale, shift = (t.float() for t in norm_scale_shift(step.norm, state))
    activation = known_slope(step.activation, state)
    name = "none" if activation is None else activation.name
    slope = 0.0 if activation is None else float(activation.slope)

    def run(
        source: Any, apart: Buffer | None, output: Buffer, residual: Buffer | None, images: int
    ) -> None:
        to_positions(
            source,
            output,
            layer.views,
            (1, 1, 1),
            images=images,
            scale=scale,
            shift=shift,
            activation=name,
            slope=slope,
        )

    return run


def pack(x: Tensor, buffer: Buffer) -> None:  # x: [N, C, ...]
    """Write a tensor into positions."""
    to_positions(as_5d(x), buffer, same_views(buffer.positions.size), (1, 1, 1))


def unpack(buffer: Buffer, y: Tensor) -> None:  # y: [N, C, ...]
    """Read a tensor from positions."""
    from_positions(buffer, as_5d(y))
