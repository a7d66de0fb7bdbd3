"""Triton kernel of `embedding_disagreement`, with the contract of its header in csrc/include.

A program scores a row at all levels, BLOCK elements at a time, and reads it twice: its length, then
the distance of the directions.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["embedding_disagreement", "embedding_disagreement_kernel", "launch_options"]

_LARGEST_BLOCK = 1024

# Whatever changes with the batch: a specialised value would recompile for 1 and for multiples of 16.
_PER_BATCH = ["levels", "rows", "pruned_level_stride"]


@triton.jit
def _elements(row, stride, start, size, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    return tl.load(row + i.to(tl.int64) * stride, mask=i < size, other=0.0).to(tl.float64)


@triton.jit
def _reciprocal_length(row, stride, size, BLOCK: tl.constexpr):
    """What a row is multiplied by. NaN or infinite elements make it NaN or 0: 0 * inf is NaN."""
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        x = _elements(row, stride, start, size, BLOCK)
        squares += x * x
    length = tl.sqrt(tl.sum(squares, 0))
    return 1.0 / tl.where(length < 1e-12, 1e-12, length)


@triton.jit(do_not_specialize=_PER_BATCH)
def embedding_disagreement_kernel(
    dense,
    pruned,
    out,
    levels,
    rows,
    size,
    dense_row_stride,
    dense_stride,
    pruned_level_stride,
    pruned_row_stride,
    pruned_stride,
    BLOCK: tl.constexpr,
):
    """Score one row at all levels."""
    n = tl.program_id(0).to(tl.int64)
    z_row = dense + n * dense_row_stride
    y_row = pruned + n * pruned_row_stride
    of_z = _reciprocal_length(z_row, dense_stride, size, BLOCK)
    out += n
    for _level in range(levels):
        of_y = _reciprocal_length(y_row, pruned_stride, size, BLOCK)
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(0, size, BLOCK):
            z = _elements(z_row, dense_stride, start, size, BLOCK)
            y = _elements(y_row, pruned_stride, start, size, BLOCK)
            difference = z * of_z - y * of_y
            squares += difference * difference
        tl.store(out, tl.sqrt(tl.sum(squares, 0)).to(tl.float32))
        y_row += pruned_level_stride
        out += rows


def launch_options(size: int) -> dict[str, int]:
    """Block size for embeddings of `size` elements."""
    return {"BLOCK": min(max(triton.next_power_of_2(max(size, 1)), 32), _LARGEST_BLOCK)}


def embedding_disagreement(
    dense: Tensor,  # [N, D] fp32, bf16 or fp16
    pruned: Tensor,  # [L, N, D]
) -> Tensor:  # [L, N]
    """Drift of every row, fp64 arithmetic, fp32 result.

    CUDA tensors, or CPU tensors under TRITON_INTERPRET=1.
    """
    levels, rows, size = pruned.shape
    out = torch.empty((levels, rows), dtype=torch.float32, device=dense.device)
    if out.numel() == 0:
        return out
    device = torch.cuda.device(dense.device) if dense.is_cuda else contextlib.nullcontext()
    with device:
        embedding_disagreement_kernel[(rows,)](
            dense,
            pruned,
            out,
            levels,
            rows,
            size,
            *dense.stride(),
            *pruned.stride(),
            num_warps=4,
            enable_fp_fusion=False,  # equal rows must give exactly 0
            **launch_options(size),
        )
    return out
