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
    Value,
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
    "global_average",
    "layer_of",
    "pack",
    "position_step",
    "same_views",
    "scale",
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
        kind: "convolution" (also a linear layer), "max_pool", "average_pool", "affine",
            "concatenate", "global_average" (whose result is a tensor) or "scale" (by a tensor, one
            factor for each image and channel).
        step: as captured.
        channels: of the result.
        size: (D, H, W) of the result.
        input_size: of the input.
        views: the input as shifted views; of one tap for "affine" and "concatenate".
        stride: of the views.
        window: kernel, stride, padding and dilation of "max_pool".
        factor: which operand of "scale" is the factor.
    """

    kind: str
    step: Step
    channels: int
    size: Size
    input_size: Size
    views: Views
    stride: Size
    window: tuple[Size, Size, Size, Size] | None = None
    factor: int = 0

    @property
    def source(self) -> Value:
        """The value that it reads on positions; a concatenation reads all."""
        if self.kind == "scale":
            return self.step.values()[self.factor == 0]
        return self.step.values()[0]

    @property
    def gives_tensor(self) -> bool:
        """Whether the result is a tensor."""
        return self.kind == "global_average"

    def reads_on_positions(self, value: Value) -> bool:
        """Whether it reads a value of its step there, and not as a tensor."""
        return self.kind != "scale" or value == self.source

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
    if isinstance(step, Call) and not step.kwargs:
        gate = _global_average(program, step) or _scale(program, step)
        if gate is not None:
            return gate
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
        if isinstance(step, Convolution) and size == before[1] == (1, 1, 1):
            return None  # of a gate: little work, and a geometry that wants many images
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


def _global_average(program: Program, step: Call) -> Layer | None:
    """The average over all pixels, as squeeze-and-excitation and classifiers begin with."""
    name = str(step.target)
    before = _known_size(program, step.args[0]) if step.args else None
    if before is None:
        return None
    rank = len(program.meta[step.args[0]].shape) - 2
    spatial = set(range(2, rank + 2))
    if name == f"aten.adaptive_avg_pool{rank}d.default":
        if any(n != 1 for n in step.args[1]):
            return None
    elif name != "aten.mean.dim" or {d % (rank + 2) for d in step.args[1] or ()} != spatial:
        return None
    channels, size = before
    return Layer("global_average", step, channels, size, size, same_views(size), (1, 1, 1))


def _scale(program: Program, step: Call) -> Layer | None:
    """Each channel of each image times a factor, as squeeze-and-excitation ends."""
    if str(step.target) != "aten.mul.Tensor" or len(step.values()) != 2:
        return None
    for factor, value in enumerate(step.values()):
        known = _known_size(program, step.values()[1 - factor])
        gate = _known_size(program, value)
        if known is None or gate != (known[0], (1, 1, 1)) or known[1] == (1, 1, 1):
            continue
        if program.meta[step.result].shape == program.meta[step.values()[1 - factor]].shape:
            channels, size = known
            one = same_views(size)
            return Layer("scale", step, channels, size, size, one, (1, 1, 1), factor=factor)
    return None


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
        self.packed.run(
            self.taken_apart(source, apart, images),
            output,
            images,
            residual=residual,
            activation=self.activation,
            slope=self.slope,
        )

    def taken_apart(self, source: Any, apart: Buffer | None, images: int) -> Buffer:
        """The input as the kernel reads it: its phases, or as it lies."""
        if apart is None:
            return source  # type: ignore[no-any-return]
        to_positions(source, apart, self.layer.views, self.layer.stride, images=images)
        return apart


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
            output.channels,
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


def global_average(source: Buffer, images: int) -> Tensor:  # [N, C]
    """The average over the pixels of each channel of each image."""
    means = source.pixels(images).mean((2, 3, 4))  # [groups, C, images of a group]
    return means.transpose(1, 2).flatten(0, 1)[:images]


def scale(source: Buffer, factor: Tensor, output: Buffer, images: int) -> None:
    """Multiply each channel of each image by factor [N, C, ...]; the halo stays as it is."""
    groups, lanes = source.positions.groups(images), source.positions.images
    factor = factor.flatten(1)
    if groups * lanes > images:
        factor = torch.cat([factor, factor.new_zeros(groups * lanes - images, factor.shape[1])])
    each = factor.view(groups, lanes, -1).transpose(1, 2)[:, :, None, None, None]
    torch.mul(source.pixels(images), each, out=output.pixels(images))


def pack(x: Tensor, buffer: Buffer) -> None:  # x: [N, C, ...]
    """Write a tensor into positions."""
    to_positions(as_5d(x), buffer, same_views(buffer.positions.size), (1, 1, 1))


def unpack(buffer: Buffer, y: Tensor) -> None:  # y: [N, C, ...]
    """Read a tensor from positions."""
    from_positions(buffer, as_5d(y))
