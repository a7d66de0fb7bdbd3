"""Losses of one class among several, with those made for long tails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpie._checks import number
from fastpie.errors import FastpieError
from fastpie.training.criteria.counts import effective_number_weights, log_prior, multiclass_counts
from fastpie.training.criteria.sample import (
    SampleLoss,
    checkable,
    in_full_precision,
    mean_of_known,
)

__all__ = [
    "LDAM",
    "ClassBalanced",
    "CrossEntropy",
    "Focal",
    "LogitAdjusted",
    "MulticlassLoss",
    "class_indices",
]


class MulticlassLoss(SampleLoss):
    """What the losses of this file share: logits [n, C, ...], labels integers [n, ...].

    Dense outputs (a class for each pixel) give each sample its mean. Labels below 0 are unknown.
    """

    def __init__(self, weights: Tensor | None = None) -> None:
        """With a weight for each class [C], or without.

        The loss is multiplied by the label's weight and not divided by the sum of the batch's, as
        torch's `reduction="mean"` does: a sample's loss does not depend on its neighbours.
        """
        super().__init__()
        self.weights: Tensor | None
        # Not in the state: they follow from the counts.
        self.register_buffer("weights", _single(weights), persistent=False)

    def forward(self, logits: Tensor, labels: Any) -> Tensor:  # [n]
        """See `SampleLoss`."""
        logits = in_full_precision(logits)
        labels = class_indices(labels, logits)
        known = labels >= 0
        labels = labels.clamp_min(0)
        losses = self.of_each(logits.where(known.unsqueeze(1), 0), labels)
        weights = self.class_weights()
        if weights is not None:
            losses = losses * _fitting(weights, logits)[labels]
        return mean_of_known(losses, known)

    def class_weights(self) -> Tensor | None:  # [C]
        """What each class's losses are multiplied by."""
        return self.weights

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:  # [n, ...]
        """Losses before class weights, of logits in full precision and labels that are known."""
        raise NotImplementedError


class CrossEntropy(MulticlassLoss):
    """Cross-entropy, `(1 - e) * -log p_y + e * mean_c(-log p_c)`, e being the label smoothing."""

    def __init__(self, label_smoothing: float = 0.0, weights: Tensor | None = None) -> None:
        """With smoothing in [0, 1), and weights [C] of the classes."""
        super().__init__(weights)
        self.label_smoothing = number("label_smoothing", label_smoothing, 0, 1, open_high=True)

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MulticlassLoss`."""
        log_p = logits.log_softmax(1)
        losses = -_of_label(log_p, labels)
        if self.label_smoothing:
            losses = losses.lerp(-log_p.mean(1), self.label_smoothing)
        return losses


class Focal(MulticlassLoss):
    """Focal loss, `(1 - p_y) ** gamma * -log p_y`.

    Lin et al., Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002, for a
    softmax. MONAI has it for one-hot labels, all of them known; the tests compare.
    """

    def __init__(self, gamma: float = 2.0, weights: Tensor | None = None) -> None:
        """With gamma of at least 0 (0 is cross-entropy), and weights [C] of the classes."""
        super().__init__(weights)
        self.gamma = number("gamma", gamma, 0)

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MulticlassLoss`."""
        log_p = _of_label(logits.log_softmax(1), labels)
        if not self.gamma:
            return -log_p
        # The slope of x ** gamma below gamma 1 has a pole at 0, where a sure sample lies.
        miss = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)
        return miss.pow(self.gamma) * -log_p


class ClassBalanced(Focal):
    """Cross-entropy or focal loss weighted by the inverse effective number of the class's samples.

    Cui et al., https://arxiv.org/abs/1901.05555; the weights have a mean of 1 over the classes.
    """

    def __init__(self, counts: Any, beta: float = 0.9999, gamma: float = 0.0) -> None:
        """Of counts [C]; beta in [0, 1); gamma of the focal loss, 0 for cross-entropy."""
        super().__init__(gamma, effective_number_weights(multiclass_counts(counts), beta))


class LogitAdjusted(CrossEntropy):
    """Cross-entropy of `logits + tau * log prior`: the network learns what the labels' rates do not say.

    Menon et al., Long-tail learning via logit adjustment, https://arxiv.org/abs/2007.07314, eq. 10.
    At tau = 1 it is the balanced softmax of Ren et al., https://arxiv.org/abs/2007.10740. The network
    is used as it is afterwards: the adjustment is in the training alone.
    """

    def __init__(self, counts: Any, tau: float = 1.0, label_smoothing: float = 0.0) -> None:
        """Of counts [C]; tau of at least 0 (0 is cross-entropy)."""
        super().__init__(label_smoothing)
        self.register_buffer("shift", _single(number("tau", tau, 0) * log_prior(counts)), False)
        self.shift: Tensor

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MulticlassLoss`."""
        shift = _fitting(self.shift, logits)
        return super().of_each(logits + shift.view(-1, *[1] * (logits.ndim - 2)), labels)


class LDAM(CrossEntropy):
    """Label-distribution-aware margins with deferred re-weighting (LDAM-DRW).

    Cross-entropy of `scale * (z - m_y at the label)`, `m_c ~ n_c ** (-1/4)`, the largest
    `max_margin`; from epoch `reweight_from` on weighted as `ClassBalanced`. Cao et al., Learning
    Imbalanced Datasets with Label-Distribution-Aware Margin Loss, https://arxiv.org/abs/1906.07413.
    The paper's logits are cosines (a last layer with normalised weights and inputs), which the scale
    of 30 is for; with an ordinary linear layer take a scale of 1.
    """

    def __init__(
        self,
        counts: Any,
        max_margin: float = 0.5,
        scale: float = 30.0,
        reweight_from: int | None = None,
        beta: float = 0.9999,
    ) -> None:
        """Make the margins.

        Args:
            counts: [C], of the classes.
            max_margin: of the rarest class.
            scale: of the logits.
            reweight_from: first epoch (from 0) with weights, told by `begin_epoch`; None for never.
                The paper's is at 80 % of the training.
            beta: of the weights, in [0, 1).
        """
        super().__init__(weights=effective_number_weights(multiclass_counts(counts), beta))
        margins = multiclass_counts(counts) ** -0.25
        margins *= number("max_margin", max_margin, 0) / margins.max()
        self.register_buffer("margins", _single(margins), False)
        self.margins: Tensor
        self.scale = number("scale", scale, 0)
        self.reweight_from = reweight_from
        if reweight_from is not None:
            number("reweight_from", reweight_from, 0)
        self.reweighting = reweight_from == 0

    def begin_epoch(self, epoch: int) -> None:
        """Weight from here on, or not yet."""
        self.reweighting = self.reweight_from is not None and epoch >= self.reweight_from

    def class_weights(self) -> Tensor | None:
        """See `MulticlassLoss`."""
        return self.weights if self.reweighting else None

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MulticlassLoss`."""
        margins = _fitting(self.margins, logits)[labels].unsqueeze(1)
        at_label = torch.zeros_like(logits).scatter(1, labels.unsqueeze(1), margins)
        return super().of_each(self.scale * (logits - at_label), labels)


def _of_label(table: Tensor, labels: Tensor) -> Tensor:  # [n, C, ...], [n, ...] -> [n, ...]
    return table.gather(1, labels.unsqueeze(1)).squeeze(1)


def class_indices(labels: Any, logits: Tensor) -> Tensor:
    """Labels as int64 on the logits' device, their shape and on the CPU their values checked."""
    shape = [len(logits), *logits.shape[2:]]
    if not isinstance(labels, Tensor) or list(labels.shape) != shape:
        what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise FastpieError(f"Expected class indices of shape {shape} as labels, but got {what}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise FastpieError(f"Expected integers (class indices) as labels, but got {labels.dtype}.")
    indices: Tensor = labels.to(logits.device, torch.int64)
    if checkable(indices) and indices.numel() and indices.max() >= logits.shape[1]:
        raise FastpieError(f"Expected labels below {logits.shape[1]}, but got {indices.max()}.")
    return indices


def _fitting(table: Tensor, logits: Tensor) -> Tensor:
    if len(table) != logits.shape[1]:
        raise FastpieError(
            f"Expected `logits` of the {len(table)} classes of the counts or weights, but got "
            f"{logits.shape[1]} classes."
        )
    return table.to(logits.device, logits.dtype)


def _single(table: Tensor | None) -> Tensor | None:
    """In fp32: some devices have no fp64."""
    return None if table is None else torch.as_tensor(table).float()
