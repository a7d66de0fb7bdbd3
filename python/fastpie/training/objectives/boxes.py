"""Networks that regress the box of an object in each image: their loss and their hardness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpie.dual.inputs import as_arguments
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.scores.boxes import box_giou, box_iou, check_boxes
from fastpie.training.objectives.objective import Criterion, Objective, TrainBatch, entry_of

__all__ = ["BoxLoss", "SupervisedBoxes", "box_disagreement"]


class BoxLoss(nn.Module):
    """A criterion for boxes: `l1 * smoothL1 + giou * (1 - GIoU)`, image by image.

    The smooth L1 distance is the mean over the coordinates. Its unit is that of the boxes: with pixels
    it outweighs GIoU, so give boxes in fractions of the image's sides. Weights as in DETR (Carion et
    al., arXiv 2005.12872, which sums the L1 over centre and size: 4 * 5 of our mean); GIoU:
    Rezatofighi et al., arXiv 1902.09630.
    """

    def __init__(self, *, l1: float = 20.0, giou: float = 2.0, beta: float = 0.0) -> None:
        """Weigh the parts.

        Args:
            l1: weight of the distance, at least 0.
            giou: weight of 1 - GIoU, at least 0.
            beta: distance below which the smooth L1 is quadratic; 0 for plain L1.

        Raises:
            FastpieError: for a negative number.
        """
        super().__init__()
        if not (l1 >= 0 and giou >= 0 and beta >= 0):
            raise FastpieError(
                f"Expected `l1`, `giou` and `beta` of at least 0, but got {l1}, {giou} and {beta}."
            )
        self.l1 = l1
        self.giou = giou
        self.beta = beta

    def forward(
        self,
        boxes: Tensor,  # [n, 2 D]
        true: Any,  # [n, 2 D]
    ) -> Tensor:  # [n]
        """The loss of each image's box; 0, without a gradient, where the true one has NaN.

        Raises:
            FastpieError: for shapes that differ.
        """
        check_boxes(boxes, "boxes")
        if not isinstance(true, Tensor) or true.shape != boxes.shape or boxes.ndim != 2:
            got = list(true.shape) if isinstance(true, Tensor) else type(true).__name__
            raise FastpieError(f"Expected true boxes of shape {list(boxes.shape)}, but got {got}.")
        dtype = torch.promote_types(boxes.dtype, torch.float32)
        known = ~true.isnan().any(1, keepdim=True)
        # Numbers in place of what is unknown: 0 times NaN would be NaN.
        predicted = boxes.to(dtype).masked_fill(~known, 0.0)
        target = true.to(dtype).masked_fill(~known, 0.0)
        with torch.autocast(boxes.device.type, enabled=False):
            distance = nn.functional.smooth_l1_loss(
                predicted, target, reduction="none", beta=self.beta
            )
            losses = self.l1 * distance.mean(1) + self.giou * (1 - box_giou(predicted, target))
        return losses.masked_fill(~known[:, 0], 0.0)


class SupervisedBoxes(Objective):
    """Class and box of each image: `criterion(logits, labels) + box_loss(boxes, true boxes)`.

    The true boxes come with the samples as `extra["box"]`, [n, 2 D], NaN for an image without one. For
    boxes alone `Supervised(model, BoxLoss())` does, with the boxes as labels.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        box_loss: Callable[[Tensor, Any], Tensor] | None = None,
        *,
        output: str | int = 0,
        box_output: str | int = 1,
        box: str = "box",
    ) -> None:
        """Join a model and both losses.

        Args:
            model: a network that returns logits and boxes in a dict or tuple.
            criterion: loss of logits and labels, sample by sample.
            box_loss: of boxes and true boxes, likewise; by default `BoxLoss()`.
            output: key or index of the logits.
            box_output: key or index of the boxes, [n, 2 D].
            box: name of the true boxes among the batch's extra entries.
        """
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.box_loss = BoxLoss() if box_loss is None else box_loss
        self.output = output
        self.box_output = box_output
        self.box = box

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """Both losses of each sample.

        Raises:
            FastpieError: for a batch without boxes.
        """
        if self.box not in batch.extra:
            raise FastpieError(
                f"Expected samples with an entry {self.box!r}, but got {list(batch.extra)}."
            )
        out = self.model(*as_arguments(batch.images))
        losses = self.criterion(entry_of(out, self.output), batch.labels)
        return losses + self.box_loss(entry_of(out, self.box_output), batch.extra[self.box])


def box_disagreement(
    out: DualOutput, labels: Any = None, *, output: str | int | None = None
) -> Tensor:  # fp32 [n]
    """`1 - IoU` of the boxes of the dense and the pruned model: a label-free score for `Attention`.

    Args:
        out: of a dual forward; boxes [n, 2 D], of the pruned model [L, n, 2 D] on a ladder, whose
            levels are averaged over.
        labels: not looked at.
        output: key or index of the boxes in a dict or tuple output; bind it by `functools.partial`.

    Returns:
        In [0, 1], 1 where either box is empty; NaN where a coordinate is.

    Raises:
        FastpieError: if there are no boxes.
    """
    dense, pruned = (entry_of(part, output).detach() for part in (out.dense, out.pruned))
    if dense.ndim != 2 or pruned.shape[-2:] != dense.shape:
        raise FastpieError(
            f"Expected boxes [n, 2 D] of both models, but got {list(dense.shape)} and "
            f"{list(pruned.shape)}."
        )
    iou = box_iou(dense, pruned)
    return 1 - (iou if iou.ndim == 1 else iou.mean(0))
