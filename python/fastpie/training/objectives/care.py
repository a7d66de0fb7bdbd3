"""CARE: class attention to regions of the lesion, for rare classes, in training alone.

Zhuang et al., https://arxiv.org/abs/2307.10036 and MIDL 2019 (PMLR 102); their code:
https://github.com/JiaxinZhuang/CARE.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastpie._checks import number
from fastpie.dual.grad_cam import feature_maps_of, grad_cam
from fastpie.dual.inputs import as_arguments
from fastpie.errors import FastpieError
from fastpie.scores.boxes import masks_of_boxes
from fastpie.scores.cam import resized_map
from fastpie.training.objectives.lesion_boxes import saliency_boxes, segmentation_boxes
from fastpie.training.objectives.objective import Criterion, Supervised, TrainBatch, entry_of

__all__ = ["CARE", "attention_loss", "min_max_map"]

_MOST = 1024.0  # what a score is scaled by: its gradients must not overflow in fp16


class CARE(Supervised):
    """Cross-entropy, and in stage 2 a push of the rare classes' Grad-CAM into their lesion boxes.

    `L = alpha * sum L_cam + (1 - alpha) * CE` with `L_cam = -min(sum(cam * inner), tau) + sum(cam *
    outer)` for the images of rare classes that have a box: `cam` is the Grad-CAM of the label's logit,
    min-max scaled and interpolated to the input's size, `inner` is 1 in the box, `outer` outside. The
    mean of the losses of a batch is L: `sum` goes over the batch (of all processes) and CE is its mean.

    What the public code does is the default: no ReLU; sums over pixels, which are not divided by areas
    (with 0/1 maps, tau = .5 pixels is reached at once, and what is left is the sum outside; with
    `by_area` tau is a mean in [0, 1]); the weights of Grad-CAM are constants in the gradient
    (`second_order` differentiates them too, which the formula taken literally would). Three things are not
    taken over: its backward pass for the CAM leaves the gradient of the target logits in the
    parameters, on top of the loss's; a constant map divides by 0, here it costs nothing; its boxes are
    arrays from files that are not public, so whether they hold 0 and 1 could not be seen.

    Try `by_area` with `second_order`, `reduction="mean"` and an alpha of about .5 as well: with the
    default the sum outside of the box is nearly all of the attention. A test trains that form until
    more of the map lies in the box (tests/training/objectives/test_care.py). On generated images that form moves
    the maps onto the lesions at the same accuracy, and the default ruins it (docs/design/training.md).

    The network is as before: what is registered for a forward is removed after it. Do not compile it:
    a compiled one does not show its layers. It may be of 2D or 3D images, multiclass (labels [n]) or
    multilabel ([n, C]: the positive rare classes together).
    Boxes are `batch.extra["box"]` [n, 4] in pixels x0, y0, x1, y1 (volumes [n, 6], NaN: none), else the
    region is `batch.extra["mask"]`, [n, ...] or [n, 1, ...] of the input's size, nonzero in the lesion.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        *,
        layer: str,
        rare_classes: Collection[int],
        alpha: float = 0.01,
        tau: float = 0.5,
        start_epoch: int = 0,
        boxes: str | nn.Module | Callable[[Tensor], Tensor] = "given",
        by_area: bool = False,
        second_order: bool = False,
        reduction: str = "sum",
        output: str | int | None = None,
    ) -> None:
        """Join a model, a criterion and the attention.

        Args:
            model: a classifier.
            criterion: its loss, sample by sample; alone it is stage 1.
            layer: name of the module whose output the Grad-CAM is of, the last convolutional block.
            rare_classes: indices of the classes to attend to.
            alpha: weight of the attention, in [0, 1].
            tau: what the map's sum inside the box is worth at most.
            start_epoch: first epoch of stage 2; before it the criterion alone.
            boxes: "given" by the batch; "saliency" (see `saliency_boxes`); a segmentation model; or a
                function from images [n, ...] to boxes or to masks of their size, bool. All but the
                first are asked for the images of rare classes only.
            by_area: divide the two sums by the areas they go over.
            second_order: see above. It costs a backward pass through a backward pass.
            reduction: "sum", as published: the attention grows with the batch; or "mean".
            output: key or index of the logits in a dict or tuple output.

        Raises:
            FastpieError: for a module that the model has not, or values out of range.
        """
        super().__init__(model, criterion, output=output)
        if layer not in dict(model.named_modules(remove_duplicate=False)):
            raise FastpieError(
                f"Expected `layer` to name a module of the model, but got {layer!r}."
            )
        if reduction not in ("sum", "mean"):
            raise FastpieError(f"Expected `reduction` 'sum' or 'mean', but got {reduction!r}.")
        if not rare_classes or not all(isinstance(c, int) and c >= 0 for c in rare_classes):
            raise FastpieError(
                f"Expected `rare_classes` of class indices, but got {rare_classes!r}."
            )
        self.layer = layer
        self.rare_classes = sorted(set(rare_classes))
        self.alpha = number("alpha", alpha, 0, 1)
        self.tau = number("tau", tau, 0)
        self.start_epoch = start_epoch
        self.by_area = by_area
        self.second_order = second_order
        self.reduction = reduction
        self.epoch = 0
        self._find: Callable[[Tensor], Tensor] | None
        if isinstance(boxes, nn.Module):
            self._find = segmentation_boxes(boxes)
        elif boxes in ("given", "saliency"):
            self._find = saliency_boxes if boxes == "saliency" else None
        elif callable(boxes):
            self._find = boxes
        else:
            raise FastpieError(
                "Expected `boxes` to be 'given', 'saliency', a segmentation model or a function, but "
                f"got {boxes!r}."
            )

    def begin_epoch(self, epoch: int) -> None:
        """Stage 1 or 2."""
        super().begin_epoch(epoch)
        self.epoch = epoch

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """Each sample's part of L, times the size of the batch."""
        if self.epoch < self.start_epoch:
            return super().forward(batch)
        args = as_arguments(batch.images)
        # Where no gradient is wanted (a loss that is only looked at) the CAM needs one all the same.
        with torch.enable_grad(), feature_maps_of(self.model, self.layer) as seen:
            logits = entry_of(self.model(*args), self.output)
            if not seen:
                raise FastpieError(f"Expected the model to call its module {self.layer!r}.")
            losses = self.criterion(logits, batch.labels)
            targets, rare = self._targets(logits, batch.labels)
            region = self._region(batch, args[0], rare)
            # Computed on every process, rare images or not: there may be synchronised layers on the way.
            cam = self._cam(logits, targets, seen[-1], region.shape[1:])
            attention = attention_loss(cam, region.to(cam.dtype), self.tau, by_area=self.by_area)
        attention = attention.where(region.flatten(1).any(1), 0)
        if self.reduction == "sum":
            attention = attention * (len(logits) * _processes())
        losses = self.alpha * attention + (1 - self.alpha) * losses
        return losses if torch.is_grad_enabled() else losses.detach()

    def _targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which logits the CAM is of, bool [n, C], and which images are of a rare class, bool [n]."""
        if logits.ndim != 2:
            raise FastpieError(f"Expected logits of shape [n, C], but got {list(logits.shape)}.")
        if self.rare_classes[-1] >= logits.shape[1]:
            raise FastpieError(
                f"Expected `rare_classes` below {logits.shape[1]}, but got {self.rare_classes[-1]}."
            )
        rare = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        rare[self.rare_classes] = True
        if labels.ndim == 1:
            targets = functional.one_hot(labels.long().clamp_min(0), logits.shape[1]).bool()
            targets &= (labels >= 0).unsqueeze(1)
            return targets, (targets & rare).any(1)
        targets = (labels == 1) & rare
        return targets, targets.any(1)

    def _region(self, batch: TrainBatch, images: Tensor, rare: Tensor) -> Tensor:
        """Where the lesion of each rare image is, bool [n, ...]; nowhere in the others."""
        size = images.shape[2:]
        if self._find is None:
            found = batch.extra.get("box", batch.extra.get("mask"))
            if found is None:
                raise FastpieError(
                    "Expected samples with a 'box' or a 'mask' for boxes='given', but the batch has "
                    f"{sorted(batch.extra) or 'neither'}."
                )
            found = torch.as_tensor(found, device=images.device)
            region = _inside(found, size)
            _check_count(region, len(images))
            return region & rare.view(-1, *[1] * len(size))
        region = rare.new_zeros((len(images), *size))
        rows = rare.nonzero().squeeze(1)
        if len(rows):
            inside = _inside(self._find(images.detach()[rows]).to(images.device), size)
            _check_count(inside, len(rows))
            region[rows] = inside
        return region

    def _cam(
        self, logits: Tensor, targets: Tensor, features: Tensor, size: Sequence[int]
    ) -> Tensor:  # [n, *size]
        # Min-max scaling makes any factor of the score vanish; this one keeps what averaging divides
        # by the number of positions from underflowing in fp16.
        factor = min(_MOST, float(features.shape[2:].numel()))
        score = (
            (logits if logits.dtype is torch.float64 else logits.float()).where(targets, 0).sum()
        )
        cam = grad_cam(score * factor, features, retain_graph=True, create_graph=self.second_order)
        return min_max_map(cam, size)


def min_max_map(cam: Tensor, size: Sequence[int]) -> Tensor:  # [n, ...] -> [n, *size]
    """Each map from 0 to 1, interpolated to that size; a constant one is 0 and has no gradient.

    Raises:
        FastpieError: if maps and images have different numbers of dimensions.
    """
    axes = list(range(1, cam.ndim))
    low, high = cam.amin(axes, keepdim=True), cam.amax(axes, keepdim=True)
    varied = high > low
    cam = ((cam - low) / (high - low).where(varied, 1)).where(varied, 0)
    return resized_map(cam, size)


def attention_loss(
    cam: Tensor,  # [n, ...]
    inner: Tensor,  # [n, ...], 1 in the lesion, 0 outside
    tau: float = 0.5,
    *,
    by_area: bool = False,
) -> Tensor:  # [n]
    """`-min(sum(cam * inner), tau) + sum(cam * outer)` of each map, with `outer = 1 - inner`.

    With `by_area` means in place of sums: over the inside and over the outside.
    """
    outer = (1 - inner).flatten(1)
    cam, inner = cam.flatten(1), inner.flatten(1)
    inside, outside = (cam * inner).sum(1), (cam * outer).sum(1)
    if by_area:
        inside = inside / inner.sum(1).clamp_min(1)
        outside = outside / outer.sum(1).clamp_min(1)
    return outside - inside.clamp_max(tau)


def _inside(found: Any, size: Sequence[int]) -> Tensor:
    """Bool [n, *size] of boxes or masks."""
    if found.ndim == 2 and len(size) > 1:
        return masks_of_boxes(found, size)
    if found.ndim == len(size) + 2 and found.shape[1] == 1:
        found = found.squeeze(1)
    if found.shape[1:] != torch.Size(size):
        raise FastpieError(
            f"Expected boxes [n, {2 * len(size)}] or masks of size {list(size)}, but got "
            f"{list(found.shape)}."
        )
    inside: Tensor = found > 0  # NaN is unknown, so outside
    return inside


def _check_count(region: Tensor, images: int) -> None:
    if len(region) != images:
        raise FastpieError(f"Expected boxes of {images} images, but got {len(region)}.")


def _processes() -> int:
    distributed = torch.distributed
    initialised = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if initialised else 1
