"""The operator `embedding_disagreement`: the drift of embeddings, row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["embedding_disagreement"]

_native.library.define("embedding_disagreement(Tensor dense, Tensor pruned) -> Tensor")


def embedding_disagreement(
    dense: Tensor,  # [N, D]
    pruned: Tensor,  # [L, N, D]
) -> Tensor:  # [L, N]
    """L2 distance of the L2-normalised embeddings of two models, in [0, 2] (arXiv 2605.13396).

    Equivalent to::

        z = torch.nn.functional.normalize(dense.double(), dim=-1)
        y = torch.nn.functional.normalize(pruned.double(), dim=-1)
        drift = torch.linalg.vector_norm(z - y, dim=-1).float()

    fp32, bf16 and fp16 embeddings run on a kernel, with fp64 arithmetic on every device; fp64 ones
    compute the lines above and give fp64. Any strides are read as they are. Differentiable once.

    Args:
        dense: embeddings of the dense model.
        pruned: embeddings of the pruned model at L levels, same dtype and device.

    Returns:
        fp32 [L, N] on the device of the inputs: exactly 0 for equal rows, NaN where either row has
        NaN or an infinity.

    Raises:
        FastpieError: for shapes, dtypes or devices that do not fit together.
    """
    if dense.ndim != 2:
        raise FastpieError(f"Expected `dense` to have shape [N, D], but got {list(dense.shape)}.")
    _native.check_outputs(dense, pruned)
    return torch.ops.fastpie.embedding_disagreement(dense, pruned)  # type: ignore[no-any-return]


def _kernel_arguments(dense: Tensor, pruned: Tensor) -> tuple[Tensor, list[Any]]:
    """Output, and arguments of the native call."""
    out = torch.empty(pruned.shape[:2], dtype=torch.float32, device=dense.device)
    arguments: list[Any] = [
        dense.data_ptr(),
        dense.stride(),
        pruned.data_ptr(),
        pruned.stride(),
        out.data_ptr(),
        _native.LOGIT_DTYPES[dense.dtype],
        tuple(pruned.shape),
    ]
    return out, arguments


@torch.library.impl(_native.library, "embedding_disagreement", "CPU")
def _embedding_disagreement_cpu(dense: Tensor, pruned: Tensor) -> Tensor:
    if dense.dtype is torch.float64:
        return reference.embedding_disagreement(dense, pruned)
    out, arguments = _kernel_arguments(dense, pruned)
    _native.call(_C.embedding_disagreement_cpu, *arguments, torch.get_num_threads())
    return out


@torch.library.impl(_native.library, "embedding_disagreement", "CUDA")
def _embedding_disagreement_cuda(dense: Tensor, pruned: Tensor) -> Tensor:
    if dense.dtype is torch.float64:
        return reference.embedding_disagreement(dense, pruned)
    if _native.cuda_unusable_reason() is not None:
        triton_kernels = _native.triton_kernels()
        return triton_kernels.embedding_disagreement(dense, pruned)  # type: ignore[no-any-return]
    out, arguments = _kernel_arguments(dense, pruned)
    with torch.cuda.device(dense.device):
        _native.call(_C.embedding_disagreement_cuda, *arguments, _native.cuda_stream(dense))
    return out


_native.library.impl(
    "embedding_disagreement", reference.embedding_disagreement, "CompositeExplicitAutograd"
)


@torch.library.register_fake("fastpie::embedding_disagreement", lib=_native.library)
def _embedding_disagreement_fake(dense: Tensor, pruned: Tensor) -> Tensor:
    dtype = torch.float64 if dense.dtype is torch.float64 else torch.float32
    return dense.new_empty(pruned.shape[:2], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    dense, pruned = ctx.saved_tensors
    # Rows without a drift take no part: zeros in their place, and no incoming gradient.
    good = dense.isfinite().all(-1) & pruned.isfinite().all(-1)
    leaves = [
        torch.where(good.unsqueeze(-1), pruned.double(), 0.0).requires_grad_(),
        torch.where(dense.isfinite().all(-1, True), dense.double(), 0.0).requires_grad_(),
    ]
    with torch.enable_grad():
        drift = reference.embedding_disagreement(leaves[1], leaves[0])
    incoming = torch.where(good, gradient.double(), 0.0)
    of_pruned, of_dense = torch.autograd.grad(drift, leaves, incoming)
    return of_dense.to(dense.dtype), of_pruned.to(pruned.dtype)


torch.library.register_autograd(
    "fastpie::embedding_disagreement", _backward, setup_context=_setup_context, lib=_native.library
)
