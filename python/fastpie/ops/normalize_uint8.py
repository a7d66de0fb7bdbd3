"""The operator `normalize_uint8`: decoded images to what a network's first layer takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["normalize_uint8"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_native.library.define(
    "normalize_uint8(Tensor images, Tensor mean, Tensor std, ScalarType dtype, "
    "int channel_multiple) -> Tensor"
)


def normalize_uint8(
    images: Tensor,  # uint8 [N, C, H, W]
    mean: Tensor,  # fp32 [C]
    std: Tensor,  # fp32 [C]
    dtype: torch.dtype = torch.float32,
    channel_multiple: int = 1,
) -> Tensor:  # [N, P, H, W] of dtype, channels_last
    """Scale 8-bit images to [0, 1], subtract the mean and divide by the standard deviation.

    Equivalent to::

        x = (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -images.shape[1] % channel_multiple))
        output = x.to(dtype).contiguous(memory_format=torch.channels_last)

    The arithmetic is fp32; the only other rounding is to `dtype`, at the end. Bytes cross the bus
    and one pass over memory makes the input of a network of them. Not differentiable.

    Args:
        images: as decoded, values of 0 to 255; contiguous or channels_last, else copied.
        mean: of the channels, in the scale [0, 1].
        std: likewise.
        dtype: float32, bfloat16 or float16.
        channel_multiple: channels of zeros are added up to the next multiple of it: 8 channels of
            bf16 are 16 bytes, what a convolution loads at once.

    Returns:
        A new channels_last tensor; P = C rounded up to a multiple of `channel_multiple`.

    Raises:
        FastpieError: for shapes, dtypes or devices that do not fit together.
    """
    if images.dtype is not torch.uint8 or images.ndim != 4:
        raise FastpieError(
            f"Expected `images` to be uint8 of shape [N, C, H, W], but got {images.dtype} "
            f"{list(images.shape)}."
        )
    channels = images.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if values.dtype is not torch.float32 or values.shape != (channels,):
            raise FastpieError(
                f"Expected `{name}` to be float32 of shape [{channels}] (one value for each "
                f"channel), but got {values.dtype} {list(values.shape)}."
            )
    devices = {tensor.device for tensor in (images, mean, std)}
    if len(devices) > 1:
        raise FastpieError(
            f"Expected all tensors on one device, but got {sorted(map(str, devices))}."
        )
    if dtype not in _DTYPES:
        raise FastpieError(f"Expected `dtype` to be float32, bfloat16 or float16, but got {dtype}.")
    if (
        not isinstance(channel_multiple, int)
        or isinstance(channel_multiple, bool)
        or channel_multiple < 1
    ):
        raise FastpieError(
            f"Expected `channel_multiple` to be an int of at least 1, but got {channel_multiple!r}."
        )
    return torch.ops.fastpie.normalize_uint8(  # type: ignore[no-any-return]
        images, mean.detach(), std.detach(), dtype, channel_multiple
    )


def _empty(images: Tensor, dtype: torch.dtype, channel_multiple: int) -> Tensor:
    count, channels, height, width = images.shape
    padded = -(-channels // channel_multiple) * channel_multiple
    return torch.empty(
        (count, padded, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )


def _kernel_arguments(
    images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, channel_multiple: int
) -> tuple[Tensor, list[Any], tuple[Tensor, ...]]:
    """Output, arguments of the native call, and the tensors that must outlive it."""
    channels, pixels = images.shape[1], images.shape[2] * images.shape[3]
    if images.is_contiguous(memory_format=torch.channels_last):
        strides = (channels * pixels, 1, channels)
    else:
        images = images.contiguous()
        strides = (channels * pixels, pixels, 1)
    mean, std = mean.contiguous(), std.contiguous()
    output = _empty(images, dtype, channel_multiple)
    arguments = [
        images.data_ptr(),
        strides,
        mean.data_ptr(),
        std.data_ptr(),
        output.data_ptr(),
        _DTYPES[dtype],
        (images.shape[0], channels, pixels, output.shape[1]),
    ]
    return output, arguments, (images, mean, std)


@torch.library.impl(_native.library, "normalize_uint8", "CUDA")
def _normalize_uint8_cuda(
    images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, channel_multiple: int
) -> Tensor:
    if _native.cuda_unusable_reason() is not None:
        return reference.normalize_uint8(images, mean, std, dtype, channel_multiple)
    output, arguments, _alive = _kernel_arguments(images, mean, std, dtype, channel_multiple)
    with torch.cuda.device(images.device):
        _native.call(_C.normalize_uint8_cuda, *arguments, _native.cuda_stream(images))
    return output


_native.library.impl("normalize_uint8", reference.normalize_uint8, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpie::normalize_uint8", lib=_native.library)
def _normalize_uint8_fake(
    images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, channel_multiple: int
) -> Tensor:
    return _empty(images, dtype, channel_multiple)
