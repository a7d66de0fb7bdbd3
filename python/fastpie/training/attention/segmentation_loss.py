"""How far a segmentation is from its mask, image by image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastpie.errors import FastpieError

__all__ = ["segmentation_loss"]


def segmentation_loss(
    logits: Tensor,  # [N, C, ...]
    masks: Any,  # integers [N, ...] or [N, 1, ...]; or [N, C, ...] of 0, 1
) -> Tensor:  # fp32 [N]
    """Cross-entropy plus 1 - soft Dice of the foreground, image by image.

    What nnU-Net is trained with (Isensee et al., Nature Methods 18, 2021), of one image at a time:
    the mean over the known pixels of the cross-entropy, plus
    `1 - (2 sum p t + 1) / (sum p + sum t + 1)`, sums over pixels and classes. With C == 1 a logit is
    that of the foreground, else class 0 is the background and takes no part in the sums.

    Args:
        logits: of any floating dtype.
        masks: class indices (of C == 1: 0 and 1), below 0 or NaN where unknown; or one channel a class.

    Returns:
        NaN for an image without a known pixel or with outputs that are not numbers.

    Raises:
        FastpieError: for masks of another shape.
    """
    if not isinstance(masks, Tensor):
        raise FastpieError(
            f"Expected masks that collate to a tensor, but got {type(masks).__name__}."
        )
    z = logits.float().flatten(2)  # [N, C, P]
    target = masks.as_subclass(Tensor).detach().to(z.device)
    count, classes, pixels = z.shape
    spatial = logits.shape[2:]
    if target.shape == logits.shape and classes > 1:
        t = target.float().flatten(2)
        known = ~t.isnan().any(1) & (t >= 0).all(1)
        t = torch.where(known[:, None], t, 0.0)
    elif target.shape in ((count, *spatial), (count, 1, *spatial)):
        index = target.float().reshape(count, pixels)
        known = (index >= 0) & (index < max(classes, 2)) & (index == index.floor())
        index = torch.where(known, index, 0.0).long()
        t = (
            index.float()[:, None]
            if classes == 1
            else functional.one_hot(index, classes).transpose(1, 2).float()
        )
    else:
        raise FastpieError(
            f"Expected masks of shape {[count, *spatial]}, {[count, 1, *spatial]} or that of the "
            f"outputs, {list(logits.shape)}, but got {list(target.shape)}."
        )
    weight = known.float()
    if classes == 1:
        entropy = functional.binary_cross_entropy_with_logits(z, t, reduction="none")[:, 0]
        p = z.sigmoid()
    else:
        log_p = z.log_softmax(1)
        entropy = -(t * log_p).sum(1)
        p, t = log_p[:, 1:].exp(), t[:, 1:]
    t, p = t * weight[:, None], p * weight[:, None]
    dice = (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
    return (entropy * weight).sum(1) / weight.sum(1) + 1 - dice  # 0 / 0: NaN
