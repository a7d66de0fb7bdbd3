"""How much boxes overlap (IoU and generalised IoU, differentiable), and masks as boxes and back.

A box of D dimensions is its lower corner followed by its upper one, `[x0, y0, x1, y1]` or `[x0, y0,
z0, x1, y1, z1]`, upper edges exclusive: an object of one pixel at the origin is `[0, 0, 1, 1]`. x
counts along the last axis of an image, as in COCO and torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpie.errors import FastpieError

__all__ = ["box_giou", "box_iou", "boxes_of_masks", "check_boxes", "masks_of_boxes"]


def box_iou(
    first: Tensor,  # [..., 2 D]
    second: Tensor,  # [..., 2 D]
) -> Tensor:  # [...]
    """Intersection over union of boxes, element by element; all pairs by `a[:, None], b[None]`.

    Args:
        first: boxes.
        second: boxes whose shape can be broadcast against the first's.

    Returns:
        In [0, 1], in fp32 or the wider type of the inputs. A side of negative length counts as none;
        0 where both boxes are empty; NaN where a coordinate is.

    Raises:
        FastpieError: if the last dimension is not 2 D, or not the same for both.
    """
    inter, union, _ = _volumes(first, second)
    return inter / union.clamp_min(torch.finfo(union.dtype).tiny)


def box_giou(
    first: Tensor,  # [..., 2 D]
    second: Tensor,  # [..., 2 D]
) -> Tensor:  # [...]
    """Generalised IoU, which tells apart boxes that do not meet: `IoU - (hull - union) / hull`.

    `hull` is the volume of the smallest box that holds both. Rezatofighi et al., CVPR 2019,
    arXiv 1902.09630.

    Args:
        first: boxes.
        second: boxes whose shape can be broadcast against the first's.

    Returns:
        In (-1, 1], otherwise as `box_iou`.

    Raises:
        FastpieError: as `box_iou`.
    """
    inter, union, hull = _volumes(first, second)
    tiny = torch.finfo(union.dtype).tiny
    return inter / union.clamp_min(tiny) - (hull - union) / hull.clamp_min(tiny)


def boxes_of_masks(
    masks: Tensor,  # bool [n, ...]
    size: Sequence[int] | None = None,
) -> Tensor:  # fp32 [n, 2 D]
    """The smallest box around each mask; NaN around an empty one.

    Args:
        masks: True inside.
        size: of images that the masks are a smaller or larger picture of: boxes are in its pixels.

    Raises:
        FastpieError: for masks that are not bool or have no spatial dimensions.
    """
    if masks.dtype is not torch.bool or masks.ndim < 2:
        raise FastpieError(
            f"Expected bool masks [n, H, ...], but got {masks.dtype} {list(masks.shape)}."
        )
    count, *sides = masks.shape
    nothing = ~masks.flatten(1).any(1)
    low, high = [], []
    for axis in reversed(range(len(sides))):  # x is the last
        others = [1 + other for other in range(len(sides)) if other != axis]
        line = masks.any(others) if others else masks
        scale = 1.0 if size is None else size[axis] / max(sides[axis], 1)
        edges = torch.arange(sides[axis] + 1, device=masks.device)
        inside = line.new_zeros(count, sides[axis] + 1)
        inside[:, :-1] = line
        low.append(edges.where(inside, sides[axis]).amin(1) * scale)
        high.append((edges + 1).where(inside, 0).amax(1) * scale)
    boxes = torch.stack(low + high, 1).float()
    return boxes.masked_fill(nothing[:, None], torch.nan)


def masks_of_boxes(
    boxes: Tensor,  # [n, 2 D]
    size: Sequence[int],
) -> Tensor:  # bool [n, *size]
    """Which pixels of images of that size have their centre in the boxes; none in a box with NaN.

    Raises:
        FastpieError: for boxes of another shape.
    """
    dims = len(size)
    if boxes.ndim != 2 or boxes.shape[1] != 2 * dims:
        raise FastpieError(
            f"Expected boxes of shape [n, {2 * dims}] for images of {dims} dimensions, but got "
            f"{list(boxes.shape)}."
        )
    inside = boxes.new_ones((len(boxes), *size), dtype=torch.bool)
    for axis, length in enumerate(size):
        column = dims - 1 - axis  # x first
        shape = [1] * dims
        shape[axis] = length
        centres = (torch.arange(length, device=boxes.device) + 0.5).view(1, *shape)
        low, high = (boxes[:, c].view(-1, *[1] * dims) for c in (column, column + dims))
        inside &= (low <= centres) & (centres < high)
    return inside


def check_boxes(boxes: Tensor, name: str) -> None:
    """Raise FastpieError unless the last dimension is 2 D with D >= 1."""
    if boxes.ndim == 0 or boxes.shape[-1] % 2 or not boxes.shape[-1]:
        raise FastpieError(
            f"Expected `{name}` to be boxes [..., 4] or [..., 6], corner by corner, but got shape "
            f"{list(boxes.shape)}."
        )


def _volumes(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the intersection, the union and the smallest box around both."""
    check_boxes(first, "first")
    check_boxes(second, "second")
    if first.shape[-1] != second.shape[-1]:
        raise FastpieError(
            f"Expected boxes of equal dimension, but got shapes {list(first.shape)} and "
            f"{list(second.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    low_1, high_1 = first.to(dtype).chunk(2, -1)
    low_2, high_2 = second.to(dtype).chunk(2, -1)

    def volume(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp_min(0).prod(-1)

    inter = volume(torch.maximum(low_1, low_2), torch.minimum(high_1, high_2))
    union = volume(low_1, high_1) + volume(low_2, high_2) - inter
    return inter, union, volume(torch.minimum(low_1, low_2), torch.maximum(high_1, high_2))
