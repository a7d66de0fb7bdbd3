"""Forgettability: what pruning costs, over all classes and class by class, level by level."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from fastpie._extras import load_extra
from fastpie.analysis.intervals import (
    METHODS,
    Estimate,
    correlation,
    median_interval,
    paired_drop,
    q_values,
    resampled_interval,
)
from fastpie.analysis.metrics import METRICS, OVERALL, Measurement
from fastpie.errors import FastpieError

__all__ = ["changes", "class_changes", "curves", "first_significant", "levels", "links"]

ALPHA = 0.05
"""A level whose q is below it is significant."""


def levels(measurement: Measurement) -> pa.Table:
    """What each level costs over all classes.

    `value` is the median over the models and `change` the median of their relative changes
    `(m - m_dense) / m_dense`, each model against its own dense self. With several models the
    interval is that of the median over models (`median_interval`: other models, these samples)
    and `p` tests one-sided whether the level lowers the metric, by Student's t on the paired
    differences (`paired_drop`). With one model both come from the Bayesian bootstrap over samples
    (this model, other samples): the difference over its standard error, against the normal
    distribution. `q` corrects the levels of a metric by Benjamini-Hochberg; `significant`: q < .05.

    Args:
        measurement: of `measure`.

    Returns:
        Columns sparsity, metric ("map", "mauroc"; for multiclass also "balanced_accuracy" and
        "accuracy"), value, low, high, change, p, q, significant; one row a metric and level, the
        dense models first as sparsity 0 (change 0, p, q, significant null).
    """
    parts = []
    for name in OVERALL[measurement.task]:
        values = measurement.overall(measurement.models, name)  # [S, L + 1]
        resamples = None
        if measurement.resampled is not None:
            resamples = measurement.overall(measurement.resampled, name)
        if resamples is None:
            low, high = median_interval(values)
            p = paired_drop(values[:, 0], values[:, 1:])
        else:
            low, high = resampled_interval(values[0], resamples)
            p = _drop_of_one(values[0], resamples)
        q = q_values(p)
        nothing = [np.nan]
        parts.append(
            {
                "sparsity": [0.0, *measurement.sparsities],
                "metric": [name] * values.shape[1],
                "value": np.median(values, axis=0),
                "low": low,
                "high": high,
                "change": np.median(changes(values), axis=0),
                "p": np.concatenate([nothing, p]),
                "q": np.concatenate([nothing, q]),
            }
        )
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    result = _table(table)
    q = table["q"]
    return result.append_column("significant", pa.array(q < ALPHA, pa.bool_(), mask=np.isnan(q)))


def first_significant(table: pa.Table, metric: str = "map") -> float | None:
    """The lowest level with a significant drop, of the table of `levels`; None: there is none.

    Raises:
        FastpieError: if the table has no such metric.
    """
    rows = [row for row in table.to_pylist() if row["metric"] == metric]
    if not rows:
        raise FastpieError(
            f"Expected `metric` to be one of {table['metric'].unique().to_pylist()}, but got "
            f"{metric!r}."
        )
    return min((row["sparsity"] for row in rows if row["significant"]), default=None)


def curves(measurement: Measurement) -> pa.Table:
    """Forgettability of every class, level by level.

    `change` is `F_c(k)`, the median over models of `d = (m(k) - m(0)) / (m(0) + 1e-12)`, each
    model against its own dense self (G. Holste et al., "How does pruning impact long-tailed
    multi-label medical image classifiers?", MICCAI 2023; `VITA-Group/PruneCXR` main_analysis.py).
    Its interval: with several models that of a median over models, with one from the Bayesian
    bootstrap over samples.

    Args:
        measurement: of `measure`.

    Returns:
        Columns class, sparsity, metric ("ap", "auroc", "recall"), value (median over models),
        change, low, high (of the change); one row a metric, class and level, the dense models
        first as sparsity 0 (change 0, low and high null). Null where a class has no positive or no
        negative sample.
    """
    names, places = measurement.class_names, [0.0, *measurement.sparsities]
    parts = []
    for metric in METRICS:
        values = measurement.models.of(metric)  # [S, L + 1, C]
        relative = changes(values)
        if measurement.resampled is None:
            low, high = median_interval(relative)
        else:
            low, high = resampled_interval(relative[0], changes(measurement.resampled.of(metric)))
        low[0] = high[0] = np.nan
        parts.append(
            {
                "class": np.repeat(names, len(places)),
                "sparsity": np.tile(places, len(names)),
                "metric": np.full(len(names) * len(places), metric),
                "value": np.median(values, axis=0).T.ravel(),
                "change": np.median(relative, axis=0).T.ravel(),
                "low": low.T.ravel(),
                "high": high.T.ravel(),
            }
        )
    return _table({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def class_changes(
    measurement: Measurement,
    *,
    level: int | None = None,
    metric: str = "ap",
    drop: float = 0.2,
) -> pa.Table:
    """Every class, dense and pruned, and when it is forgotten.

    Args:
        measurement: of `measure`.
        level: the place in `sparsities` of the level analysed; None: of the highest.
        metric: whose curve tells `first_drop` and `extreme_drop`.
        drop: the loss that counts, in (0, 1): .2 as published.

    Returns:
        Columns class, n (positive samples), n_train, ap, auroc, recall (dense, median over models),
        ap_pruned, auroc_pruned, recall_pruned (at the level), first_drop (the lowest level with
        F < -drop, null if there is none), extreme_drop (F of the highest level).

    Raises:
        FastpieError: for an unknown metric or level.
    """
    if not 0 < drop < 1:
        raise FastpieError(f"Expected `drop` in (0, 1), but got {drop}.")
    count = len(measurement.sparsities)
    level = count - 1 if level is None else level
    if not 0 <= level < count:
        raise FastpieError(f"Expected `level` in [0, {count}), but got {level}.")
    median = {name: np.median(measurement.models.of(name), axis=0) for name in METRICS}
    first, extreme = _drops(measurement, metric, drop)
    trained = measurement.train_counts
    n_train = [None] * len(measurement.class_names) if trained is None else trained
    return _table(
        {
            "class": np.array(measurement.class_names),
            "n": pa.array(measurement.positives, pa.int64()),
            "n_train": pa.array(n_train, pa.int64()),
            **{name: median[name][0] for name in METRICS},
            **{f"{name}_pruned": median[name][1 + level] for name in METRICS},
            "first_drop": first,
            "extreme_drop": extreme,
        }
    )


def links(
    measurement: Measurement, *, metric: str = "ap", drop: float = 0.2, seed: int = 0
) -> pa.Table:
    """Are rare classes forgotten first, and most?

    Correlations over the classes of the logarithm of their frequency with `first_drop` and with
    `extreme_drop` (`class_changes`). p: permutations of the classes, two-sided; intervals:
    resamples of the classes (`correlation`), which hold the true value in about 90 instead of 95 of
    100 sets if classes are forgotten alike in groups. A class that never drops has no `first_drop` and
    takes no part in its link (the published code cannot go on there).

    Note that average precision falls further for a rare class when separation falls equally, as
    chance is the prevalence; `metric="auroc"` is free of that.

    Args:
        measurement: of `measure`.
        metric: whose curves, of `METRICS`.
        drop: see `class_changes`.
        seed: of permutations and resamples.

    Returns:
        Columns x ("ln_n_train", or "ln_n" of the labels here where `train_counts` is None), y, method,
        value, low, high, p, n (classes). Null with fewer than 4 classes or without variance.
    """
    trained = measurement.train_counts
    counts = np.asarray(measurement.positives if trained is None else trained, np.float64)
    with np.errstate(divide="ignore"):
        x = np.log(counts)
    rows = []
    for y, values in zip(
        ("first_drop", "extreme_drop"), _drops(measurement, metric, drop), strict=True
    ):
        for method in METHODS:
            estimate = correlation(x, values, method, seed=seed)
            rows.append(("ln_n" if trained is None else "ln_n_train", y, method, estimate))
    return link_rows(rows)


def changes(values: np.ndarray) -> np.ndarray:
    """Relative to the dense model: [R, L + 1, ...] like `values`, 0 at place 0."""
    dense = values[:, :1]
    # The published 1e-12 keeps a division by zero away; a metric of 0 that stays 0 has not changed.
    relative: np.ndarray = (values - dense) / (dense + 1e-12)
    return relative


def link_rows(rows: Iterable[tuple[str, str, str, Estimate]]) -> pa.Table:
    """The table `links`, of (x, y, method, estimate)."""
    x, y, method, estimates = zip(*rows, strict=True)
    return _table(
        {
            "x": np.array(x),
            "y": np.array(y),
            "method": np.array(method),
            **{
                name: np.array([getattr(e, name) for e in estimates])
                for name in ("value", "low", "high", "p")
            },
            "n": np.array([e.n for e in estimates]),
        }
    )


def _drops(measurement: Measurement, metric: str, drop: float) -> tuple[np.ndarray, np.ndarray]:
    """`first_drop` and `extreme_drop`, fp64 [C], NaN where there is none."""
    median = np.median(changes(measurement.models.of(metric)), axis=0)[1:]  # [L, C]
    forgotten = median < -drop
    first = np.array(measurement.sparsities)[forgotten.argmax(axis=0)]
    return np.where(forgotten.any(axis=0), first, np.nan), median[-1]


def _drop_of_one(values: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """P-values [L] of "the level is not lower than dense", of one model's [L + 1] and [R, L + 1]."""
    change = values[1:] - values[0]
    error = (resamples[:, 1:] - resamples[:, :1]).std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where((change == 0) & (error == 0), np.inf, change / error)
    p: np.ndarray = load_extra("scipy.special", "analysis", "tests").ndtr(z)
    return p


def _table(columns: dict[str, np.ndarray | pa.Array]) -> pa.Table:
    return pa.table(
        {
            name: values
            if isinstance(values, pa.Array)
            # NaN becomes null.
            else pa.array(values.tolist() if values.dtype.kind == "U" else values, from_pandas=True)
            for name, values in columns.items()
        }
    )
