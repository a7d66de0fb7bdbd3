"""Which classes pruning harms, and which are frequent among the exemplars."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fastpie._extras import load_extra
from fastpie.analysis.predictions import Predictions
from fastpie.analysis.significance import benjamini_hochberg, column
from fastpie.errors import FastpieError

__all__ = ["class_impact", "class_ratios", "count_ratios", "label_counts"]

_MOST_LABELS = 4  # and more: the bins of PruneCXR
_NO_LABELS = ("No Finding",)  # as PruneCXR has it
_CONFIDENCE = 0.95


def class_impact(
    predictions: Predictions, sparsity: float | None = None, *, threshold: float = 0.5
) -> pa.Table:
    """Whether pruning changes a class's recall more than that of all classes together.

    Hooker et al. (arXiv 1911.05248): for each class Welch's t-test between `recall - accuracy` of the
    dense models and `recall - accuracy` of the pruned ones, one value a model. (Their code subtracts
    the mean accuracy over the models, here each model's own: the difference is the same, and the test
    also knows that the accuracy varies.) The test takes the two groups for independent, as published,
    although model s of one is model s of the other: of models that keep their ranking it is cautious.

    Multiclass: recall is the share of a class's samples for which it has the highest probability,
    accuracy that over all samples. Multilabel: recall is the share of the positives with
    `p > threshold`, and accuracy the same over the positives of all classes together, which is what
    accuracy is where each sample has one class. (The share of correct entries would not do: most are
    negatives, and models that say less and less score high.) Unknown labels are left out; so are
    samples with a NaN, in the model that has it.

    Args:
        predictions: with labels.
        sparsity: the level; by default the highest.
        threshold: on the probabilities, in multilabel.

    Returns:
        One row a class: `class`, `impact` (normalised recall of the pruned models minus that of the
        dense ones, means over the models: below 0 where pruning harms the class more than the rest),
        `impact_low`, `impact_high` (95 %), `impact_p`, `impact_q` (Benjamini-Hochberg over the
        classes). Null: a class without positives; a test with fewer than two models or where no
        model differs from another.

    Raises:
        FastpieError: without labels, or for a level that is not there.
    """
    level = predictions.level(sparsity)
    positives = predictions.positives()
    dense = _normalised_recall(predictions.probabilities(), positives, predictions.task, threshold)
    pruned = _normalised_recall(
        predictions.probabilities(level), positives, predictions.task, threshold
    )
    impact, low, high, p = _welch(pruned, dense)
    return pa.table(
        {
            "class": pa.array(predictions.class_names, pa.string()),
            "impact": column(impact),
            "impact_low": column(low),
            "impact_high": column(high),
            "impact_p": column(p),
            "impact_q": column(benjamini_hochberg(p)),
        }
    )


def _normalised_recall(
    probabilities: np.ndarray,  # [S, N, C]
    positives: np.ndarray,  # [N, C] of 1, 0, NaN
    task: str,
    threshold: float,
) -> np.ndarray:  # fp64 [S, C], NaN where there are no positives
    positive = positives == 1
    result = np.full((len(probabilities), positive.shape[1]), np.nan)
    for model, values in enumerate(probabilities):
        counted = positive & ~np.isnan(values).any(1, keepdims=True)
        if task == "multiclass":
            found = counted & (values.argmax(1)[:, None] == np.arange(values.shape[1]))
        else:
            found = counted & (values > threshold)
        hits, total = found.sum(0), counted.sum(0)
        if total.any():
            recall = np.divide(hits, total, out=np.full(len(total), np.nan), where=total > 0)
            result[model] = recall - hits.sum() / total.sum()
    return result


def _welch(
    first: np.ndarray,  # [S, C]
    second: np.ndarray,  # [S, C]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Difference of the means, its interval and two-sided p-value, of each column (Welch, 1947).

    From the moments, because `scipy.stats.ttest_ind` warns where a group does not vary, which a class
    that all models miss does not.
    """
    stats = load_extra("scipy.stats", "analysis", "Welch's test")
    counts = [len(x) for x in (first, second)]
    difference = first.mean(0) - second.mean(0)
    unknown = np.full(len(difference), np.nan)
    if min(counts) < 2:
        return difference, unknown, unknown, unknown
    squares = [x.var(0, ddof=1) / n for x, n in zip((first, second), counts, strict=True)]
    total = squares[0] + squares[1]
    # Equal recalls minus equal accuracies can differ in the last bits.
    total = np.where(total > (8 * np.finfo(np.float64).eps) ** 2, total, np.nan)
    error = np.sqrt(total)
    freedom = total**2 / sum(v**2 / (n - 1) for v, n in zip(squares, counts, strict=True))
    half = stats.t.ppf((1 + _CONFIDENCE) / 2, freedom) * error
    p = 2 * stats.t.sf(np.abs(difference) / error, freedom)
    return difference, difference - half, difference + half, p


def class_ratios(
    labels: Any,  # [N, C] of 1, 0, NaN
    pie: Any,  # bool [N]
    class_names: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pa.Table:
    """How much more frequent each class is among the exemplars (PruneCXR, arXiv 2308.09180).

    `R_c = mean of y_c over the PIEs / mean of y_c over the others`, over the samples for which y_c is
    known.

    The intervals are percentiles of a bootstrap over samples, PIEs and others each from among
    themselves: a definition fixes how many PIEs there are, so their number is no part of what would
    vary. Of one class such a resample is a binomial count, and is drawn as one. No interval is given
    where a bootstrap knows none: the class has no positive or no negative in one of the groups, or
    too few for 2.5 % of the resamples to leave the others without a positive.

    Args:
        labels: one column a class (`Predictions.positives()`).
        pie: which samples are PIEs.
        class_names: C names.
        resamples: of the bootstrap.
        seed: equal seeds give equal intervals.

    Returns:
        One row a class: `class`, `pie_ratio`, `pie_ratio_low`, `pie_ratio_high` (95 %). Null where a
        group has no known label or the others no positive.

    Raises:
        FastpieError: for shapes that do not fit.
    """
    values, chosen = _labels(labels, pie, class_names)
    known, positive = ~np.isnan(values), values == 1
    ratio, low, high = _ratios(
        positive[chosen].sum(0),
        known[chosen].sum(0),
        positive[~chosen].sum(0),
        known[~chosen].sum(0),
        resamples,
        seed,
    )
    return pa.table(
        {
            "class": pa.array(list(class_names), pa.string()),
            "pie_ratio": column(ratio),
            "pie_ratio_low": column(low),
            "pie_ratio_high": column(high),
        }
    )


def count_ratios(
    labels: Any,  # [N, C] of 1, 0, NaN
    pie: Any,  # bool [N]
    class_names: Sequence[str],
    *,
    leave_out: Collection[str] = _NO_LABELS,
    resamples: int = 2000,
    seed: int = 0,
) -> pa.Table:
    """How much more frequent samples with 0, 1, 2, 3, 4 or more labels are among the exemplars.

    PruneCXR's count of diseases: the share of the PIEs with k labels over that of the others. An
    unknown label does not count as one; samples without any known label are left out. The intervals
    are those of `class_ratios`.

    Args:
        labels: as of `class_ratios`; likewise the others.
        pie: which samples are PIEs.
        class_names: C names.
        leave_out: names that are no label to be counted; those that no class has do not matter.
        resamples: of the bootstrap.
        seed: equal seeds give equal intervals.

    Returns:
        Five rows: `labels` ("0" ... "4+"), `n` and `n_pie` (samples, and PIEs among them),
        `pie_ratio`, `low`, `high` (95 %; null as in `class_ratios`).

    Raises:
        FastpieError: for shapes that do not fit.
    """
    values, chosen = _labels(labels, pie, class_names)
    counts, bins = label_counts(values, class_names, leave_out)
    told = counts >= 0
    of_pie = np.bincount(counts[told & chosen], minlength=len(bins))
    of_others = np.bincount(counts[told & ~chosen], minlength=len(bins))
    ratio, low, high = _ratios(
        of_pie,
        np.full(len(bins), of_pie.sum()),
        of_others,
        np.full(len(bins), of_others.sum()),
        resamples,
        seed,
    )
    return pa.table(
        {
            "labels": pa.array(bins, pa.string()),
            "n": pa.array(of_pie + of_others, pa.int64()),
            "n_pie": pa.array(of_pie, pa.int64()),
            "pie_ratio": column(ratio),
            "low": column(low),
            "high": column(high),
        }
    )


def label_counts(
    labels: np.ndarray,  # [N, C] of 1, 0, NaN
    class_names: Sequence[str],
    leave_out: Collection[str] = _NO_LABELS,
) -> tuple[np.ndarray, list[str]]:
    """Which bin each sample is in by its number of labels, int64 [N], -1 where none is known."""
    values = labels[:, [name not in leave_out for name in class_names]]
    count = np.minimum((values == 1).sum(1), _MOST_LABELS)
    count[np.isnan(values).all(1)] = -1
    return count, [*map(str, range(_MOST_LABELS)), f"{_MOST_LABELS}+"]


def _labels(labels: Any, pie: Any, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    values, chosen = np.asarray(labels), np.asarray(pie)
    if values.ndim != 2 or values.shape[1] != len(class_names):
        raise FastpieError(
            f"Expected `labels` of shape [N, {len(class_names)}] (one column a class), but got "
            f"{list(values.shape)}."
        )
    if chosen.dtype != np.bool_ or chosen.shape != values.shape[:1]:
        raise FastpieError(
            f"Expected `pie` of shape [{len(values)}] and type bool, but got {list(chosen.shape)} "
            f"{chosen.dtype}."
        )
    return values.astype(np.float32, copy=False), chosen


def _ratios(
    hits: np.ndarray,  # int [n], of the PIEs
    total: np.ndarray,  # int [n]
    other_hits: np.ndarray,  # int [n], of the others
    other_total: np.ndarray,  # int [n]
    resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratios of two shares with the percentiles of their stratified bootstrap."""
    if resamples < 1:
        raise FastpieError(f"Expected `resamples` of at least 1, but got {resamples}.")
    generator = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        share, other = hits / total, other_hits / other_total
        ratio = share / other
        drawn = [
            generator.binomial(n, np.nan_to_num(p), (resamples, len(n))) / n
            for n, p in ((total, share), (other_total, other))
        ]
        quotients = drawn[0] / drawn[1]  # inf, or NaN for 0 / 0
    quotients[np.isnan(quotients)] = np.inf
    tail = (1 - _CONFIDENCE) / 2
    # Values that occur, not between two of them: next to infinity there is no between.
    low, high = np.quantile(quotients, [tail, 1 - tail], axis=0, method="inverted_cdf")
    blind = (hits == 0) | (hits == total) | (other_hits == 0) | (other_hits == other_total)
    low[blind] = high[blind] = np.nan
    return ratio, low, high
