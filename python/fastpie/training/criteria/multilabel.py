"""Losses of classes that may come together, with those made for long tails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastpie._checks import number
from fastpie.errors import FastpieError
from fastpie.training.criteria.counts import effective_number_weights, log_odds
from fastpie.training.criteria.sample import (
    SampleLoss,
    checkable,
    in_full_precision,
    mean_of_known,
)

__all__ = [
    "Asymmetric",
    "BinaryClassBalanced",
    "BinaryCrossEntropy",
    "BinaryFocal",
    "BinaryLogitAdjusted",
    "MultilabelLoss",
    "binary_labels",
]


class MultilabelLoss(SampleLoss):
    """What the losses of this file share: logits and labels [n, C, ...], labels in [0, 1].

    A label below 0 or NaN is unknown. A sample has the mean over its known classes (and pixels), as
    `loss_dense` of `fastpie.disagreement`; some of the papers take the sum over the classes, which is
    as many times as large.
    """

    def __init__(self, weights: Tensor | None = None) -> None:
        """With a weight for each class [C], or without."""
        super().__init__()
        self.weights: Tensor | None
        weights = None if weights is None else torch.as_tensor(weights).float()
        self.register_buffer("weights", weights, persistent=False)  # follow from the counts

    def forward(self, logits: Tensor, labels: Any) -> Tensor:  # [n]
        """See `SampleLoss`."""
        logits = in_full_precision(logits)
        labels = binary_labels(labels, logits)
        known = labels >= 0
        losses = self.of_each(logits.where(known, 0), labels.where(known, 0))
        if self.weights is not None:
            losses = losses * _by_class(self.weights, logits)
        return mean_of_known(losses, known)

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:  # [n, C, ...]
        """Losses before class weights, of logits in full precision and labels that are known."""
        raise NotImplementedError


class BinaryCrossEntropy(MultilabelLoss):
    """Binary cross-entropy; labels are drawn to .5 by the label smoothing `e`: `y (1 - e) + e / 2`."""

    def __init__(self, label_smoothing: float = 0.0, weights: Tensor | None = None) -> None:
        """With smoothing in [0, 1), and weights [C] of the classes."""
        super().__init__(weights)
        self.label_smoothing = number("label_smoothing", label_smoothing, 0, 1, open_high=True)

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MultilabelLoss`."""
        if self.label_smoothing:
            labels = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


class BinaryFocal(MultilabelLoss):
    """Focal loss, `|y - p| ** gamma` times binary cross-entropy.

    Lin et al., https://arxiv.org/abs/1708.02002; for labels between 0 and 1 the factor is that of
    the quality focal loss (Li et al., https://arxiv.org/abs/2006.04388).
    """

    def __init__(self, gamma: float = 2.0, weights: Tensor | None = None) -> None:
        """With gamma of at least 0 (0 is binary cross-entropy), and weights [C] of the classes."""
        super().__init__(weights)
        self.gamma = number("gamma", gamma, 0)

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MultilabelLoss`."""
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        if not self.gamma:
            return losses
        # 1 - p of a large logit is sigmoid(-logit), not what rounding leaves of 1 - p.
        miss = labels * (-logits).sigmoid() - (1 - labels) * logits.sigmoid()
        return _power(miss.abs(), self.gamma) * losses


class BinaryClassBalanced(BinaryFocal):
    """Binary cross-entropy or focal loss, a class weighted by the effective number of its positives.

    Cui et al., https://arxiv.org/abs/1901.05555; the weights have a mean of 1 over the classes.
    """

    def __init__(self, counts: Any, beta: float = 0.9999, gamma: float = 0.0) -> None:
        """Of counts [2, C], negatives and positives; beta in [0, 1); gamma of the focal loss."""
        log_odds(counts)  # refuses counts of the wrong shape
        super().__init__(gamma, effective_number_weights(counts, beta))


class BinaryLogitAdjusted(BinaryCrossEntropy):
    """Binary cross-entropy of `logits + tau * log(pi / (1 - pi))`, pi the class's rate of positives.

    The two-class case of Menon et al., https://arxiv.org/abs/2007.07314, eq. 10, for each class: the
    softmax over (0, z) with both log priors added. The class-specific bias of Wu et al.,
    Distribution-Balanced Loss, https://arxiv.org/abs/2007.09654, is the same with tau as its kappa.
    """

    def __init__(self, counts: Any, tau: float = 1.0, label_smoothing: float = 0.0) -> None:
        """Of counts [2, C], negatives and positives; tau of at least 0 (0: binary cross-entropy)."""
        super().__init__(label_smoothing)
        shift = number("tau", tau, 0) * log_odds(counts)
        self.register_buffer("shift", shift.float(), persistent=False)
        self.shift: Tensor

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MultilabelLoss`."""
        return super().of_each(logits + _by_class(self.shift, logits), labels)


class Asymmetric(MultilabelLoss):
    """Asymmetric loss: easy negatives count less than easy positives, very easy ones not at all.

    `-y (1 - p) ** g+ log p - (1 - y) p_m ** g- log(1 - p_m)`, `p_m = max(p - margin, 0)`. Ridnik et
    al., Asymmetric Loss For Multi-Label Classification, https://arxiv.org/abs/2009.14119.
    """

    def __init__(
        self, gamma_negative: float = 4.0, gamma_positive: float = 1.0, margin: float = 0.05
    ) -> None:
        """With exponents of at least 0 and a margin in [0, 1); the defaults are the authors' code's."""
        super().__init__()
        self.gamma_negative = number("gamma_negative", gamma_negative, 0)
        self.gamma_positive = number("gamma_positive", gamma_positive, 0)
        self.margin = number("margin", margin, 0, 1, open_high=True)

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `MultilabelLoss`."""
        positive = -functional.logsigmoid(logits) * _power((-logits).sigmoid(), self.gamma_positive)
        p = logits.sigmoid()
        if self.margin:
            p = (p - self.margin).clamp_min(0)
            negative = -(-p).log1p()
        else:
            negative = -functional.logsigmoid(-logits)
        return labels * positive + (1 - labels) * negative * _power(p, self.gamma_negative)


def _power(base: Tensor, exponent: float) -> Tensor:
    """The power of a probability; its slope has no pole at 0."""
    return base.clamp_min(torch.finfo(base.dtype).tiny).pow(exponent)


def _by_class(table: Tensor, logits: Tensor) -> Tensor:  # [C] -> [C, 1, ...]
    if len(table) != logits.shape[1]:
        raise FastpieError(
            f"Expected `logits` of the {len(table)} classes of the counts or weights, but got "
            f"{logits.shape[1]} classes."
        )
    return table.to(logits.device, logits.dtype).view(-1, *[1] * (logits.ndim - 2))


def binary_labels(labels: Any, logits: Tensor) -> Tensor:
    """Labels in the logits' dtype and on their device, shape and on the CPU values checked."""
    if not isinstance(labels, Tensor) or labels.shape != logits.shape:
        what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise FastpieError(f"Expected labels of shape {list(logits.shape)}, but got {what}.")
    values: Tensor = labels.to(logits.device, logits.dtype)
    if checkable(values) and (values > 1).any():
        raise FastpieError(
            "Expected labels in [0, 1], or NaN or below 0 (unknown), but got "
            f"{float(values[values > 1][0]):g}."
        )
    return values
