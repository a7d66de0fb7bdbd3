"""Triton kernels of the masked convolution's gradients, of one model or of both in one launch.

The gradient of the input is the convolution run backwards: a pixel collects, tap by tap, from the
outputs that it went into. With a stride s only every s-th tap reaches a given pixel, and which ones
depends on its coordinates modulo s; a program takes pixels of one such class and visits their taps
alone.

The gradient of the weight is a product over all pixels of all images. They are cut into parts, each
part's sums go to a buffer of their own and the buffers are added in order: no atomics, the same bits
every time. Both models' sums are masked and added in registers.

The tile of weights, and the inputs where the models share them, are loaded once for both models, as
in the forward pass; how addresses and masks are made is told there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import JIT, Launch, is_shared, pixels_of, plain, run, three, vector
from .masked_conv import TileConfig
from .masked_conv_parts import expand, keep, load, position

__all__ = [
    "input_gradient_config",
    "input_gradient_kernel",
    "masked_conv_input_gradient",
    "masked_conv_weight_gradient",
    "plan_input_gradient",
    "plan_weight_gradient",
    "weight_gradient_config",
    "weight_gradient_kernel",
]

_GEOMETRY = [
    "images",
    "depth",
    "height",
    "width",
    "out_depth",
    "out_height",
    "out_width",
    "channels",
    "filters",
    "groups",
    "kernel_depth",
    "kernel_height",
    "kernel_width",
    "stride_d",
    "stride_h",
    "stride_w",
    "padding_d",
    "padding_h",
    "padding_w",
    "dilation_d",
    "dilation_h",
    "dilation_w",
]


# ------------------------------------------------------------------------------ of the input


@triton.jit
def _class_of(residue, kernel_size, stride, padding, dilation, every, STRIDED: tl.constexpr):
    """The taps of a class: the first, how many, and where its output is seen from pixel 0.

    Tap t of input i comes from output (i + padding - t * dilation) / stride, where that is whole:
    for every `every`-th tap, if for any.
    """
    reach = residue + padding
    first = 0
    if STRIDED:
        first = kernel_size
        for t in range(every):
            # -t * dilation modulo stride, of numbers that are not negative
            whole = (reach + t * dilation * (stride - 1)) % stride == 0
            first = tl.where(whole & (first == kernel_size), t, first)
    count = tl.maximum(kernel_size - first + every - 1, 0) // every
    # The quotient is whole, but // rounds towards zero in Triton: nothing depends on which.
    return first, count, (reach - first * dilation) // stride


@triton.jit(do_not_specialize=[*_GEOMETRY, "every_d", "every_h", "every_w"])
def input_gradient_kernel(
    gradient0,
    gradient1,
    weight,
    mask0,
    mask1,
    output0,
    output1,
    images,
    depth,
    height,
    width,
    out_depth,
    out_height,
    out_width,
    channels,
    filters,
    groups,
    kernel_depth,
    kernel_height,
    kernel_width,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    every_d,
    every_h,
    every_w,
    DUAL: tl.constexpr,
    HAS_MASK0: tl.constexpr,
    HAS_MASK1: tl.constexpr,
    STRIDED: tl.constexpr,
    WHOLE: tl.constexpr,  # FILTERS divides the filters, CHANNELS the channels
    WIDE: tl.constexpr,  # offsets inside a tile need 64 bits
    LONG_BITS: tl.constexpr,
    UPCAST: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A tile [PIXELS, CHANNELS] of one group, of pixels whose coordinates are alike modulo stride."""
    channels = channels * IN_VECTOR
    filters = filters * OUT_VECTOR
    words = (channels + 31) // 32
    taps = kernel_depth * kernel_height * kernel_width
    channel_tiles = (channels + CHANNELS - 1) // CHANNELS
    tiles = channel_tiles * groups
    program = tl.program_id(0)
    group = program % tiles // channel_tiles
    first_channel = program % tiles % channel_tiles * CHANNELS
    program = program // tiles
    classes = stride_d * stride_h * stride_w
    residue = program % classes
    tile = program // classes
    if WIDE:
        tile = tile.to(tl.int64)
    first_pixel = tile * PIXELS

    rows = (height + stride_h - 1) // stride_h  # of a class, in one image
    columns = (width + stride_w - 1) // stride_w
    planes = (depth + stride_d - 1) // stride_d
    image, z, y, x = position(first_pixel + tl.arange(0, PIXELS), planes, rows, columns)
    residue_x = residue % stride_w
    residue_y = residue // stride_w % stride_h
    residue_z = residue // (stride_w * stride_h)
    in_z = z * stride_d + residue_z
    in_y = y * stride_h + residue_y
    in_x = x * stride_w + residue_x
    of_pixel = (image < images) & (in_z < depth) & (in_y < height) & (in_x < width)

    first_z, count_z, from_z = _class_of(
        residue_z, kernel_depth, stride_d, padding_d, dilation_d, every_d, STRIDED
    )
    first_y, count_y, from_y = _class_of(
        residue_y, kernel_height, stride_h, padding_h, dilation_h, every_h, STRIDED
    )
    first_x, count_x, from_x = _class_of(
        residue_x, kernel_width, stride_w, padding_w, dilation_w, every_w, STRIDED
    )
    step_z = every_d * dilation_d // stride_d
    step_y = every_h * dilation_h // stride_h
    step_x = every_w * dilation_w // stride_w
    z = (z + from_z).to(tl.int32)
    y = (y + from_y).to(tl.int32)
    x = (x + from_x).to(tl.int32)
    one = tl.full((), 1, tl.int64 if LONG_BITS else tl.int32)
    reach = tl.zeros((PIXELS,), tl.int64 if LONG_BITS else tl.int32)
    for t in range(count_x):
        at = x - t * step_x
        reach += ((at >= 0) & (at < out_width) & of_pixel).to(one.dtype) << t
    for t in range(count_y):
        at = y - t * step_y
        reach += ((at >= 0) & (at < out_height)).to(one.dtype) << (kernel_width + t)
    for t in range(count_z):
        at = z - t * step_z
        inside = ((at >= 0) & (at < out_depth)).to(one.dtype)
        reach += inside << (kernel_width + kernel_height + t)

    all_filters = groups * filters
    first_image = first_pixel // (planes * rows * columns)
    image_step = (out_depth * out_height).to(tl.int64) * (out_width * all_filters)
    row_step = (out_width * all_filters).to(tl.int64)
    plane_step = out_height * row_step
    pixel_step = all_filters
    first_at = first_image * image_step + group * filters
    gradient0 += first_at
    gradient1 += first_at
    if not WIDE:
        image_step = image_step.to(tl.int32)
        row_step = row_step.to(tl.int32)
        plane_step = plane_step.to(tl.int32)
    f = tl.arange(0, FILTERS)
    c = tl.arange(0, CHANNELS)
    gradient_at = (image - first_image) * image_step + z * plane_step + y * row_step
    gradient_at = (gradient_at + x * pixel_step)[:, None] + f[None, :]
    # Of the weights [filter, tap, channel] a step takes FILTERS of one tap.
    weight += (group * filters).to(tl.int64) * (taps * channels) + first_channel
    weight_at = f[:, None] * (taps * channels) + c[None, :]
    first_word = (group * filters).to(tl.int64) * (taps * words) + first_channel // 32
    mask0 += first_word
    mask1 += first_word
    word = tl.arange(0, CHANNELS // 32)
    mask_at = f[:, None] * (taps * words) + word[None, :]
    of_channel = first_channel + c < channels

    acc0 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    acc1 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    tap_z = 0
    tap_y = 0
    tap_x = 0
    filter = 0
    for _ in range(count_z * count_y * count_x * ((filters + FILTERS - 1) // FILTERS)):
        tap = (first_z + tap_z * every_d) * kernel_height + first_y + tap_y * every_h
        tap = tap * kernel_width + first_x + tap_x * every_w
        need = (one << tap_x) + (one << (kernel_width + tap_y))
        need += one << (kernel_width + kernel_height + tap_z)
        valid = ((reach & need) == need)[:, None]
        of_weight = None
        of_word = None
        if not WHOLE:
            of_filter = filter + f < filters
            valid = valid & of_filter[None, :]
            of_weight = of_filter[:, None] & of_channel[None, :]
            of_word = of_filter[:, None] & (first_channel // 32 + word < words)[None, :]
        from_tap = tap_z * step_z * plane_step + tap_y * step_y * row_step
        from_tap = filter - from_tap - tap_x * step_x * pixel_step
        a0 = load(gradient0 + from_tap + gradient_at, valid)
        b = load(
            weight + filter.to(tl.int64) * (taps * channels) + tap * channels + weight_at, of_weight
        )
        from_word = filter.to(tl.int64) * (taps * words) + tap * words
        b0 = b
        if HAS_MASK0:
            b0 = keep(b, expand(load(mask0 + from_word + mask_at, of_word), FILTERS, CHANNELS))
        if UPCAST:
            a0 = a0.to(tl.float32)
            b0 = b0.to(tl.float32)
        acc0 = tl.dot(a0, b0, acc0, input_precision="ieee")
        if DUAL:
            a1 = load(gradient1 + from_tap + gradient_at, valid)
            b1 = b
            if HAS_MASK1:
                b1 = keep(b, expand(load(mask1 + from_word + mask_at, of_word), FILTERS, CHANNELS))
            if UPCAST:
                a1 = a1.to(tl.float32)
                b1 = b1.to(tl.float32)
            acc1 = tl.dot(a1, b1, acc1, input_precision="ieee")
        next_tap = filter + FILTERS >= filters
        filter = tl.where(next_tap, 0, filter + FILTERS)
        tap_x += next_tap.to(tl.int32)
        next_row = tap_x == count_x
        tap_x = tl.where(next_row, 0, tap_x)
        tap_y += next_row.to(tl.int32)
        next_plane = tap_y == count_y
        tap_y = tl.where(next_plane, 0, tap_y)
        tap_z += next_plane.to(tl.int32)

    row = ((image.to(tl.int64) * depth + in_z) * height + in_y) * width + in_x
    at = (row * (groups * channels) + group * channels + first_channel)[:, None] + c[None, :]
    inside = of_pixel[:, None] & of_channel[None, :]
    tl.store(output0 + at, acc0.to(output0.dtype.element_ty), mask=inside)
    if DUAL:
        tl.store(output1 + at, acc1.to(output1.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------ of the weight


@triton.jit(do_not_specialize=[*_GEOMETRY, "steps"])
def weight_gradient_kernel(
    gradient0,
    gradient1,
    input0,
    input1,
    mask0,
    mask1,
    output,
    images,
    depth,
    height,
    width,
    out_depth,
    out_height,
    out_width,
    channels,
    filters,
    groups,
    kernel_depth,
    kernel_height,
    kernel_width,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    steps,
    DUAL: tl.constexpr,
    SHARED_INPUT: tl.constexpr,
    HAS_MASK0: tl.constexpr,
    HAS_MASK1: tl.constexpr,
    POINTWISE: tl.constexpr,  # the inputs of a pixel are at its own place
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,  # offsets inside a tensor need 64 bits
    UPCAST: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums [FILTERS, CHANNELS] of one tap over `steps` times PIXELS pixels: one part of them all."""
    channels = channels * IN_VECTOR
    filters = filters * OUT_VECTOR
    words = (channels + 31) // 32
    taps = kernel_depth * kernel_height * kernel_width
    filter_tiles = (filters + FILTERS - 1) // FILTERS
    channel_tiles = (channels + CHANNELS - 1) // CHANNELS
    # Taps and tiles of the same pixels follow each other.
    program = tl.program_id(0)
    first_channel = program % channel_tiles * CHANNELS
    program = program // channel_tiles
    first_filter = program % filter_tiles * FILTERS
    program = program // filter_tiles
    tap = program % taps
    program = program // taps
    group = program % groups
    part = (program // groups).to(tl.int64)

    f = tl.arange(0, FILTERS)
    c = tl.arange(0, CHANNELS)
    of_filter = first_filter + f < filters
    of_channel = first_channel + c < channels
    tap_x = tap % kernel_width
    tap_y = tap // kernel_width % kernel_height
    tap_z = tap // (kernel_width * kernel_height)
    pixels = images * out_depth * out_height * out_width
    all_filters = groups * filters
    all_channels = groups * channels
    gradient0 += group * filters + first_filter
    gradient1 += group * filters + first_filter
    input0 += group * channels + first_channel
    input1 += group * channels + first_channel

    acc0 = tl.zeros((FILTERS, CHANNELS), tl.float32)
    acc1 = tl.zeros((FILTERS, CHANNELS), tl.float32)
    first_pixel = (part if WIDE else part.to(tl.int32)) * steps * PIXELS
    for step in range(steps):
        pixel = first_pixel + step * PIXELS + tl.arange(0, PIXELS)
        of_pixel = pixel < pixels
        in_pixel = pixel
        of_input = of_pixel
        if not POINTWISE:
            image, z, y, x = position(pixel, out_depth, out_height, out_width)
            z = z * stride_d - padding_d + tap_z * dilation_d
            y = y * stride_h - padding_h + tap_y * dilation_h
            x = x * stride_w - padding_w + tap_x * dilation_w
            in_pixel = ((image * depth + z) * height + y) * width + x
            of_input = of_input & (z >= 0) & (z < depth) & (y >= 0) & (y < height)
            of_input = of_input & (x >= 0) & (x < width)
        gradient_at = (pixel * all_filters)[:, None] + f[None, :]
        input_at = (in_pixel * all_channels)[:, None] + c[None, :]
        of_gradient = of_pixel[:, None]
        of_input = of_input[:, None]
        if not WHOLE:
            of_gradient = of_gradient & of_filter[None, :]
            of_input = of_input & of_channel[None, :]
        a0 = load(gradient0 + gradient_at, of_gradient)
        b0 = load(input0 + input_at, of_input)
        b1 = b0
        if UPCAST:
            a0 = a0.to(tl.float32)
            b0 = b0.to(tl.float32)
        acc0 = tl.dot(tl.trans(a0), b0, acc0, input_precision="ieee")
        if DUAL:
            a1 = load(gradient1 + gradient_at, of_gradient)
            if not SHARED_INPUT:
                b1 = load(input1 + input_at, of_input)
            if UPCAST:
                a1 = a1.to(tl.float32)
                b1 = b1.to(tl.float32)
            acc1 = tl.dot(tl.trans(a1), b1, acc1, input_precision="ieee")

    filter = group * filters + first_filter + f
    word = first_channel // 32 + tl.arange(0, CHANNELS // 32)
    word_at = (filter.to(tl.int64) * (taps * words) + tap * words)[:, None] + word[None, :]
    of_word = of_filter[:, None] & (word < words)[None, :]
    if HAS_MASK0:
        acc0 = keep(acc0, expand(load(mask0 + word_at, of_word), FILTERS, CHANNELS))
    if DUAL:
        if HAS_MASK1:
            acc1 = keep(acc1, expand(load(mask1 + word_at, of_word), FILTERS, CHANNELS))
        acc0 += acc1
    row = (part * all_filters + filter) * taps + tap
    at = (row * channels + first_channel)[:, None] + c[None, :]
    tl.store(output + at, acc0, mask=of_filter[:, None] & of_channel[None, :])


# ------------------------------------------------------------------------------ launch


def input_gradient_config(channels: int) -> TileConfig:
    """The tile of pixels and channels, and the filters of a step, for the channels of a group."""
    return TileConfig(128, 64, 32) if channels <= 32 else TileConfig(128, 32, 64, 4, 4)


def weight_gradient_config(channels: int, filters: int) -> TileConfig:
    """The tile of filters and channels, and the pixels of a step, for those of a group."""
    if channels <= 32:
        return TileConfig(64, 64, 32)
    # The wide tile pays least for finding its pixels again in every step.
    return TileConfig(64, 128, 64) if filters > 64 else TileConfig(64, 64, 64)


def _geometry(
    sizes: list[int], out_sizes: list[int], channels: int, filters: int, groups: int
) -> list[int]:
    return [*sizes, *out_sizes[1:], channels, filters, groups]


def plan_input_gradient(
    gradients: Sequence[Tensor],
    weight: Tensor,
    masks: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: TileConfig | None,
) -> Launch:
    """The launch of `masked_conv_input_gradient`, for outputs that are not empty."""
    rank = len(stride)
    channels, filters = weight.shape[-1], weight.shape[0] // groups
    config = config or input_gradient_config(channels)
    of_gradient, of_output = pixels_of(gradients[0], rank), pixels_of(outputs[0], rank)
    kernel_size = three(weight.shape[1:-1], 1)
    strides, dilations = three(stride, 1), three(dilation, 1)
    every = [s // math.gcd(s, d) for s, d in zip(strides, dilations, strict=True)]
    in_vector, out_vector = vector(weight, channels), vector(weight, filters)
    classes = math.prod(strides)
    tile_pixels = of_output.sizes[0] * math.prod(
        triton.cdiv(n, s) for n, s in zip(of_output.sizes[1:], strides, strict=True)
    )
    images = config.pixels // max(1, tile_pixels // of_output.sizes[0]) + 2
    taps_reach = [
        s * d * k for s, d, k in zip(of_gradient.strides[1:], dilations, kernel_size, strict=True)
    ]
    reach = images * of_gradient.strides[0] + 2 * sum(taps_reach)
    constants = {
        "DUAL": len(gradients) == 2,
        "HAS_MASK0": masks[0] is not None,
        "HAS_MASK1": masks[-1] is not None,
        "STRIDED": classes > 1,
        "WHOLE": filters % config.filters == channels % config.channels == 0,
        "WIDE": max(tile_pixels + config.pixels, reach) >= 2**31,
        "LONG_BITS": sum(kernel_size) > 31,
        "UPCAST": not isinstance(input_gradient_kernel, JIT) and weight.dtype.itemsize == 2,
        "IN_VECTOR": in_vector,
        "OUT_VECTOR": out_vector,
        "PIXELS": config.pixels,
        "FILTERS": config.filters,
        "CHANNELS": config.channels,
    }
    arguments = [
        gradients[0],
        gradients[-1],
        weight,
        *(weight if m is None else m for m in (masks[0], masks[-1])),
        outputs[0],
        outputs[-1],
        *_geometry(
            of_output.sizes, of_gradient.sizes, channels // in_vector, filters // out_vector, groups
        ),
        *kernel_size,
        *strides,
        *three(padding, 0),
        *dilations,
        *every,
    ]
    tiles = triton.cdiv(tile_pixels, config.pixels) * triton.cdiv(channels, config.channels)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(input_gradient_kernel, tiles * groups * classes, arguments, constants, options)


def masked_conv_input_gradient(
    gradients: Sequence[Tensor],  # of each model [N, K, *out], channels-last and dense
    weight: Tensor,  # [K, *kernel, C], contiguous
    masks: Sequence[Tensor | None],  # int32 [K, taps, words], see pack_mask
    outputs: Sequence[Tensor],  # of each model [N, groups * C, *spatial], as gradients; written
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: TileConfig | None = None,
    wrap: Callable[[Any], Any] = plain,
) -> None:
    """Gradient of the inputs of a layer of one model or of two, in one launch.

    Equivalent to::

        for gradient, mask, output in zip(gradients, masks, outputs):
            output.copy_(conv_transpose(gradient, weight * mask, stride, padding, dilation, groups))

    with what the output size leaves open; arguments as of `masked_conv_nhwc`.
    """
    if outputs[0].numel() == 0:
        return
    launch = plan_input_gradient(
        gradients, weight, masks, outputs, stride, padding, dilation, groups, config
    )
    run(launch, wrap)


# Programs that a weight gradient is cut into, at least: two for each of an H100's 132 processors.
_PROGRAMS = 264
_STEPS_OF_A_PART = 8  # at least: a part that is too small only writes sums


def plan_weight_gradient(
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: TileConfig | None,
) -> Launch:
    """The launch of `masked_conv_weight_gradient`; the last tensor is the buffer of its parts."""
    rank = len(stride)
    x = inputs[0]
    of_gradient, of_input = pixels_of(gradients[0], rank), pixels_of(x, rank)
    axis = 1 if rank else -1
    channels, filters = x.shape[axis] // groups, gradients[0].shape[axis] // groups
    config = config or weight_gradient_config(channels, filters)
    kernels, strides, paddings = three(kernel_size, 1), three(stride, 1), three(padding, 0)
    taps = math.prod(kernels)
    pixels = of_gradient.count
    tiles = triton.cdiv(filters, config.filters) * triton.cdiv(channels, config.channels)
    tiles *= groups * taps
    steps = triton.cdiv(pixels, config.pixels)
    parts = max(1, min(triton.cdiv(_PROGRAMS, tiles), steps // _STEPS_OF_A_PART))
    steps = triton.cdiv(steps, parts)
    in_vector, out_vector = vector(x, channels), vector(x, filters)
    constants = {
        "DUAL": len(gradients) == 2,
        "SHARED_INPUT": is_shared(inputs),
        "HAS_MASK0": masks[0] is not None,
        "HAS_MASK1": masks[-1] is not None,
        "POINTWISE": taps == max(strides) == 1
        and not any(paddings)
        and of_input.sizes == of_gradient.sizes,
        "WHOLE": filters % config.filters == channels % config.channels == 0,
        "WIDE": max(x.numel(), gradients[0].numel()) >= 2**30,
        "UPCAST": not isinstance(weight_gradient_kernel, JIT) and x.dtype.itemsize == 2,
        "IN_VECTOR": in_vector,
        "OUT_VECTOR": out_vector,
        "PIXELS": config.pixels,
        "FILTERS": config.filters,
        "CHANNELS": config.channels,
    }
    buffer = x.new_empty((parts, groups * filters, taps, channels), dtype=torch.float32)
    arguments = [
        gradients[0],
        gradients[-1],
        x,
        inputs[-1],
        *(x if m is None else m for m in (masks[0], masks[-1])),
        buffer,
        *_geometry(
            of_input.sizes, of_gradient.sizes, channels // in_vector, filters // out_vector, groups
        ),
        *kernels,
        *strides,
        *paddings,
        *three(dilation, 1),
        steps,
    ]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(weight_gradient_kernel, tiles * parts, arguments, constants, options)


def masked_conv_weight_gradient(
    gradients: Sequence[Tensor],  # of each model [N, K, *out], channels-last and dense
    inputs: Sequence[Tensor],  # of each model [N, groups * C, *spatial], as gradients
    masks: Sequence[Tensor | None],  # int32 [K, taps, words], see pack_mask
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: TileConfig | None = None,
    wrap: Callable[[Any], Any] = plain,
) -> Tensor:  # [K, *kernel, C]
    """Gradient of the weight that the models share: the sum over the models, masked by each one's.

    The same bits every time, for equal sizes and tile; sums in fp32, returned in the inputs' dtype.
    Arguments as of `masked_conv_nhwc`.
    """
    x = inputs[0]
    launch = plan_weight_gradient(
        gradients, inputs, masks, kernel_size, stride, padding, dilation, groups, config
    )
    buffer: Tensor = launch.arguments[6]
    run(launch, wrap)
    filters, _, channels = buffer.shape[1:]
    return buffer.sum(0).to(x.dtype).view(filters, *kernel_size, channels)
