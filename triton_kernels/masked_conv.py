"""Launches of the masked convolution; the kernels and why they are so: masked_conv_kernels.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastpie.errors import FastpieError

from .launch import JIT, Launch, is_shared, pixels_of, plain, run, three, vector
from .masked_conv_kernels import direct_kernel, dot_kernel, pack_mask_kernel
from .masked_conv_parts import ACTIVATIONS

__all__ = ["TileConfig", "masked_conv_configs", "masked_conv_nhwc", "pack_mask", "plan"]


LONGEST_KERNEL = 62
"""The sizes of a kernel, added up: each place of each dimension is a bit of a word of 64."""


class TileConfig(NamedTuple):
    """A tile of the kernels; `channels` is 0 where nothing is multiplied as a matrix."""

    pixels: int
    filters: int
    channels: int
    num_warps: int = (
        4  # at most: wider programs have been miscompiled (Triton issue of num_warps=8)
    )
    num_stages: int = 3


def _form_of(channels: int, groups: int) -> str:
    """Which kernel serves a layer with this many channels in a group."""
    if channels >= 8:
        return "dot"
    return "gather" if groups == 1 else "direct"


def masked_conv_configs(
    channels: int,  # of one group
    filters: int,  # of all groups
    groups: int = 1,
    *,
    models: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    allow_tf32: bool = False,
) -> list[TileConfig]:
    """The tiles that are sensible for a layer, the one to take untimed first.

    What is here compiles for sm_90 without a spill (tests/triton_kernels). Two models double the
    sums that a program keeps: a tile of 128 x 128 is for one model alone. Whoever times tiles holds
    each to torch first, on the GPU at hand (fastpie.dual.gpu.plan).
    """
    form = _form_of(channels, groups)
    if form == "direct":
        width = min(128, max(16, triton.next_power_of_2(filters)))
        sizes = (4096, 2048) if models == 2 else (8192, 4096)
        return [TileConfig(size // width, width, 0, 4, 1) for size in sizes]
    of_group = filters // groups
    if dtype is torch.float32 and not allow_tf32:
        # Without tensor cores operands are in registers too: a second stage would spill.
        return [TileConfig(64, 32, 32, 4, 1)]
    step = 32 if dtype is torch.float32 or channels <= 32 else 64
    if of_group <= 32:
        return [TileConfig(128, 32, step)]
    if form == "gather":
        return [TileConfig(128, 64, step)]
    tiles = [TileConfig(128, 64, step), TileConfig(64, 64, step, 4, 4)]
    if of_group > 64 and step == 64:
        tiles.insert(1, TileConfig(64, 128, step) if models == 2 else TileConfig(128, 128, step))
    return tiles


def pack_mask(
    mask: Tensor,  # bool [K, C, *kernel]
    wrap: Callable[[Any], Any] = plain,
) -> Tensor:  # int32 [K, taps, words]
    """A mask as the kernels read it, one bit for each weight.

    Equivalent to::

        fastpie.ops.reference.pack_mask(mask)
    """
    filters, channels = mask.shape[:2]
    taps = math.prod(mask.shape[2:])
    words = mask.new_empty((filters, taps, triton.cdiv(channels, 32)), dtype=torch.int32)
    if words.numel() == 0:
        return words
    block = 32  # with more, the addresses of 32 loads a word spill
    grid = triton.cdiv(words.numel(), block)
    arguments = [mask.contiguous(), words, channels, taps, words.numel()]
    run(Launch(pack_mask_kernel, grid, arguments, {"BLOCK": block}, {"num_warps": 4}), wrap)
    return words


def masked_conv_nhwc(
    inputs: Sequence[Tensor],  # of each model [N, groups * C, *spatial], channels-last
    weight: Tensor,  # [K, *kernel, C], contiguous
    masks: Sequence[Tensor | None],  # int32 [K, taps, words], see pack_mask
    scales: Sequence[Tensor | None],  # fp32 [K]
    biases: Sequence[Tensor | None],  # fp32 [K]
    residuals: Sequence[Tensor | None],  # as the outputs
    outputs: Sequence[Tensor],  # of each model [N, K, *out], channels-last; written
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: tuple[str, float] = ("none", 0.0),
    config: TileConfig | None = None,
    allow_tf32: bool = False,
    wrap: Callable[[Any], Any] = plain,
) -> None:
    """One layer of one model or of two, in one launch on the current stream, without waiting.

    Equivalent to::

        results = fastpie.ops.reference.masked_conv_nhwc(
            inputs, weight, masks, scales, biases, residuals, stride, padding, dilation, groups,
            activate,
        )
        for output, result in zip(outputs, results):
            output.copy_(result)

    A layer without strides is linear, on tensors [..., C]. What lies behind the image follows from
    the size of the outputs. Where both inputs are one tensor, or views of
    the same values, it is read once.

    The dimension of the channels has stride 1. The pixels of outputs and residuals have one stride
    (a slice of the channels of a channels-last tensor is fine), those of inputs any; strides are the
    same for both models. The caller answers for that, and for outputs that overlap no input.

    Args:
        inputs: bf16, fp16 or fp32 on one CUDA device, or on the CPU under TRITON_INTERPRET=1.
        weight: of both models.
        masks: which weights are kept; None: all.
        scales: factor of each filter's sum; None: 1.
        biases: summand of each filter; None: 0.
        residuals: summand of the result; None: 0.
        outputs: where the results go.
        stride: as in torch, one number for each spatial dimension.
        padding: zeros before the image.
        dilation: as in torch.
        groups: as in torch.
        activation: a name of ACTIVATIONS and the slope of leaky_relu.
        config: the tile, by default the first of `masked_conv_configs`.
        allow_tf32: whether fp32 values may be rounded to tf32 before they are multiplied.
        wrap: applied to the kernel before it is launched (torch.library.wrap_triton).
    """
    if outputs[0].numel() == 0:
        return
    launch = plan(
        inputs,
        weight,
        masks,
        scales,
        biases,
        residuals,
        outputs,
        stride,
        padding,
        dilation,
        groups,
        activation,
        config,
        allow_tf32,
    )
    run(launch, wrap)


def plan(
    inputs: Sequence[Tensor],
    weight: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: tuple[str, float],
    config: TileConfig | None,
    allow_tf32: bool,
) -> Launch:
    """The launch of `masked_conv_nhwc`, for outputs that are not empty."""
    x, output = inputs[0], outputs[0]
    rank, models = len(stride), len(inputs)
    filters, channels = weight.shape[0], weight.shape[-1]
    form = _form_of(channels, groups)
    config = (
        config
        or masked_conv_configs(
            channels, filters, groups, models=models, dtype=x.dtype, allow_tf32=allow_tf32
        )[0]
    )
    of_input, of_output = pixels_of(x, rank), pixels_of(output, rank)
    residual = next((r for r in residuals if r is not None), output)
    out_strides = [of_output.strides[3], pixels_of(residual, rank).strides[3]]
    pixels = of_output.count
    kernel_size = three(weight.shape[1:-1], 1)
    strides, paddings, dilations = three(stride, 1), three(padding, 0), three(dilation, 1)
    taps = math.prod(kernel_size)
    if form != "direct" and sum(kernel_size) > LONGEST_KERNEL:
        raise FastpieError(
            f"Expected kernel sizes that add up to at most {LONGEST_KERNEL}, but got {kernel_size}."
        )

    filters_of_group = filters // groups
    depthwise = channels == filters_of_group == 1
    in_vector = vector(x, *of_input.strides, *([channels] if form != "direct" else []))
    # A tile of the direct kernel crosses the borders of groups.
    unit = filters if form == "direct" else filters_of_group
    out_vector = vector(x, *out_strides, unit)
    constants: dict[str, Any] = {
        "DUAL": models == 2,
        "SHARED_INPUT": is_shared(inputs),
        "ACTIVATION": ACTIVATIONS.index(activation[0]),
        "IN_VECTOR": in_vector,
        "OUT_VECTOR": out_vector,
        "PIXELS": config.pixels,
        "FILTERS": config.filters,
    }
    tensors: list[Tensor] = [inputs[0], inputs[-1], weight]
    operands = {"MASK": masks, "SCALE": scales, "BIAS": biases, "RESIDUAL": residuals}
    for name, pair in operands.items():
        for i, t in enumerate((pair[0], pair[-1])):
            constants[f"HAS_{name}{i}"] = t is not None
            tensors.append(weight if t is None else t)  # where there is none, nothing is read
    tensors += [outputs[0], outputs[-1]]
    numbers = [
        pixels,
        *of_output.sizes[1:],
        *of_input.sizes[1:],
        *(s // in_vector for s in of_input.strides),
        *(s // out_vector for s in out_strides),
        channels if form == "direct" else channels // in_vector,
        unit // out_vector,
        groups,
        taps,
        *kernel_size[1:],
        *strides,
        *paddings,
        *dilations,
        float(activation[1]),
    ]
    if form == "direct":
        kernel: Any = direct_kernel
        constants |= {"DEPTHWISE": depthwise, "WIDE": pixels >= 2**31 - config.pixels}
        tiles = triton.cdiv(filters, config.filters)
    else:
        kernel = dot_kernel
        tiles = groups * triton.cdiv(filters_of_group, config.filters)
        pointwise = taps == max(strides) == 1 and not any(paddings) and of_input.uniform
        pointwise = pointwise and of_input.sizes == of_output.sizes
        # How far a value can be from the first of the image in which its tile begins.
        images = config.pixels // math.prod(of_output.sizes[1:]) + 2
        taps_reach = (
            s * d * k for s, d, k in zip(of_input.strides[1:], dilations, kernel_size, strict=True)
        )
        reach = images * of_input.strides[0] + 2 * sum(taps_reach)
        wide = max(pixels + config.pixels, reach) >= 2**31
        constants |= {
            "WIDE": wide,
            "GATHER_CHANNELS": channels if form == "gather" else 0,
            "GATHER_HEIGHT": kernel_size[1] if form == "gather" else 0,
            "GATHER_WIDTH": kernel_size[2] if form == "gather" else 0,
            "LONG_BITS": sum(kernel_size) > 31,
            "FORM": 2 if form == "gather" else 0 if pointwise else 1,
            "WHOLE_CHANNELS": channels % config.channels == 0,
            "UPCAST": not isinstance(dot_kernel, JIT) and x.dtype is torch.bfloat16,
            "PRECISION": "tf32" if allow_tf32 else "ieee",
            "CHANNELS": config.channels,
            "PARTS": max(1, config.filters // 32),
        }
    return Launch(
        kernel,
        triton.cdiv(pixels, config.pixels) * tiles,
        tensors + numbers,
        constants,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
