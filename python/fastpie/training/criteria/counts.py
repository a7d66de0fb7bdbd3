"""How often each class comes, and the weights and shifts of logits that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpie._checks import number
from fastpie.errors import FastpieError

__all__ = ["class_counts", "effective_number_weights", "log_odds", "log_prior", "multiclass_counts"]


def class_counts(labels: Any, classes: int | None = None, task: str = "multiclass") -> Tensor:
    """How many samples each class has.

    Args:
        labels: of all training samples, as `ManifestDataset.labels` has them. Multiclass: integers
            [N] (below 0: unknown); segmentation likewise, maps [N, ...], of which pixels are counted;
            multilabel: [N, C] of 0, 1 and NaN or -1 (unknown).
        classes: C; by default what the labels show: the highest class, or the width.
        task: "multiclass", "multilabel" or "segmentation".

    Returns:
        int64 on the CPU: [C]; multilabel [2, C], known negatives before positives.

    Raises:
        FastpieError: for labels that do not fit the task, or a class of `classes` or above.
    """
    if task not in ("multiclass", "multilabel", "segmentation"):
        raise FastpieError(
            f"Expected `task` to be 'multiclass', 'multilabel' or 'segmentation', but got {task!r}."
        )
    try:
        table = (
            labels.detach().cpu()
            if isinstance(labels, Tensor)
            else torch.as_tensor(np.asarray(labels))
        )
    except (TypeError, ValueError) as error:
        raise FastpieError(
            f"Expected `labels` that form a table of numbers, but {error}."
        ) from error
    if task == "multilabel":
        if table.ndim != 2 or classes not in (None, table.shape[1]):
            raise FastpieError(
                f"Expected multilabel `labels` of shape [N, {'C' if classes is None else classes}], "
                f"but got {list(table.shape)}."
            )
        return torch.stack([(table == 0).sum(0), (table == 1).sum(0)])
    if table.numel() and (table.is_floating_point() or table.dtype is torch.bool):
        raise FastpieError(
            f"Expected `labels` of integers for task {task!r}, but got {table.dtype}."
        )
    known = table.flatten()
    known = known[known >= 0].long()
    counts = torch.bincount(known, minlength=classes or 0)
    if classes is not None and len(counts) > classes:
        raise FastpieError(f"Expected labels below {classes}, but got {len(counts) - 1}.")
    return counts


def multiclass_counts(counts: Any) -> Tensor:  # fp64 [C]
    """Counts, checked, of at least one: a class that never comes has no finite prior or weight.

    Raises:
        FastpieError: unless they are finite numbers of at least 0, one for each class.
    """
    table = _table(counts)
    if table.ndim != 1:
        raise FastpieError(
            f"Expected `counts` of shape [C], one for each class, but got {list(table.shape)}."
        )
    return table.clamp_min(1)


def log_prior(counts: Any) -> Tensor:  # fp64 [C]
    """`log(n_c / sum n)`."""
    table = multiclass_counts(counts)
    return (table / table.sum()).log()


def log_odds(counts: Any) -> Tensor:  # [2, C] -> fp64 [C]
    """`log(positives / negatives)`, which is `log(pi / (1 - pi))`, each of at least one sample."""
    negatives, positives = _binary_counts(counts)
    return (positives / negatives).log()


def effective_number_weights(counts: Any, beta: float = 0.9999) -> Tensor:  # fp64 [C]
    """Weights by the inverse effective number of samples, scaled to a mean of 1.

    `w_c ~ (1 - beta) / (1 - beta ** n_c)`: Cui et al., Class-Balanced Loss Based on Effective Number
    of Samples, https://arxiv.org/abs/1901.05555. beta = 0 weights all classes alike, towards 1 the
    weights go to `1 / n_c`. Of counts [2, C] (multilabel) the positives alone.

    Raises:
        FastpieError: for bad counts, or beta outside [0, 1).
    """
    number("beta", beta, 0, 1, open_high=True)
    table = _table(counts)
    table = _binary_counts(table)[1] if table.ndim == 2 else multiclass_counts(table)
    weights = (1 - beta) / (1 - beta**table)
    return weights / weights.mean()


def _binary_counts(counts: Any) -> tuple[Tensor, Tensor]:
    table = _table(counts)
    if table.ndim != 2 or len(table) != 2:
        raise FastpieError(
            "Expected `counts` of shape [2, C], negatives and positives of each class (see "
            f"class_counts), but got {list(table.shape)}."
        )
    return table[0].clamp_min(1), table[1].clamp_min(1)


def _table(counts: Tensor | Sequence[float]) -> Tensor:
    try:
        table = torch.as_tensor(counts).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FastpieError(f"Expected `counts` of numbers, but {error}.") from error
    if not table.numel() or not (table.isfinite() & (table >= 0)).all():
        raise FastpieError("Expected `counts` to be finite and at least 0, one for each class.")
    return table
