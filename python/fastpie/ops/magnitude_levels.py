"""The operator `magnitude_levels`: exact selection of the smallest weights, for a whole ladder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["DTYPES", "magnitude_levels"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the operator selects from; fp64 has no place in the fp32 that it compares."""

_MAX_LEVELS = 255
_BLOCKS_OF_MULTIPROCESSOR = 2  # as many as csrc/cuda/magnitude_levels.cu has room for

_native.library.define("magnitude_levels(Tensor[] weights, int[] counts) -> (Tensor, Tensor)")


def magnitude_levels(
    weights: Sequence[Tensor],  # each [...] fp32, bf16 or fp16
    counts: Sequence[int],  # [L], non-decreasing
) -> tuple[Tensor, Tensor]:  # uint8 [N], int64 [len(weights)]
    """For each weight the level that removes it: level l removes the counts[l] smallest of all.

    Equivalent to::

        fastpie.ops.reference.magnitude_levels(weights, counts)

    All tensors make one list of N weights, in order, each in C order; equal magnitudes are ordered
    by their place in it, the lower one goes first. The same bits on every device. On CUDA nothing
    waits for the GPU, and the tensors are read where they are.

    Args:
        weights: at least one tensor, all on one device; dtypes may differ.
        counts: how many weights each of 1 to 255 levels removes, in [0, N].

    Returns:
        The codes of the N weights: the index of the first level that removes it, L where none
        does. And how many weights of each tensor are NaN or infinite: where any are, the codes mean
        nothing.

    Raises:
        FastpieError: for other dtypes, several devices, or counts that do not fit.
    """
    weights, counts = list(weights), [int(count) for count in counts]
    if not weights:
        raise FastpieError("Expected at least one tensor of weights, but got none.")
    for weight in weights:
        if weight.dtype not in DTYPES:
            raise FastpieError(
                f"Expected `weights` to be float32, bfloat16 or float16, but got {weight.dtype}."
            )
    devices = {weight.device for weight in weights}
    if len(devices) > 1:
        raise FastpieError(
            f"Expected all weights on one device, but got {sorted(map(str, devices))}."
        )
    if not 1 <= len(counts) <= _MAX_LEVELS:
        raise FastpieError(f"Expected 1 to {_MAX_LEVELS} `counts`, but got {len(counts)}.")
    total = sum(weight.numel() for weight in weights)
    if any(b < a for a, b in itertools.pairwise([0, *counts, total])):
        raise FastpieError(
            f"Expected `counts` in [0, {total}] that do not decrease, but got {counts}."
        )
    return torch.ops.fastpie.magnitude_levels(weights, counts)  # type: ignore[no-any-return]


def _kernel_arguments(
    weights: Sequence[Tensor], counts: Sequence[int], blocks: int
) -> tuple[Tensor, Tensor, list[Any], list[Tensor]]:
    """Codes, counts of bad weights, arguments of the native call, what must outlive it."""
    weights = [weight.contiguous() for weight in weights]
    device = weights[0].device
    rows, first, first_tile = [], 0, 0
    for weight in weights:
        rows += [weight.data_ptr(), DTYPES[weight.dtype], first, first_tile]
        first += weight.numel()
        first_tile += -(-weight.numel() // _C.magnitude_tile)
    rows += [0, 0, first, first_tile]
    # One small copy; from pageable memory it is staged before the call returns.
    table = torch.tensor([*rows, *counts], dtype=torch.int64).to(device, non_blocking=True)
    size = _C.magnitude_levels_workspace(len(counts), blocks)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    codes = torch.empty(first, dtype=torch.uint8, device=device)
    nonfinite = torch.empty(len(weights), dtype=torch.int64, device=device)
    arguments = [
        table.data_ptr(),
        table[len(rows) :].data_ptr(),
        (len(weights), len(counts), first, first_tile),
        codes.data_ptr(),
        nonfinite.data_ptr(),
        blocks,
        workspace.data_ptr(),
    ]
    return codes, nonfinite, arguments, [*weights, table, workspace]


@torch.library.impl(_native.library, "magnitude_levels", "CUDA")
def _magnitude_levels_cuda(weights: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    if _native.cuda_unusable_reason() is not None:
        return reference.magnitude_levels(weights, counts)
    device = weights[0].device
    with torch.cuda.device(device):
        properties = torch.cuda.get_device_properties(device)
        blocks = _BLOCKS_OF_MULTIPROCESSOR * properties.multi_processor_count
        codes, nonfinite, arguments, _alive = _kernel_arguments(weights, counts, blocks)
        _native.call(_C.magnitude_levels_cuda, *arguments, _native.cuda_stream(codes))
    return codes, nonfinite


_native.library.impl("magnitude_levels", reference.magnitude_levels, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpie::magnitude_levels", lib=_native.library)
def _magnitude_levels_fake(weights: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    total = sum(weight.numel() for weight in weights)
    return (
        weights[0].new_empty(total, dtype=torch.uint8),
        weights[0].new_empty(len(weights), dtype=torch.int64),
    )
