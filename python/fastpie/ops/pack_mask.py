"""The operator `pack_mask`: one bit for each weight, as kernels on channels-last tensors read it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["pack_mask"]

_WORD = 32  # bits

_native.library.define("pack_mask(Tensor codes, int level) -> Tensor")


def pack_mask(
    mask: Tensor,  # bool, True = kept, or uint8 level codes [K, C, *kernel]
    level: int | None = None,
) -> Tensor:  # int32 [K, taps, ceil(C / 32)]
    """Pack a mask into words of 32 bits, the bits of a word from neighbouring channels.

    Equivalent to::

        fastpie.ops.reference.pack_mask(mask)  # of a bool mask
        fastpie.ops.reference.pack_mask(mask > level)  # of level codes

    Args:
        mask: bool, or the codes of a ladder (`Masks.levels`): the index of the level that removes
            each weight. The shape of a weight: filters, channels of a group, then the kernel.
        level: which level of the codes, in [0, 255); None for a bool mask.

    Returns:
        Bit c % 32 of word c // 32 is set where the weight of channel c is kept; bits beyond C are
        0. Taps are in C order; words are int32 on the device of `mask`.

    Raises:
        FastpieError: for another dtype, fewer than two dimensions, or a level that does not fit.
    """
    if mask.ndim < 2:
        raise FastpieError(
            f"Expected `mask` to have shape [K, C, *kernel], but got {list(mask.shape)}."
        )
    if mask.dtype is torch.bool:
        if level is not None:
            raise FastpieError(f"Expected no `level` with a bool `mask`, but got {level!r}.")
        return torch.ops.fastpie.pack_mask(mask, 0)  # type: ignore[no-any-return]
    if mask.dtype is not torch.uint8:
        raise FastpieError(f"Expected `mask` to be bool or uint8, but got {mask.dtype}.")
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level < 255:
        raise FastpieError(f"Expected `level` to be an int in [0, 255), but got {level!r}.")
    return torch.ops.fastpie.pack_mask(mask, level)  # type: ignore[no-any-return]


def _kernel_arguments(codes: Tensor, level: int) -> tuple[Tensor, list[Any], Tensor]:
    """Output, arguments of the native call, and the tensor that must outlive it."""
    codes = codes.contiguous()
    filters, channels, *kernel = codes.shape
    taps = math.prod(kernel)
    words = codes.new_empty((filters, taps, -(-channels // _WORD)), dtype=torch.int32)
    return words, [codes.data_ptr(), words.data_ptr(), (filters, channels, taps), level], codes


@torch.library.impl(_native.library, "pack_mask", "CPU")
def _pack_mask_cpu(codes: Tensor, level: int) -> Tensor:
    words, arguments, _alive = _kernel_arguments(codes, level)
    _native.call(_C.pack_mask_cpu, *arguments, torch.get_num_threads())
    return words


@torch.library.impl(_native.library, "pack_mask", "CUDA")
def _pack_mask_cuda(codes: Tensor, level: int) -> Tensor:
    if _native.cuda_unusable_reason() is not None:
        return _native.triton_kernels().pack_mask(codes > level)  # type: ignore[no-any-return]
    words, arguments, _alive = _kernel_arguments(codes, level)
    with torch.cuda.device(codes.device):
        _native.call(_C.pack_mask_cuda, *arguments, _native.cuda_stream(codes))
    return words


def _pack_mask_twin(codes: Tensor, level: int) -> Tensor:
    return reference.pack_mask(codes > level)


_native.library.impl("pack_mask", _pack_mask_twin, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpie::pack_mask", lib=_native.library)
def _pack_mask_fake(codes: Tensor, level: int) -> Tensor:
    filters, channels, *kernel = codes.shape
    shape = (filters, math.prod(kernel), -(-channels // _WORD))
    return codes.new_empty(shape, dtype=torch.int32)
