"""Functions of Triton tiles that the convolution kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "expand", "finish", "keep", "load", "position"]

ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "leaky_relu",
    "hardswish",
    "silu",
    "gelu",
    "gelu_tanh",
)
_NONE, _RELU, _RELU6, _LEAKY_RELU, _HARDSWISH, _SILU, _GELU, _GELU_TANH = map(
    tl.constexpr, range(8)
)


@triton.jit
def _activate(x, slope, ACTIVATION: tl.constexpr):
    """The activation in fp32. Every comparison is false for NaN, which therefore passes."""
    if ACTIVATION == _RELU:
        x = tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == _RELU6:
        x = tl.where(x <= 0.0, 0.0, x)
        x = tl.where(x > 6.0, 6.0, x)
    elif ACTIVATION == _LEAKY_RELU:
        x = tl.where(x < 0.0, x * slope, x)
    elif ACTIVATION == _HARDSWISH:
        gate = x + 3.0
        gate = tl.where(gate <= 0.0, 0.0, gate)
        gate = tl.where(gate > 6.0, 6.0, gate)
        x = x * gate * (1.0 / 6.0)
    elif ACTIVATION == _SILU:
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == _GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == _GELU_TANH:  # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))
        u2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-u2))
    return x


@triton.jit
def keep(weight, bits):
    """The weights whose bit is set, and 0 for the others."""
    return tl.where(bits != 0, weight, 0.0)


@triton.jit
def load(pointers, mask):
    """What is there, 0 where the mask is false; None: everything is there."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@triton.jit
def expand(words, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Bits of words [ROWS, CHANNELS / 32] as int32 [ROWS, CHANNELS]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, CHANNELS))


@triton.jit
def position(pixel, depth, height, width):
    """Image and three coordinates of a pixel's number."""
    # Without a sign a division is a third shorter.
    unsigned: tl.constexpr = tl.uint32 if pixel.dtype == tl.int32 else tl.uint64
    pixel = pixel.to(unsigned)
    depth = depth.to(unsigned)
    height = height.to(unsigned)
    width = width.to(unsigned)
    row = pixel // width
    plane = row // height
    image = plane // depth
    x = (pixel - row * width).to(tl.int32)
    y = (row - plane * height).to(tl.int32)
    z = (plane - image * depth).to(tl.int32)
    return image.to(tl.int32), z, y, x


@triton.jit
def finish(
    acc,
    scale,
    bias,
    residual,
    output,
    filter,
    row,
    residual_row,
    slope,
    of_pixel,
    of_filter,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Scale, bias, residual and activation of a tile of sums, and its way to memory."""
    inside = of_pixel[:, None] & of_filter[None, :]
    if HAS_SCALE:
        acc = acc * tl.load(scale + filter, mask=of_filter, other=0.0)[None, :]
    if HAS_BIAS:
        acc = acc + tl.load(bias + filter, mask=of_filter, other=0.0)[None, :]
    if HAS_RESIDUAL:
        more = tl.load(residual + residual_row[:, None] + filter[None, :], mask=inside, other=0.0)
        acc = acc + more.to(tl.float32)
    acc = _activate(acc, slope, ACTIVATION)
    address = output + row[:, None] + filter[None, :]
    tl.store(address, acc.to(output.dtype.element_ty), mask=inside)
