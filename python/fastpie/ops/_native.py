"""Which native kernels can be used here, and the hand-over of tensors to them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError

__all__ = [
    "LOGIT_DTYPES",
    "call",
    "check_outputs",
    "cuda_stream",
    "cuda_unusable_reason",
    "library",
    "triton_kernels",
    "triton_unusable_reason",
]

library = torch.library.Library("fastpie", "DEF")
"""The torch.library namespace `torch.ops.fastpie` that every operator is defined in."""


def call(function: Callable[..., None], *args: Any) -> None:
    """Call a kernel of `_C` and turn its failed status into a FastpieError."""
    try:
        function(*args)
    except RuntimeError as error:
        raise FastpieError(str(error)) from error


LOGIT_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the scoring kernels read, and its code in `DType` of csrc/include/fastpie/status.h."""


def check_outputs(dense: Tensor, pruned: Tensor) -> None:
    """Refuse outputs of two models that no scoring operator can compare.

    Args:
        dense: [N, ...], outputs of the dense model.
        pruned: [L, N, ...], of the pruned one at L levels.

    Raises:
        FastpieError: if shapes, dtypes or devices do not fit together.
    """
    if pruned.ndim != dense.ndim + 1 or pruned.shape[1:] != dense.shape:
        shape = ", ".join(map(str, ["L", *dense.shape]))
        raise FastpieError(
            f"Expected `pruned` to have shape [{shape}] (levels, then the shape of `dense`), but "
            f"got {list(pruned.shape)}."
        )
    if dense.dtype not in (*LOGIT_DTYPES, torch.float64) or pruned.dtype is not dense.dtype:
        raise FastpieError(
            "Expected `dense` and `pruned` to be both float32, bfloat16, float16 or float64, but "
            f"got {dense.dtype} and {pruned.dtype}."
        )
    if pruned.device != dense.device:
        raise FastpieError(
            f"Expected all tensors on one device, but got {dense.device} and {pruned.device}."
        )


def cuda_stream(tensor: Tensor) -> int:
    """Address of the current stream of the tensor's device."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


@functools.cache
def cuda_unusable_reason() -> str | None:
    """Why the CUDA kernels cannot be used here, or None where they can."""
    if _C.cuda_architectures is None:
        return "this build has no CUDA kernels (nvcc was not found when it was compiled)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _C.cuda_unusable_reason() or None


@functools.cache
def triton_unusable_reason() -> str | None:
    """Why the Triton kernels cannot be used on a GPU here, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'fastpie[triton]')"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def triton_kernels() -> types.ModuleType:
    """The module `fastpie.triton_kernels`, imported on first use: importing Triton is slow."""
    return importlib.import_module("fastpie.triton_kernels")
