"""Pairs of classes: are those that are alike in frequency, or occur together, forgotten alike?"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fastpie._extras import load_extra
from fastpie.analysis.forgettability import changes, link_rows
from fastpie.analysis.intervals import (
    METHODS,
    Estimate,
    blocks,
    fisher_interval,
    permutation_p,
    permutations,
    resampled_weights,
    spread,
    t_interval,
    weighted_correlation,
)
from fastpie.analysis.metrics import Measurement
from fastpie.analysis.predictions import Predictions
from fastpie.errors import FastpieError

__all__ = ["pair_links", "pairs", "regression"]

COVARIATES = ("frequency_difference", "iou_root")
TERMS = ("intercept", *COVARIATES, "interaction")


def pairs(
    predictions: Predictions,
    measurement: Measurement,
    *,
    metric: str = "ap",
    compat: str | None = None,
) -> pa.Table:
    """Every pair of classes: how differently they are forgotten, and how alike they are.

    `fcd` is the forgettability curve dissimilarity `||F_a - F_b||_2` over the levels (G. Holste et
    al., "How does pruning impact long-tailed multi-label medical image classifiers?", MICCAI 2023),
    `frequency_difference` `|ln f_a - ln f_b|` of the positives in training, or of the labels where
    `train_counts` is None, and `iou` the share of the samples with both classes among those with
    either, `M_ab / (M_aa + M_bb - M_ab)` with `M = Y'Y`, over the samples whose two labels are
    known. `iou_root` is `iou ** (1/4)`.

    Args:
        predictions: with labels.
        measurement: `measure(predictions)`.
        metric: whose curves, of `METRICS`.
        compat: "prunecxr" computes what that code does (main_analysis.py): f_a is the column sum
            of M, so each sample counts once for each of its labels, in `iou` as well as in
            `frequency_difference`, which then come from the labels of these samples.

    Returns:
        Columns class_a, class_b, fcd, frequency_difference, iou, iou_root; null where a curve is
        not known, a class has no positive, or no sample has either.

    Raises:
        FastpieError: without labels, for an unknown metric or compat.
    """
    if compat not in (None, "prunecxr"):
        raise FastpieError(f"Expected `compat` to be None or 'prunecxr', but got {compat!r}.")
    curves = np.median(changes(measurement.models.of(metric)), axis=0)[1:]  # [L, C]
    labels = predictions.positives()
    positive = (labels == 1).astype(np.float64)
    together = positive.T @ positive
    if compat == "prunecxr":
        counts = together.sum(0)
        either = counts[:, None] + counts - together
    else:
        known = (~np.isnan(labels)).astype(np.float64)
        of_first = positive.T @ known  # a is positive, b known
        either = of_first + of_first.T - together
        trained = measurement.train_counts
        counts = np.asarray(measurement.positives if trained is None else trained, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = np.where(counts > 0, np.log(counts), np.nan)
        iou = together / either
    first, second = np.triu_indices(predictions.classes, 1)
    names = predictions.class_names
    columns = {
        "fcd": np.sqrt(((curves[:, first] - curves[:, second]) ** 2).sum(0)),
        "frequency_difference": np.abs(logarithm[first] - logarithm[second]),
        "iou": iou[first, second],
        "iou_root": iou[first, second] ** 0.25,
    }
    return pa.table(
        {
            "class_a": pa.array([names[i] for i in first], pa.string()),
            "class_b": pa.array([names[i] for i in second], pa.string()),
            **{
                name: pa.array(values, pa.float64(), from_pandas=True)
                for name, values in columns.items()
            },
        }
    )


def pair_links(table: pa.Table, *, seed: int = 0) -> pa.Table:
    """How FCD goes with the difference of frequencies and with co-occurrence.

    C classes make C (C - 1) / 2 pairs, which are not independent: a class that is forgotten in a
    way of its own is in C - 1 of them. So the p-values come from permuting *classes* (N. Mantel, "The
    detection of disease clustering and a generalized regression approach", Cancer Research 27, 1967)
    and the intervals from resampling classes (T. A. B. Snijders and S. P. Borgatti, "Non-parametric
    standard errors and tests for network statistics", Connections 22, 1999), a pair of one class
    with itself left out; from the standard error of Fisher's z and Student's t as in `links`.

    Args:
        table: of `pairs`.
        seed: of permutations and resamples.

    Returns:
        The columns of `links`; null with fewer than 5 classes that are known throughout, or where
        a column is constant. `n` counts pairs.
    """
    rows = []
    for name in COVARIATES:
        known = _Known(table, ["fcd", name])
        for method in METHODS:
            rows.append((name, "fcd", method, _correlation(known, name, method, seed)))
    return link_rows(rows)


def regression(table: pa.Table, *, seed: int = 0) -> pa.Table:
    """FCD explained by the difference of frequencies, co-occurrence and their interaction.

    Ordinary least squares on all pairs, `iou_root` and `frequency_difference` standardised (so that
    a coefficient is FCD per standard deviation), `interaction` their product. As pairs are not
    independent, p-values are by double semi-partialling (D. Dekker, D. Krackhardt and T. A. B.
    Snijders, "Sensitivity of MRQAP tests to collinearity and autocorrelation conditions",
    Psychometrika 72, 2007): what the other terms do not explain of a term is permuted by class, and
    the t statistic of the term compared. Intervals: coefficient +- Student's t times its standard
    error over resamples of the classes, with C - 4 degrees of freedom.

    Args:
        table: of `pairs`.
        seed: of permutations and resamples.

    Returns:
        Columns term ("intercept", "frequency_difference", "iou_root", "interaction"), coefficient,
        low, high, p, vif (variance inflation factor, at least 1). A covariate that is constant
        (no class of a multiclass task occurs together with another) takes no part: its row and the
        interaction's are null. All is null with fewer than 6 classes that are known throughout.
    """
    known = _Known(table, ["fcd", *COVARIATES])
    columns = {name: known.columns[name] for name in COVARIATES}
    varies = {
        name: np.ptp(values) > 0 if len(values) else False for name, values in columns.items()
    }
    terms = {"intercept": np.ones(len(known.first))}
    for name in COVARIATES:
        if varies[name]:
            terms[name] = (columns[name] - columns[name].mean()) / columns[name].std()
    if all(varies.values()):
        terms["interaction"] = terms[COVARIATES[0]] * terms[COVARIATES[1]]
    found: dict[str, tuple[float, ...]] = {}
    if known.classes >= 6:
        design, y = np.stack(list(terms.values()), axis=1), known.columns["fcd"]
        generator = np.random.default_rng(seed)
        coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
        errors = _errors(known, design, y, generator)
        inflation = _inflation(design)
        for place, name in enumerate(terms):
            low, high = t_interval(
                float(coefficients[place]), errors[place], known.classes - len(TERMS)
            )
            p = np.nan if name == "intercept" else _semi_partial(known, design, y, place, generator)
            found[name] = (float(coefficients[place]), low, high, p, inflation[place])
    nothing = (np.nan,) * 5
    values = np.array([found.get(name, nothing) for name in TERMS])
    names = ("coefficient", "low", "high", "p", "vif")
    return pa.table(
        {
            "term": pa.array(TERMS, pa.string()),
            **{
                name: pa.array(values[:, i], pa.float64(), from_pandas=True)
                for i, name in enumerate(names)
            },
        }
    )


class _Known:
    """The pairs of the classes for which all pairs are known, in some columns."""

    def __init__(self, table: pa.Table, names: list[str]) -> None:
        a, b = (table.column(name).to_pylist() for name in ("class_a", "class_b"))
        numbers = {name: i for i, name in enumerate(dict.fromkeys([*a, *b]))}
        first, second = (np.array([numbers[name] for name in side], int) for side in (a, b))
        columns = {
            name: table.column(name).to_numpy().astype(np.float64, copy=False) for name in names
        }
        missing = np.isnan(np.stack(list(columns.values()))).any(0)
        keep = np.ones(len(numbers), bool)
        while True:
            lost = missing & keep[first] & keep[second]
            if not lost.any():
                break
            counts = np.bincount(first[lost], minlength=len(keep))
            keep[(counts + np.bincount(second[lost], minlength=len(keep))).argmax()] = False
        chosen = keep[first] & keep[second]
        compact = np.cumsum(keep) - 1
        self.classes = int(keep.sum())
        self.first, self.second = compact[first[chosen]], compact[second[chosen]]
        self.columns = {name: values[chosen] for name, values in columns.items()}
        self._place = np.zeros((self.classes, self.classes), int)
        self._place[self.first, self.second] = np.arange(len(self.first))
        self._place[self.second, self.first] = np.arange(len(self.first))

    def permuted(self, generator: np.random.Generator, rows: int) -> np.ndarray:
        """Int [rows, P]: which pair takes the place of each when the classes are permuted."""
        orders = permutations(generator, rows, self.classes)
        places: np.ndarray = self._place[orders[:, self.first], orders[:, self.second]]
        return places

    def weights(self, generator: np.random.Generator, rows: int) -> np.ndarray:
        """Fp64 [rows, P]: how often each pair is there when the classes are resampled."""
        of_classes = resampled_weights(generator, rows, self.classes)
        weights: np.ndarray = of_classes[:, self.first] * of_classes[:, self.second]
        return weights


def _correlation(known: _Known, name: str, method: str, seed: int) -> Estimate:
    x, y = known.columns[name], known.columns["fcd"]
    n = len(x)
    if known.classes < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(np.nan, np.nan, np.nan, np.nan, n)
    generator = np.random.default_rng(seed)
    value = float(weighted_correlation(x, y, np.ones((1, n)), method)[0])
    parts = [
        weighted_correlation(x, y, known.weights(generator, rows), method)
        for rows in blocks(n, 1999)
    ]
    low, high = fisher_interval(value, np.concatenate(parts), known.classes - 2)
    if method == "spearman":
        ranks = load_extra("scipy.stats", "analysis", "ranks").rankdata
        x, y = ranks(x), ranks(y)
    x, y = x - x.mean(), y - y.mean()
    products = np.concatenate([y[known.permuted(generator, rows)] @ x for rows in blocks(n, 9999)])
    return Estimate(value, low, high, permutation_p(x @ y, products), n)


def _errors(
    known: _Known, design: np.ndarray, y: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Standard error of each coefficient over resamples of the classes."""
    terms = design.shape[1]
    squares = (design[:, :, None] * design[:, None, :]).reshape(len(y), -1)
    parts = []
    for rows in blocks(len(y), 1999):
        weights = known.weights(generator, rows)
        left = (weights @ squares).reshape(rows, terms, terms)
        right = weights @ (design * y[:, None])
        parts.append((np.linalg.pinv(left, hermitian=True) @ right[..., None])[..., 0])
    return spread(np.concatenate(parts))


def _semi_partial(
    known: _Known, design: np.ndarray, y: np.ndarray, place: int, generator: np.random.Generator
) -> float:
    basis = np.linalg.qr(np.delete(design, place, axis=1))[0]
    rest = y - basis @ (basis.T @ y)  # of FCD, after the other terms
    own = design[:, place] - basis @ (basis.T @ design[:, place])

    def statistic(term: np.ndarray) -> np.ndarray:  # [rows, P] -> [rows]
        # The partial correlation, which orders as |t| does.
        term = term - (term @ basis) @ basis.T
        result: np.ndarray = (term @ rest) / np.sqrt((term**2).sum(1))
        return result

    as_far = [statistic(own[known.permuted(generator, rows)]) for rows in blocks(len(y), 9999)]
    return permutation_p(float(statistic(own[None])[0]), np.concatenate(as_far))


def _inflation(design: np.ndarray) -> np.ndarray:
    """Variance inflation factors; NaN for the intercept, and where terms determine each other."""
    result = np.full(design.shape[1], np.nan)
    correlations = np.atleast_2d(np.corrcoef(design[:, 1:], rowvar=False))
    if design.shape[1] > 1 and np.linalg.matrix_rank(correlations) == len(correlations):
        result[1:] = np.diag(np.linalg.inv(correlations))
    return result
