"""Triton kernel of `null`: a copy, and the smallest example of a kernel here."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["null", "null_kernel"]

BLOCK = 1024


# `count` changes with every batch: were it specialised, each new divisibility would recompile.
@triton.jit(do_not_specialize=["count"])
def null_kernel(input, output, count, BLOCK: tl.constexpr):
    """Copy `count` values; one program copies BLOCK of them."""
    # int64: more than 2^31 values are no error.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    tl.store(output + offsets, tl.load(input + offsets, mask=inside), mask=inside)


def null(input: Tensor) -> Tensor:  # [...] fp32, contiguous
    """Copy a contiguous tensor; a CPU tensor under TRITON_INTERPRET=1."""
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    device = torch.cuda.device(input.device) if input.is_cuda else contextlib.nullcontext()
    with device:
        grid = (triton.cdiv(input.numel(), BLOCK),)
        null_kernel[grid](
            input, output, input.numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )
    return output
