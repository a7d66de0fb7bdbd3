"""Losses of segmentation: cross-entropy of pixels and soft Dice of regions, for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastpie._checks import number
from fastpie.errors import FastpieError
from fastpie.training.criteria.multiclass import CrossEntropy, class_indices
from fastpie.training.criteria.multilabel import BinaryCrossEntropy, binary_labels
from fastpie.training.criteria.sample import SampleLoss, in_full_precision

__all__ = ["DiceCrossEntropy"]


class DiceCrossEntropy(SampleLoss):
    """`cross_entropy * CE + dice * (1 - soft Dice)`, of the known pixels of each sample.

    Logits [n, 1, ...] are those of a foreground, with labels in [0, 1]; [n, C, ...] those of classes,
    with class indices. Labels are [n, ...] or [n, 1, ...]. CE is the mean over the pixels. Soft Dice
    is `(2 sum p y + s) / (sum p + sum y + s)`, its mean over the classes (Milletari et al., V-Net,
    https://arxiv.org/abs/1606.04797, without the squares), as MONAI's `DiceLoss` has it by default;
    MONAI's cannot leave unknown pixels of a sample out and its reduction "none" has the rest in
    common, which the tests compare.
    """

    def __init__(
        self,
        cross_entropy: float = 1.0,
        dice: float = 1.0,
        include_background: bool = True,
        smooth: float = 1e-5,
    ) -> None:
        """Weigh the parts.

        Args:
            cross_entropy: weight of the cross-entropy, at least 0.
            dice: weight of the Dice loss, at least 0.
            include_background: whether class 0 of several counts in the Dice loss.
            smooth: s, above 0: what an empty region is divided by.
        """
        super().__init__()
        self.cross_entropy = number("cross_entropy", cross_entropy, 0)
        self.dice = number("dice", dice, 0)
        self.include_background = include_background
        self.smooth = number("smooth", smooth, torch.finfo(torch.float32).tiny)
        self._binary, self._multiclass = BinaryCrossEntropy(), CrossEntropy()

    def forward(self, logits: Tensor, labels: Any) -> Tensor:  # [n]
        """See `SampleLoss`."""
        logits = in_full_precision(logits)
        labels = _maps(labels, logits)
        losses = logits.new_zeros(len(logits))
        if self.cross_entropy:
            pixels = self._binary if logits.shape[1] == 1 else self._multiclass
            losses = losses + self.cross_entropy * pixels(logits, labels)
        if self.dice:
            losses = losses + self.dice * self._dice(logits, labels)
        return losses

    def _dice(self, logits: Tensor, labels: Tensor) -> Tensor:  # [n]
        if logits.shape[1] == 1:
            known = labels >= 0
            p = logits.where(known, 0).sigmoid()
            y = labels
        else:
            known = (labels >= 0).unsqueeze(1)
            p = logits.where(known, 0).softmax(1)
            y = functional.one_hot(labels.clamp_min(0), logits.shape[1])
            y = y.movedim(-1, 1).to(p.dtype)
            if not self.include_background:
                p, y = p[:, 1:], y[:, 1:]
        p, y = p.where(known, 0).flatten(2), y.where(known, 0).flatten(2)
        both, either = (p * y).sum(2), p.sum(2) + y.sum(2)
        losses = 1 - (2 * both + self.smooth) / (either + self.smooth)
        return losses.mean(1).where(known.flatten(1).any(1), 0)


def _maps(labels: Any, logits: Tensor) -> Tensor:  # [n, 1, ...], of several classes int64 [n, ...]
    shape = [len(logits), *logits.shape[2:]]
    if isinstance(labels, Tensor) and labels.ndim == logits.ndim and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if logits.ndim < 3 or not isinstance(labels, Tensor) or list(labels.shape) != shape:
        what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise FastpieError(
            f"Expected logits [n, C, H, ...] and label maps [n, H, ...], but got logits of shape "
            f"{list(logits.shape)} and labels of {what}."
        )
    if logits.shape[1] == 1:
        return binary_labels(labels.unsqueeze(1), logits)
    return class_indices(labels, logits)
