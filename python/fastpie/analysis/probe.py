"""A linear probe of every label by all other samples: what the features say that the label should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpie.errors import FastpieError

__all__ = ["leave_one_out", "probe_margins"]

# Times the number of samples, where columns have variance 1. What benchmarks/quality measures; other
# values were not compared there.
_PENALTY = 0.1
_LEAST_SPREAD = 1e-8  # a column that varies less is a dead channel
_BLOCK = 1 << 24  # numbers that are looked at together: 128 MB in fp64


def leave_one_out(
    features: Any,  # [N, D]
    targets: Any,  # [N, C]
    *,
    penalty: float = _PENALTY,
) -> np.ndarray:  # fp64 [N, C]
    """Each sample's prediction by the ridge regression of the targets on all other samples' features.

    In closed form from one regression on all N, `(H Y - h Y) / (1 - h)` with the hat matrix H and its
    diagonal h (D. M. Allen, "The relationship between variable selection and data augmentation and a
    method for prediction", Technometrics 16, 1974). Features are standardised, columns that do not
    vary left out, and a column of ones added. In fp64, in blocks of rows; of the two forms with a
    matrix of D x D or of N x N the smaller one is solved.

    Args:
        features: numbers, a memory-mapped array as well. A row with a value that is not finite takes
            no part, and its predictions are NaN.
        targets: numbers; a NaN counts as the mean of its column.
        penalty: of the regression, times N.

    Raises:
        FastpieError: for shapes that do not fit, or a penalty that is not above 0.
    """
    x, y = np.asanyarray(features), np.asarray(targets, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise FastpieError(
            "Expected `features` of shape [N, D] and `targets` of shape [N, C], but got "
            f"{list(x.shape)} and {list(y.shape)}."
        )
    if not 0 < penalty < float("inf"):
        raise FastpieError(f"Expected a `penalty` above 0, but got {penalty}.")
    result = np.full(y.shape, np.nan)
    step = max(1, _BLOCK // max(1, x.shape[1]))
    good = np.concatenate(
        [np.isfinite(x[i : i + step]).all(1) for i in range(0, len(x), step)] or [np.zeros(0, bool)]
    )
    rows = np.flatnonzero(good)
    if len(rows) < 2:
        return result
    y = y[rows]
    known = ~np.isnan(y)
    means = np.where(known, y, 0).sum(0) / np.maximum(known.sum(0), 1)
    y = np.where(known, y, means)
    columns = _Standard(x, rows, step)
    if columns.width <= len(rows):
        found = _by_columns(columns, y, penalty * len(rows))
    else:
        found = _by_rows(columns, y, penalty * len(rows))
    result[rows] = found
    return result


def probe_margins(
    features: Any,  # [N, D]
    labels: Any,  # multiclass: [N], -1 unknown; multilabel: [N, C] of 1, 0, NaN
    classes: int,
) -> np.ndarray:  # fp64 [N] or [N, C]
    """How far the probe of all other samples agrees with each label; below 0 it says another one.

    Multiclass: the prediction of the label's class minus the largest of the others, of `leave_one_out`
    with one target a class. Multilabel: of each class `(2 y - 1) (prediction - 1/2)`.

    Args:
        features: see `leave_one_out`. Those of early stages tell wrong labels, as the last one has
            learnt them by heart: `fastpie.dual.stage_features`.
        labels: integers or fp32.
        classes: C.

    Returns:
        NaN for an unknown label and for features that are not finite; multiclass with one class: NaN.

    Raises:
        FastpieError: for shapes that do not fit.
    """
    values = np.asarray(labels)
    if values.ndim == 2:
        signs: np.ndarray = 2 * values.astype(np.float64) - 1
        return signs * (leave_one_out(features, values) - 0.5)
    one_hot = (values[:, None] == np.arange(classes)).astype(np.float64)
    unknown = one_hot.sum(1) == 0
    x = np.asanyarray(features)
    result = np.full(len(values), np.nan)
    if classes < 2 or len(x) != len(values):
        if len(x) != len(values):
            raise FastpieError(f"Expected {len(x)} labels, but got {len(values)}.")
        return result
    rows = np.flatnonzero(~unknown)
    told = leave_one_out(x if not unknown.any() else x[rows], one_hot[rows])
    own = told[np.arange(len(rows)), values[rows]]
    told[np.arange(len(rows)), values[rows]] = -np.inf
    result[rows] = own - told.max(1)
    return result


class _Standard:
    """Rows of an array with columns of mean 0 and variance 1, and one of ones, block by block."""

    def __init__(self, x: np.ndarray, rows: np.ndarray, step: int) -> None:
        self._x, self._rows, self._step = x, rows, step
        total = np.zeros(x.shape[1])
        for _, block in self._raw():
            total += block.sum(0)
        self._mean = total / len(rows)
        squares = np.zeros(x.shape[1])
        for _, block in self._raw():
            squares += np.square(block - self._mean).sum(0)
        spread = np.sqrt(squares / len(rows))
        self._kept = np.flatnonzero(spread > _LEAST_SPREAD)
        self._spread = spread[self._kept]
        self.width = 1 + len(self._kept)
        self.rows = len(rows)

    def _raw(self) -> Iterator[tuple[slice, np.ndarray]]:
        for first in range(0, len(self._rows), self._step):
            here = slice(first, min(first + self._step, len(self._rows)))
            yield here, self._x[self._rows[here]].astype(np.float64)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:  # fp64 [n, width]
        for here, block in self._raw():
            block = (block[:, self._kept] - self._mean[self._kept]) / self._spread
            yield here, torch.from_numpy(np.concatenate([block, np.ones((len(block), 1))], 1))


def _by_columns(columns: _Standard, y: np.ndarray, penalty: float) -> np.ndarray:
    targets = torch.from_numpy(y)
    gram = penalty * torch.eye(columns.width, dtype=torch.float64)
    product = torch.zeros(columns.width, targets.shape[1], dtype=torch.float64)
    for here, x in columns.blocks():
        gram.addmm_(x.T, x)
        product.addmm_(x.T, targets[here])
    factor = torch.linalg.cholesky(gram)
    weights = torch.cholesky_solve(product, factor)
    result = torch.empty_like(targets)
    for here, x in columns.blocks():
        # h = x A^-1 x', with A = L L'
        leverage = torch.linalg.solve_triangular(factor, x.T, upper=False).square().sum(0)[:, None]
        result[here] = (x @ weights - leverage * targets[here]) / (1 - leverage)
    found: np.ndarray = result.numpy()
    return found


def _by_rows(columns: _Standard, y: np.ndarray, penalty: float) -> np.ndarray:
    """With K = X X' + penalty: the residual without sample i is (K^-1 Y)_i / (K^-1)_ii."""
    targets = torch.from_numpy(y)
    kernel = penalty * torch.eye(columns.rows, dtype=torch.float64)
    for here, x in columns.blocks():
        for there, z in columns.blocks():
            kernel[here, there] += x @ z.T
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    found: np.ndarray = (targets - (inverse @ targets) / inverse.diagonal()[:, None]).numpy()
    return found
