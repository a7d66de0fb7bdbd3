"""`disagreement`: named scores of two models' outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpie import ops
from fastpie.errors import FastpieError
from fastpie.ops.disagreement import SCORES
from fastpie.ops.segmentation_disagreement import IOUS

__all__ = ["TASKS", "checked_labels", "disagreement"]

TASKS = ("multiclass", "multilabel", "segmentation", "embedding")
_WITH_LABELS = ("loss_dense", "loss_pruned", "damage")


def disagreement(
    dense: Tensor,  # [N, C], segmentation [N, C, ...], embedding [N, D]
    pruned: Tensor,  # the same, or with a leading level dimension [L, ...]
    labels: Tensor | None = None,
    task: str = "multiclass",
) -> dict[str, Tensor]:  # each [N], or [L, N]
    """How far the pruned model's outputs are from the dense model's, sample by sample.

    For "multiclass" and "multilabel", in one pass over memory:

    ========================  =====================================================================
    js, kl, kl_reverse        Jensen-Shannon divergence, KL(dense || pruned), KL(pruned || dense),
                              in nats, never negative, js at most ln 2; multilabel: of the Bernoulli
                              distribution of each class, mean over the classes
    spearman                  rank correlation of the C logits, average ranks for ties; NaN where
                              either row is constant
    flip                      bool: the largest logit (multilabel: any class at probability .5)
                              changes sides
    margin_dense, _pruned     the label's logit minus the best other, without labels the largest
                              minus the second; multilabel with labels: lowest positive minus
                              highest negative, 0 standing in for a side that the row has not;
                              NaN for a single class
    drift                     L2 distance of the L2-normalised rows, in [0, 2]; NaN with -inf logits
    loss_dense, loss_pruned   with labels: cross-entropy, in nats; multilabel: mean binary
                              cross-entropy over the known classes
    damage                    with labels: loss_pruned - loss_dense
    ========================  =====================================================================

    "segmentation" gives `iou` (of the predicted classes without background 0, with C == 1 of the
    foreground at probability .5; 1 where both predict none) and `iou_soft` (sum of minima over sum
    of maxima of the probabilities), "embedding" gives `drift`; these two do not use labels.

    Differentiable once (all but spearman, flip and iou). The check of the labels' values reads them
    on the host; inside `torch.compile(fullgraph=True)` call `fastpie.ops.disagreement`. Sources: docs/design and
    `fastpie.ops.reference`, which spells every formula out.

    Args:
        dense: outputs of the dense model: fp32, bf16, fp16 or fp64; no softmax applied.
        pruned: outputs of the pruned model, same dtype and device.
        labels: multiclass: integers [N] in [0, C); multilabel: [N, C] of 1, 0 or NaN (unknown).
        task: "multiclass", "multilabel", "segmentation" or "embedding".

    Returns:
        fp32 tensors (fp64 for fp64 inputs) on the inputs' device; flip is bool. A row with a NaN or
        +inf output gives NaN scores and flip False; -inf is a class of probability zero, and a row
        or a pixel of nothing but -inf gives NaN. An embedding must be finite.

    Raises:
        FastpieError: for shapes, dtypes, devices or labels that do not fit together.
    """
    if task not in TASKS:
        raise FastpieError(f"Expected `task` to be one of {TASKS}, but got {task!r}.")
    for name, tensor in (("dense", dense), ("pruned", pruned), ("labels", labels)):
        if not isinstance(tensor, Tensor) and not (name == "labels" and tensor is None):
            raise FastpieError(
                f"Expected `{name}` to be a tensor, but got {type(tensor).__name__}."
            )
    if not dense.is_floating_point() or pruned.dtype is not dense.dtype:
        raise FastpieError(
            "Expected `dense` and `pruned` to be of one floating dtype, but got "
            f"{dense.dtype} and {pruned.dtype}."
        )
    least = 3 if task == "segmentation" else 2
    if dense.ndim < least or (task != "segmentation" and dense.ndim != 2):
        shape = "[N, C, H, ...]" if task == "segmentation" else "[N, C]"
        raise FastpieError(
            f"Expected `dense` to have shape {shape} for task {task!r}, but got "
            f"{list(dense.shape)}."
        )
    ladder = pruned.ndim == dense.ndim + 1
    if (pruned.shape[1:] if ladder else pruned.shape) != dense.shape:
        raise FastpieError(
            f"Expected `pruned` to have the shape {list(dense.shape)} of `dense`, or that behind a "
            f"level dimension, but got {list(pruned.shape)}."
        )
    if not ladder:
        pruned = pruned.unsqueeze(0)
    if task == "segmentation":
        packed = ops.segmentation_disagreement(dense, pruned)
        scores = dict(zip(IOUS, packed.unbind(0), strict=True))
    elif task == "embedding":
        scores = {"drift": ops.embedding_disagreement(dense, pruned)}
    else:
        if labels is not None:
            labels = checked_labels(labels, dense.shape[0], dense.shape[1], task)
        packed = ops.disagreement(dense, pruned, labels, task)
        scores = dict(zip(SCORES, packed.unbind(0), strict=True))
        scores["flip"] = scores["flip"] > 0
        if labels is None:
            for name in _WITH_LABELS:
                del scores[name]
    return scores if ladder else {name: score[0] for name, score in scores.items()}


def checked_labels(labels: Tensor, rows: int, classes: int, task: str) -> Tensor:
    """Labels in the form that the operator takes, or a FastpieError that says what is wrong."""
    if task == "multiclass":
        if labels.shape != (rows,):
            raise FastpieError(
                f"Expected multiclass `labels` of shape [{rows}] (class indices), but got "
                f"{list(labels.shape)}."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
            raise FastpieError(
                f"Expected multiclass `labels` to be integers (class indices), but got "
                f"{labels.dtype}."
            )
        labels = labels.to(torch.int64)
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise FastpieError(
                f"Expected multiclass `labels` in [0, {classes}), but got {int(labels[row])} in "
                f"row {row}."
            )
        return labels
    if labels.shape != (rows, classes):
        raise FastpieError(
            f"Expected multilabel `labels` of shape [{rows}, {classes}], but got "
            f"{list(labels.shape)}."
        )
    labels = labels.to(torch.float32)
    wrong = ~((labels == 0) | (labels == 1) | labels.isnan())
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise FastpieError(
            f"Expected multilabel `labels` of 0, 1 or NaN (unknown), but got "
            f"{float(labels[row, column]):g} in row {row}, class {column}."
        )
    return labels
