"""The operator `segmentation_disagreement`: hard and soft IoU of two segmentations of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["IOUS", "segmentation_disagreement"]

IOUS = ("iou", "iou_soft")
"""The rows of the operator's output, in the order of `Iou` in the contract header."""

_native.library.define("segmentation_disagreement(Tensor dense, Tensor pruned) -> Tensor")


def segmentation_disagreement(
    dense: Tensor,  # [N, C, ...]
    pruned: Tensor,  # [L, N, C, ...]
) -> Tensor:  # [2, L, N]
    """Hard and soft IoU of the foreground that two segmentation models predict, image by image.

    Equivalent to::

        fastpie.ops.reference.segmentation_disagreement(dense, pruned)

    With C == 1 a logit above 0 is foreground, else class 0 is the background. `iou`: pixels that
    both models give to the same foreground class, over the sum of what the classes cover in either;
    1 where both predict none. `iou_soft`: sum of the minima over sum of the maxima of the foreground
    probabilities; 1 where the latter is below 1e-30.

    fp32, bf16 and fp16 logits run on a kernel, in one pass over memory and without a tensor of
    probabilities: iou is exact, iou_soft within 1e-5 of its value whatever the size of the image,
    and mostly within 1e-7 (fp32 probabilities, fp64 sums). fp64 logits compute the twin above and give fp64. Strides are
    read as they are, if one of them leads from pixel to pixel, else the pixels are copied.
    iou_soft is differentiable once, by plain PyTorch in fp32 (fp64 for fp64 logits).

    Args:
        dense: logits of the dense model, C >= 1, with any number of spatial dimensions.
        pruned: logits of the pruned model at L levels, same dtype and device.

    Returns:
        fp32 [2, L, N] on the device of the inputs, rows in the order of `IOUS`. NaN for an image
        that has, in either model, NaN, +inf or (C >= 2) a pixel with nothing but -inf.

    Raises:
        FastpieError: for shapes, dtypes or devices that do not fit together.
    """
    if dense.ndim < 3 or dense.shape[1] == 0:
        raise FastpieError(
            "Expected `dense` to have shape [N, C, H, ...] with C >= 1, but got "
            f"{list(dense.shape)}."
        )
    _native.check_outputs(dense, pruned)
    return torch.ops.fastpie.segmentation_disagreement(  # type: ignore[no-any-return]
        dense, pruned
    )


def _kernel_arguments(dense: Tensor, pruned: Tensor) -> tuple[Tensor, list[Any], list[Tensor]]:
    """Output, arguments of the native call, and the tensors that must outlive it."""
    z, y = dense.flatten(2), pruned.flatten(3)
    levels, images, classes, pixels = y.shape
    out = torch.empty((len(IOUS), levels, images), dtype=torch.float32, device=z.device)
    size = _C.segmentation_disagreement_workspace(levels, images, pixels)
    partials = torch.empty(size, dtype=torch.uint8, device=z.device)
    arguments: list[Any] = [
        z.data_ptr(),
        z.stride(),
        y.data_ptr(),
        y.stride(),
        partials.data_ptr(),
        out.data_ptr(),
        _native.LOGIT_DTYPES[z.dtype],
        (levels, images, classes, pixels),
    ]
    return out, arguments, [z, y, partials]


@torch.library.impl(_native.library, "segmentation_disagreement", "CPU")
def _segmentation_disagreement_cpu(dense: Tensor, pruned: Tensor) -> Tensor:
    if dense.dtype is torch.float64:
        return reference.segmentation_disagreement(dense, pruned)
    out, arguments, _alive = _kernel_arguments(dense, pruned)
    _native.call(_C.segmentation_disagreement_cpu, *arguments, torch.get_num_threads())
    return out


@torch.library.impl(_native.library, "segmentation_disagreement", "CUDA")
def _segmentation_disagreement_cuda(dense: Tensor, pruned: Tensor) -> Tensor:
    if dense.dtype is torch.float64:
        return reference.segmentation_disagreement(dense, pruned)
    if _native.cuda_unusable_reason() is not None:
        triton_kernels = _native.triton_kernels()
        return triton_kernels.segmentation_disagreement(dense, pruned)  # type: ignore[no-any-return]
    out, arguments, _alive = _kernel_arguments(dense, pruned)
    with torch.cuda.device(dense.device):
        _native.call(_C.segmentation_disagreement_cuda, *arguments, _native.cuda_stream(dense))
    return out


_native.library.impl(
    "segmentation_disagreement", reference.segmentation_disagreement, "CompositeExplicitAutograd"
)


@torch.library.register_fake("fastpie::segmentation_disagreement", lib=_native.library)
def _segmentation_disagreement_fake(dense: Tensor, pruned: Tensor) -> Tensor:
    dtype = torch.float64 if dense.dtype is torch.float64 else torch.float32
    return dense.new_empty((len(IOUS), pruned.shape[0], pruned.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    dense, pruned, scores = ctx.saved_tensors
    work = torch.promote_types(dense.dtype, torch.float32)
    # Images without a score take no part: numbers in their place, and no incoming gradient. A class
    # of probability zero is one at -1e30.
    leaves = [
        x.detach().to(work).nan_to_num(0.0, 0.0, -1e30).requires_grad_() for x in (dense, pruned)
    ]
    with torch.enable_grad():
        soft = reference.soft_iou(leaves[0].flatten(2), leaves[1].flatten(3))
    row = IOUS.index("iou_soft")
    incoming = gradient[row].masked_fill(scores[row].isnan(), 0.0)
    of_dense, of_pruned = torch.autograd.grad(soft, leaves, incoming.to(work))
    return of_dense.to(dense.dtype), of_pruned.to(pruned.dtype)


torch.library.register_autograd(
    "fastpie::segmentation_disagreement",
    _backward,
    setup_context=_setup_context,
    lib=_native.library,
)
