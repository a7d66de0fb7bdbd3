"""Triton kernel of `segmentation_disagreement`, with the contract of its header in csrc/include.

A program takes BLOCK pixels of one image and goes through the levels. Of a model it keeps the largest
logit of each pixel and the sum of the exponentials, from one pass over the classes; a second pass
reads the logits of both models again, from the cache, and compares the probabilities. One class is
two of which the background's logit is 0. The few sums of a program are added up by torch.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "segmentation_disagreement", "segmentation_disagreement_kernel"]

BLOCK = 1024  # pixels: eight for a thread of four warps

# Whatever changes with the batch: a specialised value would recompile for 1 and for multiples of 16.
_PER_BATCH = ["levels", "images", "pruned_level_stride"]


@triton.jit
def _load(logits, offsets, inside):
    """Logits as fp32, with 0 for what makes an image unusable (NaN, +inf), and where that was."""
    z = tl.load(logits + offsets, mask=inside, other=0.0).to(tl.float32)
    unusable = ~(z < float("inf"))
    return tl.where(unusable, 0.0, z), unusable & inside


@triton.jit
def _statistics(logits, offsets, inside, class_stride, foreground, SINGLE: tl.constexpr):
    """Per pixel: largest logit, its first class, sum of exp(logit - largest), unusable."""
    if SINGLE:
        top = tl.zeros(offsets.shape, tl.float32)
        bad = top != 0.0
    else:
        top, bad = _load(logits, offsets, inside)
        offsets += class_stride
    total = tl.full(offsets.shape, 1.0, tl.float32)
    label = tl.zeros(offsets.shape, tl.int32)
    for c in range(1, foreground + 1):
        z, unusable = _load(logits, offsets, inside)
        bad = bad | unusable
        greater = z > top
        # The distance of -inf from -inf is none.
        e = tl.exp(-tl.abs(tl.where(z == top, 0.0, z - top)))
        total = tl.where(greater, total * e + 1.0, total + e)
        label = tl.where(greater, c, label)
        top = tl.where(greater, z, top)
        offsets += class_stride
    return top, label, total, bad | ((top == -float("inf")) & inside)


@triton.jit
def _put(partials, kind: tl.constexpr, step, value):
    tl.store(partials + kind * step, value)


@triton.jit(do_not_specialize=_PER_BATCH)
def segmentation_disagreement_kernel(
    dense,
    pruned,
    partials,
    levels,
    images,
    foreground,
    pixels,
    blocks,
    dense_image_stride,
    dense_class_stride,
    dense_pixel_stride,
    pruned_level_stride,
    pruned_image_stride,
    pruned_class_stride,
    pruned_pixel_stride,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of BLOCK pixels of one image at all levels, to fp64 [5, levels, images, blocks]."""
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    # Where the foreground's classes begin: behind the background's logits, which one class has not.
    skip_z = 0 if SINGLE else dense_class_stride
    skip_y = 0 if SINGLE else pruned_class_stride
    offsets_z = image * dense_image_stride + pixel * dense_pixel_stride
    offsets_y = image * pruned_image_stride + pixel * pruned_pixel_stride
    top_z, label_z, total_z, bad_z = _statistics(
        dense, offsets_z, inside, dense_class_stride, foreground, SINGLE
    )
    step = levels.to(tl.int64) * images * blocks
    partials += program
    for _level in range(levels):
        top_y, label_y, total_y, bad_y = _statistics(
            pruned, offsets_y, inside, pruned_class_stride, foreground, SINGLE
        )
        lower = tl.zeros([BLOCK], tl.float32)
        upper = lower
        at_z = offsets_z + skip_z
        at_y = offsets_y + skip_y
        for _class in range(foreground):
            z, _ = _load(dense, at_z, inside)
            y, _ = _load(pruned, at_y, inside)
            p = tl.exp(z - top_z) / total_z
            q = tl.exp(y - top_y) / total_y
            lower += tl.minimum(p, q)
            upper += tl.maximum(p, q)
            at_z += dense_class_stride
            at_y += pruned_class_stride
        in_z = inside & (label_z != 0)
        in_y = inside & (label_y != 0)
        same = (in_z & (label_z == label_y)).to(tl.int32)
        covered = in_z.to(tl.int32) + in_y.to(tl.int32) - same
        _put(partials, 0, step, tl.sum(tl.where(inside, lower, 0.0), 0).to(tl.float64))
        _put(partials, 1, step, tl.sum(tl.where(inside, upper, 0.0), 0).to(tl.float64))
        _put(partials, 2, step, tl.sum(same, 0).to(tl.float64))
        _put(partials, 3, step, tl.sum(covered, 0).to(tl.float64))
        _put(partials, 4, step, tl.max((bad_z | bad_y).to(tl.int32), 0).to(tl.float64))
        offsets_y += pruned_level_stride
        partials += images * blocks


def segmentation_disagreement(
    dense: Tensor,  # [N, C, ...] fp32, bf16 or fp16
    pruned: Tensor,  # [L, N, C, ...]
) -> Tensor:  # [2, L, N]
    """Hard and soft IoU, the rows of `fastpie.ops.segmentation_disagreement.IOUS`, in fp32.

    Probabilities and the sums of BLOCK pixels are fp32, the sums of these fp64. CUDA tensors, or CPU
    tensors under TRITON_INTERPRET=1.
    """
    z, y = dense.flatten(2), pruned.flatten(3)
    levels, images, classes, pixels = y.shape
    blocks = triton.cdiv(pixels, BLOCK)
    partials = torch.empty((5, levels, images, blocks), dtype=torch.float64, device=z.device)
    if partials.numel():
        device = torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()
        with device:
            segmentation_disagreement_kernel[(images * blocks,)](
                z,
                y,
                partials,
                levels,
                images,
                max(1, classes - 1),
                pixels,
                blocks,
                *z.stride(),
                *y.stride(),
                SINGLE=classes == 1,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,  # equal models must give exactly 1
            )
    soft_intersection, soft_union, hard_intersection, hard_union, bad = partials.sum(-1)
    # 1e-30 is kNoForeground of the contract.
    soft = torch.where(soft_union >= 1e-30, soft_intersection / soft_union, 1.0)
    hard = torch.where(hard_union > 0, hard_intersection / hard_union, 1.0)
    return torch.where(bad > 0, torch.nan, torch.stack([hard, soft])).float()
