"""Triton kernels of the masked convolution, with the contract of masked_conv_nhwc.h.

An implicit matrix product: a program computes a tile of [pixels, filters] of one group, for one
model or for both, in steps of CHANNELS channels of one tap. The tile of weights is loaded once for
both models; that of the inputs too where the models share them. The fp32 sums get their scale,
bias, residual and activation in registers and leave once.

The pixels are the rows, for wgmma takes 64 at a time and there are always enough of them; masked
weights then go through shared memory once more. With the filters as rows they could stay in
registers, but ptxas waits for every such wgmma before it issues the next (16 waits in the loop
instead of 3; tile of 128 pixels, 64 filters, 64 channels, sm_90, Triton 3.9).

Mask bits: the words of a tile are loaded as [FILTERS, CHANNELS / 32] and broadcast over their 32
channels, which costs 3 instructions a weight (test, select, pack) of the 312 in that loop. A load of
the word for each weight, the obvious way, copies every word 32 times to shared memory: 132
asynchronous copies in the kernel instead of 39, 104 KiB instead of 73. Inline PTX that builds the
masks of two weights with a byte permutation needs 2 instructions a weight, not worth the loss of the
interpreter, the twin of the compiler in the tests.

Filters of few channels have kernels of their own: with one group (an image's channels) a step runs
over taps and channels together (GATHER); with several (depthwise) nothing is multiplied as a matrix.

Kernel size, stride, padding, dilation and all sizes are run-time values, so that a network needs a
handful of cubins; only the first layer's GATHER and depthwise kernels are compiled for their taps. Whatever decides about the
width of memory accesses is passed in units of IN_VECTOR or OUT_VECTOR values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_conv_parts import expand, finish, keep, load, position

__all__ = ["direct_kernel", "dot_kernel", "pack_mask_kernel"]

# How a step of the matrix product finds its inputs.
POINTWISE = tl.constexpr(0)  # one tap, stride 1, no padding: pixel i of the input
WINDOW = tl.constexpr(1)  # CHANNELS channels of one tap
GATHER = tl.constexpr(2)  # CHANNELS pairs of tap and channel

_GEOMETRY = [
    "pixels",
    "out_depth",
    "out_height",
    "out_width",
    "depth",
    "height",
    "width",
    "in_image_stride",
    "in_depth_stride",
    "in_row_stride",
    "in_pixel_stride",
    "out_pixel_stride",
    "residual_pixel_stride",
    "channels",
    "filters",
    "groups",
    "taps",
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


# ------------------------------------------------------------------------------ matrix product


@triton.jit
def _finish_in_parts(
    acc,
    scale,
    bias,
    residual,
    output,
    first_filter,
    filters,
    group_start,
    row,
    residual_row,
    slope,
    of_pixel,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`finish` for halves of the filters, one after the other: their operands fit the registers."""
    PIXELS: tl.constexpr = acc.shape[0]
    FILTERS: tl.constexpr = acc.shape[1]
    if PARTS == 1:
        of_group = first_filter + tl.arange(0, FILTERS)
        finish(
            acc,
            scale,
            bias,
            residual,
            output,
            group_start + of_group,
            row,
            residual_row,
            slope,
            of_pixel,
            of_group < filters,
            HAS_SCALE,
            HAS_BIAS,
            HAS_RESIDUAL,
            ACTIVATION,
        )
    else:
        halves = tl.permute(tl.reshape(acc, (PIXELS, 2, FILTERS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish_in_parts(
            left,
            scale,
            bias,
            residual,
            output,
            first_filter,
            filters,
            group_start,
            row,
            residual_row,
            slope,
            of_pixel,
            HAS_SCALE,
            HAS_BIAS,
            HAS_RESIDUAL,
            ACTIVATION,
            PARTS // 2,
        )
        _finish_in_parts(
            right,
            scale,
            bias,
            residual,
            output,
            first_filter + FILTERS // 2,
            filters,
            group_start,
            row,
            residual_row,
            slope,
            of_pixel,
            HAS_SCALE,
            HAS_BIAS,
            HAS_RESIDUAL,
            ACTIVATION,
            PARTS // 2,
        )


@triton.jit(do_not_specialize=[*_GEOMETRY, "slope"])
def dot_kernel(
    input0,
    input1,
    weight,
    mask0,
    mask1,
    scale0,
    scale1,
    bias0,
    bias1,
    residual0,
    residual1,
    output0,
    output1,
    pixels,
    out_depth,
    out_height,
    out_width,
    depth,
    height,
    width,
    in_image_stride,
    in_depth_stride,
    in_row_stride,
    in_pixel_stride,
    out_pixel_stride,
    residual_pixel_stride,
    channels,
    filters,
    groups,
    taps,
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
    slope,
    DUAL: tl.constexpr,
    SHARED_INPUT: tl.constexpr,
    HAS_MASK0: tl.constexpr,
    HAS_MASK1: tl.constexpr,
    HAS_SCALE0: tl.constexpr,
    HAS_SCALE1: tl.constexpr,
    HAS_BIAS0: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_RESIDUAL0: tl.constexpr,
    HAS_RESIDUAL1: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,
    GATHER_CHANNELS: tl.constexpr,  # what a pair's number is divided by
    GATHER_HEIGHT: tl.constexpr,
    GATHER_WIDTH: tl.constexpr,
    WHOLE_CHANNELS: tl.constexpr,  # CHANNELS divides the channels
    WIDE: tl.constexpr,  # offsets inside a tile need 64 bits
    LONG_BITS: tl.constexpr,  # the kernel's sizes add up to more than 31
    UPCAST: tl.constexpr,  # multiply in fp32 (the interpreter multiplies the bits of bf16)
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" or "tf32"
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,  # of the filters, finished one after the other
):
    """A tile [PIXELS, FILTERS] of one group, of one model or of both; `filters` are of one group."""
    channels = channels * IN_VECTOR
    filters = filters * OUT_VECTOR
    words = (channels + 31) // 32
    # The tiles of filters and groups at one place of the image follow each other: their inputs meet
    # in the L2 cache.
    filter_tiles = (filters + FILTERS - 1) // FILTERS
    tiles = filter_tiles * groups
    program = tl.program_id(0)
    pixel_tile = program // tiles
    group = program % tiles // filter_tiles
    first_of_group = program % tiles % filter_tiles * FILTERS
    if WIDE:
        pixel_tile = pixel_tile.to(tl.int64)
    first_pixel = pixel_tile * PIXELS
    pixel = first_pixel + tl.arange(0, PIXELS)
    of_pixel = pixel < pixels
    first_filter = (group * filters + first_of_group).to(tl.int64)
    k = tl.arange(0, CHANNELS)

    # An address is a 64-bit base, the same for the tile and moved in every step, and an offset that
    # stays: 32 bits, unless tiles are WIDE, for registers are what the loop has least of.
    # Rows beyond the last are the last one again, which needs no mask, and are not stored.
    filter_row = tl.minimum(tl.arange(0, FILTERS), filters - 1 - first_of_group)
    weight += first_filter * (taps * channels)
    weight_at = filter_row * (taps * channels)
    mask0 += first_filter * (taps * words)
    mask1 += first_filter * (taps * words)
    mask_at = filter_row * (taps * words)
    image_step = in_image_stride.to(tl.int64) * IN_VECTOR
    plane_step = in_depth_stride.to(tl.int64) * IN_VECTOR
    row_step = in_row_stride.to(tl.int64) * IN_VECTOR
    pixel_step = in_pixel_stride * IN_VECTOR
    first_at = (group * channels).to(tl.int64)
    if FORM == POINTWISE:
        first_at += first_pixel.to(tl.int64) * pixel_step
        last_row = pixels - 1 - first_pixel
        in_at = tl.minimum(tl.arange(0, PIXELS), last_row.to(tl.int32)) * pixel_step
    else:
        image, z, y, x = position(pixel, out_depth, out_height, out_width)
        z = (z * stride_d - padding_d).to(tl.int32)
        y = (y * stride_h - padding_h).to(tl.int32)
        x = (x * stride_w - padding_w).to(tl.int32)
        first_image = first_pixel // (out_depth * out_height * out_width)
        first_at += first_image * image_step
        if WIDE:
            pixel_step = pixel_step.to(tl.int64)
            in_at = (image - first_image) * image_step + z * plane_step + y * row_step
        else:
            plane_step = plane_step.to(tl.int32)
            row_step = row_step.to(tl.int32)
            in_at = (image - first_image) * image_step.to(tl.int32)
            in_at += z * plane_step + y * row_step
        in_at += x * pixel_step
        # Which taps fall into the image: a bit for each place of the kernel in each dimension.
        one = tl.full((), 1, tl.int64 if LONG_BITS else tl.int32)
        reach = tl.zeros((PIXELS,), tl.int64 if LONG_BITS else tl.int32)
        for t in range(kernel_width):
            at = x + t * dilation_w
            reach += ((at >= 0) & (at < width) & of_pixel).to(one.dtype) << t
        for t in range(kernel_height):
            at = y + t * dilation_h
            reach += ((at >= 0) & (at < height)).to(one.dtype) << (kernel_width + t)
        for t in range(taps // (kernel_width * kernel_height)):
            at = z + t * dilation_d
            inside = ((at >= 0) & (at < depth)).to(one.dtype)
            reach += inside << (kernel_width + kernel_height + t)
    input0 += first_at
    input1 += first_at

    acc0 = tl.zeros((PIXELS, FILTERS), tl.float32)
    acc1 = tl.zeros((PIXELS, FILTERS), tl.float32)

    if FORM == GATHER:
        steps = (taps * channels + CHANNELS - 1) // CHANNELS
    else:
        steps = taps * ((channels + CHANNELS - 1) // CHANNELS)
    # Where a step is: its tap, its first channel, and what follows from them.
    tap_z = 0
    tap_y = 0
    tap_x = 0
    channel = 0
    from_weight = 0
    from_word = 0
    for step in range(steps):
        if FORM == GATHER:
            pair = step * CHANNELS + k
            tap_k = pair // GATHER_CHANNELS
            c = pair % GATHER_CHANNELS
            x_k = tap_k % GATHER_WIDTH
            y_k = tap_k // GATHER_WIDTH % GATHER_HEIGHT
            z_k = tap_k // (GATHER_WIDTH * GATHER_HEIGHT)
            from_row = z_k * (dilation_d * plane_step) + y_k * (dilation_h * row_step)
            from_row += x_k * (dilation_w * pixel_step) + c
            of_step = pair < taps * channels
            need_k = (one << x_k) + (one << (kernel_width + y_k))
            need_k += one << (kernel_width + kernel_height + z_k)
            valid = ((reach[:, None] & need_k[None, :]) == need_k[None, :]) & of_step[None, :]
            in_tile = in_at[:, None] + from_row[None, :]
            weight_tile = weight_at[:, None] + pair[None, :]
            word_tile = mask_at[:, None] + (tap_k * words + c // 32)[None, :]
            of_word = of_step
            input_from = 0
        else:
            if FORM == POINTWISE:
                input_from = channel
            else:
                # A tap is less far away than a tile is long, or it is WIDE.
                input_from = tap_z * (dilation_d * plane_step) + tap_y * (dilation_h * row_step)
                input_from += tap_x * (dilation_w * pixel_step) + channel
                need = (one << tap_x) + (one << (kernel_width + tap_y))
                need += one << (kernel_width + kernel_height + tap_z)
                valid = ((reach & need) == need)[:, None]
            in_tile = in_at[:, None] + k[None, :]
            weight_tile = weight_at[:, None] + k[None, :]
            word_tile = mask_at[:, None] + tl.arange(0, CHANNELS // 32)[None, :]
            if not WHOLE_CHANNELS:
                of_step = channel + k < channels
                of_word = channel // 32 + tl.arange(0, CHANNELS // 32) < words
                valid = of_step[None, :] if FORM == POINTWISE else valid & of_step[None, :]

        if FORM == POINTWISE and WHOLE_CHANNELS:
            valid = None
        if FORM != GATHER and WHOLE_CHANNELS:
            of_weight = None
            of_word = None
        else:
            of_weight = of_step[None, :]
            of_word = of_word[None, :]
        a0 = load(input0 + input_from + in_tile, valid)
        a1 = a0
        if DUAL and not SHARED_INPUT:
            a1 = load(input1 + input_from + in_tile, valid)
        b = load(weight + from_weight + weight_tile, of_weight)
        b0 = b
        b1 = b
        if HAS_MASK0:
            words0 = load(mask0 + from_word + word_tile, of_word)
            if FORM == GATHER:
                b0 = keep(b, (words0 >> (c % 32)[None, :]) & 1)
            else:
                b0 = keep(b, expand(words0, FILTERS, CHANNELS))
        if DUAL and HAS_MASK1:
            words1 = load(mask1 + from_word + word_tile, of_word)
            if FORM == GATHER:
                b1 = keep(b, (words1 >> (c % 32)[None, :]) & 1)
            else:
                b1 = keep(b, expand(words1, FILTERS, CHANNELS))
        if UPCAST:
            a0 = a0.to(tl.float32)
            b0 = b0.to(tl.float32)
            a1 = a1.to(tl.float32)
            b1 = b1.to(tl.float32)
        acc0 = tl.dot(a0, tl.trans(b0), acc0, input_precision=PRECISION)
        if DUAL:
            acc1 = tl.dot(a1, tl.trans(b1), acc1, input_precision=PRECISION)

        if FORM == POINTWISE:
            channel += CHANNELS
            from_weight += CHANNELS
            from_word += CHANNELS // 32
        elif FORM == WINDOW:
            next_tap = channel + CHANNELS >= channels
            from_weight += tl.where(next_tap, channels - channel, CHANNELS)
            from_word += tl.where(next_tap, words - channel // 32, CHANNELS // 32)
            channel = tl.where(next_tap, 0, channel + CHANNELS)
            tap_x += next_tap.to(tl.int32)
            next_row = tap_x == kernel_width
            tap_x = tl.where(next_row, 0, tap_x)
            tap_y += next_row.to(tl.int32)
            next_plane = tap_y == kernel_height
            tap_y = tl.where(next_plane, 0, tap_y)
            tap_z += next_plane.to(tl.int32)

    row = pixel.to(tl.int64)
    out_row = row * (out_pixel_stride * OUT_VECTOR)
    residual_row = row * (residual_pixel_stride * OUT_VECTOR)
    _finish_in_parts(
        acc0,
        scale0,
        bias0,
        residual0,
        output0,
        first_of_group,
        filters,
        group * filters,
        out_row,
        residual_row,
        slope,
        of_pixel,
        HAS_SCALE0,
        HAS_BIAS0,
        HAS_RESIDUAL0,
        ACTIVATION,
        PARTS,
    )
    if DUAL:
        _finish_in_parts(
            acc1,
            scale1,
            bias1,
            residual1,
            output1,
            first_of_group,
            filters,
            group * filters,
            out_row,
            residual_row,
            slope,
            of_pixel,
            HAS_SCALE1,
            HAS_BIAS1,
            HAS_RESIDUAL1,
            ACTIVATION,
            PARTS,
        )


# ------------------------------------------------------------------------------ depthwise


@triton.jit
def _kept_bits(mask, word, bit, of_filter):
    return (tl.load(mask + word, mask=of_filter, other=0) >> bit) & 1


@triton.jit(do_not_specialize=[*(n for n in _GEOMETRY if n != "kernel_width"), "slope"])
def direct_kernel(
    input0,
    input1,
    weight,
    mask0,
    mask1,
    scale0,
    scale1,
    bias0,
    bias1,
    residual0,
    residual1,
    output0,
    output1,
    pixels,
    out_depth,
    out_height,
    out_width,
    depth,
    height,
    width,
    in_image_stride,
    in_depth_stride,
    in_row_stride,
    in_pixel_stride,
    out_pixel_stride,
    residual_pixel_stride,
    channels,
    filters,
    groups,
    taps,
    kernel_height,
    kernel_width: tl.constexpr,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    slope,
    DUAL: tl.constexpr,
    SHARED_INPUT: tl.constexpr,
    HAS_MASK0: tl.constexpr,
    HAS_MASK1: tl.constexpr,
    HAS_SCALE0: tl.constexpr,
    HAS_SCALE1: tl.constexpr,
    HAS_BIAS0: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_RESIDUAL0: tl.constexpr,
    HAS_RESIDUAL1: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTHWISE: tl.constexpr,  # filter k reads channel k
    WIDE: tl.constexpr,  # pixel numbers need 64 bits
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    FILTERS: tl.constexpr,
):
    """A tile [PIXELS, FILTERS], over the borders of groups, for groups of few channels.

    `channels` are of one group and plain; `filters` are of all groups.
    """
    filters_of_group = filters * OUT_VECTOR // groups
    filters = filters * OUT_VECTOR
    words = (channels + 31) // 32
    filter_tiles = (filters + FILTERS - 1) // FILTERS
    program = tl.program_id(0)
    pixel_tile = program // filter_tiles
    if WIDE:
        pixel_tile = pixel_tile.to(tl.int64)
    pixel = pixel_tile * PIXELS + tl.arange(0, PIXELS)
    of_pixel = pixel < pixels
    filter = program % filter_tiles * FILTERS + tl.arange(0, FILTERS)
    of_filter = filter < filters

    image, out_z, out_y, out_x = position(pixel, out_depth, out_height, out_width)
    z = (out_z * stride_d - padding_d).to(tl.int32)
    y = (out_y * stride_h - padding_h).to(tl.int32)
    x = (out_x * stride_w - padding_w).to(tl.int32)
    plane_step = in_depth_stride.to(tl.int64) * IN_VECTOR
    row_step = in_row_stride.to(tl.int64) * IN_VECTOR
    pixel_step = in_pixel_stride.to(tl.int64) * IN_VECTOR
    in_row = image * (in_image_stride.to(tl.int64) * IN_VECTOR)
    in_row += z * plane_step + y * row_step + x * pixel_step
    first_channel = filter if DEPTHWISE else filter // filters_of_group * channels
    in_at = in_row[:, None] + first_channel[None, :]
    weight_row = filter.to(tl.int64) * (taps * channels)
    mask_row = filter.to(tl.int64) * (taps * words)

    acc0 = tl.zeros((PIXELS, FILTERS), tl.float32)
    acc1 = tl.zeros((PIXELS, FILTERS), tl.float32)
    tap_z = 0
    tap_y = 0
    for tap_row in range(taps // kernel_width):
        dz = tap_z * dilation_d
        dy = tap_y * dilation_h
        in_plane = of_pixel & (z + dz >= 0) & (z + dz < depth) & (y + dy >= 0) & (y + dy < height)
        from_plane = dz * plane_step + dy * row_step
        # Unrolled over one dimension alone: the loads of a row of taps are under way together.
        for tap_x in tl.static_range(kernel_width):
            dx = tap_x * dilation_w
            valid = in_plane & (x + dx >= 0) & (x + dx < width)
            valid = valid[:, None] & of_filter[None, :]
            from_tap = from_plane + dx * pixel_step
            tap = tap_row * kernel_width + tap_x
            for c in range(1 if DEPTHWISE else channels):
                a0 = tl.load(input0 + in_at + (from_tap + c), mask=valid, other=0.0)
                a0 = a0.to(tl.float32)
                at = weight_row + (tap * channels + c)
                b = tl.load(weight + at, mask=of_filter, other=0.0).to(tl.float32)
                b0 = b
                b1 = b
                word = mask_row + (tap * words + c // 32)
                if HAS_MASK0:
                    b0 = keep(b, _kept_bits(mask0, word, c % 32, of_filter))
                acc0 = tl.fma(a0, b0[None, :], acc0)
                if DUAL:
                    if SHARED_INPUT:
                        a1 = a0
                    else:
                        a1 = tl.load(input1 + in_at + (from_tap + c), mask=valid, other=0.0)
                        a1 = a1.to(tl.float32)
                    if HAS_MASK1:
                        b1 = keep(b, _kept_bits(mask1, word, c % 32, of_filter))
                    acc1 = tl.fma(a1, b1[None, :], acc1)
        tap_y += 1
        next_plane = tap_y == kernel_height
        tap_y = tl.where(next_plane, 0, tap_y)
        tap_z += next_plane.to(tl.int32)

    row = pixel.to(tl.int64)
    out_row = row * (out_pixel_stride * OUT_VECTOR)
    residual_row = row * (residual_pixel_stride * OUT_VECTOR)
    finish(
        acc0,
        scale0,
        bias0,
        residual0,
        output0,
        filter,
        out_row,
        residual_row,
        slope,
        of_pixel,
        of_filter,
        HAS_SCALE0,
        HAS_BIAS0,
        HAS_RESIDUAL0,
        ACTIVATION,
    )
    if DUAL:
        finish(
            acc1,
            scale1,
            bias1,
            residual1,
            output1,
            filter,
            out_row,
            residual_row,
            slope,
            of_pixel,
            of_filter,
            HAS_SCALE1,
            HAS_BIAS1,
            HAS_RESIDUAL1,
            ACTIVATION,
        )


# ------------------------------------------------------------------------------ masks


@triton.jit(do_not_specialize=["channels", "taps", "count"])
def pack_mask_kernel(mask, words, channels, taps, count, BLOCK: tl.constexpr):
    """Words [K, taps, words of a tap] of a bool mask [K, C, taps]; a program makes BLOCK words."""
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_tap = (channels + 31) // 32
    filter = word // (taps * of_tap)
    tap = word // of_tap % taps
    bit = tl.arange(0, 32)[None, :]
    channel = (word % of_tap * 32)[:, None] + bit
    at = (filter[:, None] * channels + channel) * taps + tap[:, None]
    inside = (word < count)[:, None] & (channel < channels)
    kept = tl.load(mask + at, mask=inside, other=0).to(tl.int32)
    # Each bit is in one summand alone: the sum is their union, bit 31 being the sign.
    tl.store(words + word, tl.sum(kept << bit, 1), mask=word < count)
