"""What the criteria have in common: labels checked, unknown ones left out, a loss for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpie.errors import FastpieError

__all__ = ["SampleLoss", "checkable", "in_full_precision", "mean_of_known"]


class SampleLoss(nn.Module):
    """A loss for each sample, from logits and labels.

    What is computed is computed in fp32 (fp64 for fp64 logits), under autocast too. Labels below 0
    and NaN are unknown: nothing is lost there and no gradient comes from there, whatever the logits
    are (NaN included). A sample has the mean over what is known of it, 0 if that is nothing.

    Wrong labels are told on the CPU alone; on a GPU looking would hold up every step, and there the
    driver stops at a class that does not exist.
    """

    def forward(self, logits: Tensor, labels: Any) -> Tensor:  # [n]
        """The losses.

        Raises:
            FastpieError: for labels whose shape, dtype or (on the CPU) values do not fit.
        """
        raise NotImplementedError


def in_full_precision(logits: Tensor) -> Tensor:
    """The logits in fp32, or fp64 as they are."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise FastpieError(
            f"Expected floating-point `logits` of shape [n, C, ...], but got {what}."
        )
    return logits if logits.dtype is torch.float64 else logits.float()


def checkable(labels: Tensor) -> bool:
    """Whether looking at the labels costs nothing: on the CPU, outside `torch.compile`."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def mean_of_known(
    losses: Tensor,  # [n, ...]
    known: Tensor,  # bool, the same
) -> Tensor:  # [n]
    """Each sample's mean over what is known, 0 where nothing is."""
    if losses.ndim == 1:
        return losses.where(known, 0)
    losses, known = losses.flatten(1), known.flatten(1)
    return losses.where(known, 0).sum(1) / known.sum(1).clamp_min(1)
