"""Accuracy by class and by level, as the report shows them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpie.report.columns import Columns

__all__ = ["AccuracyCurve", "ClassRow", "accuracy_curve", "class_column", "class_rows", "mean_of"]


@dataclass(frozen=True)
class ClassRow:
    """One class. A fraction is None where the run cannot tell it.

    Attributes:
        index: of the class.
        n: samples of the class; multilabel: positive samples.
        dense_accuracy: fraction of the class that the dense model gets right (its recall).
        pruned_accuracy: the same of the pruned model at the highest level.
        flip_rate: fraction whose prediction changes at the highest level.
        hardness: mean, over the samples where it is not NaN.
    """

    index: int
    n: int
    dense_accuracy: float | None
    pruned_accuracy: float | None
    flip_rate: float | None
    hardness: float | None


@dataclass(frozen=True)
class AccuracyCurve:
    """How good the model is at every sparsity; a curve that the run cannot tell is empty.

    Attributes:
        sparsities: 0 (the dense model) and the levels.
        overall: fraction of the samples predicted right.
        balanced: mean over the labelled classes of the fraction predicted right.
        agreement: fraction of the samples predicted as the dense model does.
    """

    sparsities: list[float]
    overall: list[float]
    balanced: list[float]
    agreement: list[float]


def class_column(columns: Columns) -> str | None:
    """The column that sorts samples into classes: the label, or else the dense prediction."""
    for name in ("label", "prediction_dense"):
        values = columns.numbers(name)
        if values is not None and np.isfinite(values).any():
            return name
    return None


def class_rows(columns: Columns) -> list[ClassRow]:
    """Every class that occurs, in order of its index."""
    flip = columns.at_highest("flip")
    hardness = columns.numbers("hardness")
    positives = columns.multilabels()
    if positives is not None:
        return [
            _row(index, np.flatnonzero(positives[:, index] == 1), None, None, flip, hardness)
            for index in range(positives.shape[1])
        ]
    by = class_column(columns)
    if by is None:
        return []
    classes = columns.numbers(by)
    assert classes is not None
    dense = pruned = None
    if by == "label":
        dense = _right(classes, columns.numbers("prediction_dense"))
        pruned = _right(classes, columns.at_highest("prediction_pruned"))
    # One sort for all classes: thousands of classes times millions of samples would be slow.
    order = np.argsort(classes, kind="stable")
    order = order[np.isfinite(classes[order])]
    values, starts = np.unique(classes[order], return_index=True)
    return [
        _row(int(value), rows, dense, pruned, flip, hardness)
        for value, rows in zip(values, np.split(order, starts[1:]), strict=True)
    ]


def accuracy_curve(columns: Columns) -> AccuracyCurve:
    """Accuracy at sparsity 0 and at every level, as far as labels and predictions are there."""
    flips = columns.at_levels("flip")
    agreement = [1.0, *(1 - float(f.mean()) for f in flips.values())] if len(columns) else []
    labels = columns.numbers("label")
    dense = columns.numbers("prediction_dense")
    predictions = list(columns.at_levels("prediction_pruned").values())
    overall: list[float] = []
    balanced: list[float] = []
    if labels is not None and dense is not None and np.isfinite(labels).any():
        labelled = np.isfinite(labels)
        _, classes = np.unique(labels[labelled], return_inverse=True)
        for prediction in [dense, *predictions]:
            right = (prediction == labels)[labelled]
            overall.append(float(right.mean()))
            balanced.append(float((np.bincount(classes, right) / np.bincount(classes)).mean()))
    return AccuracyCurve(
        sparsities=[0.0, *columns.sparsities],
        overall=overall,
        balanced=balanced,
        agreement=agreement if len(agreement) > 1 else [],
    )


def mean_of(values: np.ndarray | None) -> float | None:
    """Mean of the values that are numbers; None where there is none."""
    if values is None:
        return None
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _right(classes: np.ndarray, prediction: np.ndarray | None) -> np.ndarray | None:
    return None if prediction is None else (prediction == classes).astype(np.float64)


def _row(
    index: int,
    rows: np.ndarray,
    dense: np.ndarray | None,
    pruned: np.ndarray | None,
    flip: np.ndarray | None,
    hardness: np.ndarray | None,
) -> ClassRow:
    means = [mean_of(None if v is None else v[rows]) for v in (dense, pruned, flip, hardness)]
    return ClassRow(index, len(rows), *means)
