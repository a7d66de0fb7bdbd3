"""How well objects are found: overlap of masks, boxes of masks and maps, CorLoc, pointing game.

Boxes are `[x0, y0, x1, y1]` or `[x0, y0, z0, x1, y1, z1]` in pixels, x along the last axis, upper
edges exclusive (see `fastpie.scores.boxes`). Means leave out images that have nothing to be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpie._extras import load_extra
from fastpie.errors import FastpieError
from fastpie.scores import boxes as box_scores
from fastpie.scores.boxes import box_iou, check_boxes

__all__ = [
    "MaskOverlap",
    "best_iou",
    "boxes_of_masks",
    "corloc",
    "largest_component",
    "mask_overlap",
    "masks_of_maps",
    "pointing_game",
]

CAM_FRACTION = 0.2
"""Of the maximum of a class activation map: where its object ends (Zhou et al., arXiv 1512.04150)."""


@dataclass(frozen=True, eq=False)
class MaskOverlap:
    """Overlap of predicted and true masks, image by image.

    Attributes:
        iou: fp64 [N], or [N, C] for C classes, in [0, 1]; NaN where it cannot be told.
        dice: likewise; `2 iou / (1 + iou)`.
    """

    iou: np.ndarray
    dice: np.ndarray

    @property
    def mean_iou(self) -> np.ndarray:  # fp64 [] or [C]
        """Mean over the images that have a value."""
        return _mean(self.iou)

    @property
    def mean_dice(self) -> np.ndarray:  # fp64 [] or [C]
        """Mean over the images that have a value."""
        return _mean(self.dice)


def mask_overlap(
    predicted: Any,  # [N, ...]
    true: Any,  # [N, ...]
    *,
    classes: int | None = None,
    empty: float = 1.0,
) -> MaskOverlap:
    """IoU and Dice of masks.

    Args:
        predicted: NumPy array or tensor of whole numbers or bool: above 0 is foreground, or with
            `classes` the index of a pixel's class. Probabilities are refused: threshold them.
        true: likewise; pixels below 0 or NaN are unknown and take no part.
        classes: C; without it foreground against background.
        empty: value where neither mask has a pixel (of the class): 1 says that nothing was to be
            found and nothing was; NaN leaves the image out of means.

    Returns:
        MaskOverlap; NaN for images without a known pixel or with NaN in the prediction.

    Raises:
        FastpieError: for shapes that differ, fractions, or fewer than 1 class.
    """
    found, truth = _whole(predicted, "predicted"), _whole(true, "true")
    if found.shape != truth.shape or found.ndim < 2:
        raise FastpieError(
            f"Expected `predicted` and `true` of one shape [N, H, ...], but got {list(found.shape)} "
            f"and {list(truth.shape)}."
        )
    if classes is not None and classes < 1:
        raise FastpieError(f"Expected at least 1 of `classes`, but got {classes}.")
    found, truth = found.flatten(1), truth.flatten(1).to(found.device)
    known = truth >= 0  # False for NaN
    told = known.any(1) & ~found.isnan().any(1)
    columns = []
    for c in [None] if classes is None else range(classes):
        a, b = ((x > 0) if c is None else (x == c) for x in (found, truth))
        a, b = a & known, b & known
        columns.append(torch.stack([(a & b).sum(1), a.sum(1) + b.sum(1)]))
    counts = torch.stack(columns, -1).double()  # [2, N, C]
    inter, sizes = counts[0], counts[1]
    iou = torch.where(sizes > 0, inter / (sizes - inter), empty)
    dice = torch.where(sizes > 0, 2 * inter / sizes, empty)
    both = torch.where(told[:, None], torch.stack([iou, dice]), torch.nan).cpu().numpy()
    if classes is None:
        both = both[..., 0]
    return MaskOverlap(both[0], both[1])


def largest_component(masks: Any) -> np.ndarray:  # bool [N, ...]
    """The largest connected component of each mask; pixels that touch at a corner are connected.

    Args:
        masks: NumPy array or tensor [N, ...], above 0 is foreground. Of components of equal size the
            one that comes first in C order stays.

    Raises:
        FastpieError: without SciPy (`fastpie[analysis]`).
    """
    ndimage = load_extra("scipy.ndimage", "analysis", "connected components")
    foreground = _numpy(masks) > 0
    structure = ndimage.generate_binary_structure(foreground.ndim - 1, foreground.ndim - 1)
    kept = np.zeros_like(foreground)
    for image, to in zip(foreground, kept, strict=True):
        labels, count = ndimage.label(image, structure)
        if count:
            to[...] = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return kept


def masks_of_maps(
    maps: Any,  # [N, ...]
    *,
    fraction: float = CAM_FRACTION,
    largest: bool = True,
) -> np.ndarray:  # bool [N, ...]
    """Where a heat map (of class activation, say) sees the object: above a fraction of its maximum.

    Source: Zhou et al., CVPR 2016, arXiv 1512.04150: above 20 % of the maximum, largest component.

    Args:
        maps: NumPy array or tensor; NaN and maps without a value above 0 give empty masks.
        fraction: of each map's maximum, in [0, 1).
        largest: whether only the largest connected component stays.

    Raises:
        FastpieError: for another fraction, or without SciPy where `largest`.
    """
    if not 0 <= fraction < 1:
        raise FastpieError(f"Expected `fraction` in [0, 1), but got {fraction}.")
    values = np.nan_to_num(_numpy(maps).astype(np.float64), nan=0.0)
    if values.ndim < 2:
        raise FastpieError(f"Expected `maps` of shape [N, H, ...], but got {list(values.shape)}.")
    highest = values.max(axis=tuple(range(1, values.ndim)), keepdims=True, initial=0)
    masks: np.ndarray = values > fraction * highest
    return largest_component(masks) if largest else masks


def boxes_of_masks(masks: Any) -> np.ndarray:  # fp64 [N, 2 D]
    """The smallest box around each mask.

    Args:
        masks: NumPy array or tensor [N, H, W] or [N, D, H, W], above 0 is foreground.

    Returns:
        Boxes; NaN for an empty mask.
    """
    boxes: np.ndarray = box_scores.boxes_of_masks(_tensor(masks) > 0).double().cpu().numpy()
    return boxes


def best_iou(
    boxes: Any,  # [N, 2 D]
    true_boxes: Any,  # [N, 2 D], or N of [G, 2 D]
) -> np.ndarray:  # fp64 [N]
    """IoU of one box per image with the true box that it meets best.

    Args:
        boxes: the predicted box of each image, the surest one; a row with NaN: none.
        true_boxes: one true box an image, or for each image any number; rows with NaN are none.

    Returns:
        In [0, 1]: 0 where there is no predicted box; NaN for images without a true box.

    Raises:
        FastpieError: for shapes that do not fit together.
    """
    found = _boxes(boxes, "boxes")
    if found.ndim != 2 or len(found) != len(true_boxes):
        raise FastpieError(
            f"Expected `boxes` [N, 2 D] and as many entries of `true_boxes`, but got "
            f"{list(found.shape)} and {len(true_boxes)}."
        )
    result = np.full(len(found), np.nan)
    for i, truth in enumerate(true_boxes):
        real = _boxes(truth, "true_boxes").reshape(-1, found.shape[1])
        real = real[~real.isnan().any(1)]
        if len(real):
            result[i] = float(box_iou(found[i], real).max().nan_to_num(0.0))
    return result


def corloc(boxes: Any, true_boxes: Any, *, threshold: float = 0.5) -> float:
    """Correct localisation: fraction of images whose box meets a true one with enough IoU.

    Source: Deselaers, Alexe and Ferrari, IJCV 2012, https://doi.org/10.1007/s11263-012-0538-3. Image
    by image it is `best_iou(boxes, true_boxes) >= threshold`.

    Args:
        boxes: as in `best_iou`.
        true_boxes: likewise; images without one are left out.
        threshold: least IoU, in (0, 1].

    Returns:
        In [0, 1]; NaN if no image has a true box.

    Raises:
        FastpieError: as `best_iou`, or for a threshold out of range.
    """
    if not 0 < threshold <= 1:
        raise FastpieError(f"Expected `threshold` in (0, 1], but got {threshold}.")
    iou = best_iou(boxes, true_boxes)
    return float(_mean(np.where(np.isnan(iou), np.nan, iou >= threshold)))


def pointing_game(
    maps: Any,  # [N, ...]
    true: Any,  # [N, ...]
    *,
    tolerance: float = 0.0,
) -> np.ndarray:  # fp64 [N]
    """Whether the highest place of a heat map lies on the object: 1 or 0.

    Source: Zhang et al., ECCV 2016, arXiv 1608.00507, where the tolerance is 15 pixels.

    Args:
        maps: NumPy array or tensor; of equal maxima the first in C order counts.
        true: masks of the objects, above 0 is foreground.
        tolerance: distance in pixels from the object that still counts, at least 0.

    Returns:
        NaN for images without an object. The mean of the others is the usual score.

    Raises:
        FastpieError: for shapes that differ.
    """
    values, truth = np.nan_to_num(_numpy(maps), nan=-np.inf), _numpy(true) > 0
    if values.shape != truth.shape or values.ndim < 2:
        raise FastpieError(
            f"Expected `maps` and `true` of one shape [N, H, ...], but got {list(values.shape)} and "
            f"{list(truth.shape)}."
        )
    result = np.full(len(values), np.nan)
    for i, (heat, mask) in enumerate(zip(values, truth, strict=True)):
        if mask.any():
            point = np.array(np.unravel_index(heat.argmax(), heat.shape))
            nearest = np.sqrt(np.square(np.argwhere(mask) - point).sum(1).min())
            result[i] = nearest <= tolerance
    return result


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over images without those of NaN; NaN, and no warning, where none is left."""
    told = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(told, values, 0.0).sum(0) / told.sum(0))


def _numpy(given: Any) -> np.ndarray:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype is torch.bfloat16 else given
    return np.asarray(given)


def _tensor(given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach()
    array = np.array(given)
    # torch has no arithmetic for wide unsigned integers, which label images come in.
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "u" else array)


def _whole(given: Any, name: str) -> Tensor:
    values = _tensor(given)
    if values.is_floating_point() and not ((values == values.round()) | values.isnan()).all():
        raise FastpieError(
            f"Expected `{name}` to hold bool or whole numbers, but got fractions: threshold them."
        )
    return values


def _boxes(given: Any, name: str) -> Tensor:
    boxes = _tensor(given).double().cpu()
    check_boxes(boxes, name)
    return boxes
