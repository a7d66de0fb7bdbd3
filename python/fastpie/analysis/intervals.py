"""Intervals, permutation tests and corrections that the analyses share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastpie._extras import load_extra
from fastpie.errors import FastpieError

__all__ = [
    "METHODS",
    "Estimate",
    "correlation",
    "median_interval",
    "paired_drop",
    "q_values",
    "resampled_interval",
    "t_interval",
]

METHODS = ("pearson", "spearman")

LEVEL = 0.95
"""Of every interval."""
_BUDGET = 20_000_000  # numbers that all resamples (or permutations) of one quantity may touch
_BLOCK = 2_000_000  # numbers in hand at once


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval and its p-value; NaN what cannot be told.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
        p: two-sided, by permutation.
        n: observations behind it.
    """

    value: float
    low: float
    high: float
    p: float
    n: int


def median_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the median of a population, from independent draws along the first axis.

    Between order statistics, interpolated so that the coverage is near nominal whatever the
    distribution (T. P. Hettmansperger and S. J. Sheather, "Confidence intervals based on
    interpolated order statistics", Statistics & Probability Letters 4, 1986). The percentile
    bootstrap of a median picks the same order statistics without the interpolation, at random.
    With fewer than 6 draws no such interval reaches 95 %: it is then their range, which covers the
    median with probability 1 - 2^(1 - n) (2 draws 50 %, 3 75 %, 4 88 %, 5 94 %).

    Args:
        values: [n, ...]; a NaN among the draws gives NaN.

    Returns:
        Low and high, [...]; NaN for n < 2.
    """
    count = len(values)
    if count < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing.copy()
    binomial = load_extra("scipy.stats", "analysis", "intervals").binom(count, 0.5)
    # Between the k-th smallest and the k-th largest lies the median with 1 - 2 P(B <= k - 1).
    covers = 1 - 2 * binomial.cdf(np.arange(-1, count // 2))
    k = max(1, int((covers[1:] >= LEVEL).sum()))
    ordered = np.sort(values, axis=0)
    low, high = ordered[k - 1], ordered[count - k]
    if covers[k] > LEVEL and k < (count + 1) // 2:
        inner = 1 - 2 * binomial.cdf(k)
        part = (covers[k] - LEVEL) / (covers[k] - inner)
        step = (count - k) * part / (k + (count - 2 * k) * part)
        low = low + step * (ordered[k] - low)
        high = high - step * (high - ordered[count - k - 1])
    missing = np.isnan(values).any(axis=0)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def resampled_interval(
    value: np.ndarray,
    resamples: np.ndarray,  # [R, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a value from its bootstrap standard error: value +- 1.96 errors.

    Not the percentiles: resampling with weights moves average precision up when positives are few,
    and the percentiles with it; the standard error does not see a shift.
    """
    error = resamples.std(axis=0, ddof=1)
    reach = load_extra("scipy.special", "analysis", "intervals").ndtri((1 + LEVEL) / 2) * error
    return value - reach, value + reach


def t_interval(value: float, error: float, freedom: int) -> tuple[float, float]:
    """95 % interval by Student's t; NaN without a degree of freedom."""
    if freedom < 1:
        return np.nan, np.nan
    quantile = load_extra("scipy.special", "analysis", "intervals").stdtrit
    reach = float(quantile(freedom, (1 + LEVEL) / 2)) * error
    return value - reach, value + reach


def paired_drop(dense: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """P-values of "pruned is not lower than dense", paired by model.

    Student's t on the differences, one-sided. Differences of means over many classes and samples
    are close to normal, so the test keeps its level, and from 3 models on it can find something;
    Wilcoxon's signed ranks cannot reach 5 % with fewer than 5 models, nor survive the correction for
    20 levels with fewer than 9.

    Args:
        dense: [S], S >= 2.
        pruned: [S, L].

    Returns:
        [L]; 1 where no model changes, 0 where all lose exactly the same, NaN where a value is NaN.
    """
    special = load_extra("scipy.special", "analysis", "tests")
    change = pruned - dense[:, None]
    mean, spread = change.mean(0), change.std(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / (spread / np.sqrt(len(change)))
    t = np.where((mean == 0) & (spread == 0), np.inf, t)
    p: np.ndarray = special.stdtr(len(change) - 1, t)
    return p


def q_values(p: np.ndarray) -> np.ndarray:
    """P-values after Benjamini-Hochberg (1995); NaN take no part and stay NaN."""
    known = ~np.isnan(p)
    q = np.full(p.shape, np.nan)
    if known.any():
        control = load_extra("scipy.stats", "analysis", "the correction for many tests")
        q[known] = control.false_discovery_control(p[known])
    return q


def correlation(x: np.ndarray, y: np.ndarray, method: str, *, seed: int = 0) -> Estimate:
    """Correlation over classes, with interval and permutation p.

    The interval is `tanh(atanh(r) +- t * error)`: the error is that of Fisher's z over resamples of
    the classes, t Student's with n - 2 degrees of freedom. The percentiles of the resamples are too
    narrow for 20 classes: docs/design/analysis.md has the coverages.

    Args:
        x: [n]; an observation with a NaN or an infinite value takes no part.
        y: [n].
        method: "pearson" or "spearman" (average ranks).
        seed: of resamples and permutations.

    Returns:
        NaN with fewer than 4 observations, or where one side is constant.

    Raises:
        FastpieError: for another method.
    """
    if method not in METHODS:
        raise FastpieError(f"Expected `method` to be one of {METHODS}, but got {method!r}.")
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    n = len(x)
    if n < 4 or x.min() == x.max() or y.min() == y.max():
        return Estimate(np.nan, np.nan, np.nan, np.nan, n)
    generator = np.random.default_rng(seed)
    value = float(weighted_correlation(x, y, np.ones((1, n)), method)[0])
    parts = [
        weighted_correlation(x, y, resampled_weights(generator, rows, n), method)
        for rows in blocks(n, 1999)
    ]
    low, high = fisher_interval(value, np.concatenate(parts), n - 2)
    if method == "spearman":
        ranks = load_extra("scipy.stats", "analysis", "ranks").rankdata
        x, y = ranks(x), ranks(y)
    x, y = x - x.mean(), y - y.mean()
    products = np.concatenate([y[permutations(generator, rows, n)] @ x for rows in blocks(n, 9999)])
    return Estimate(value, low, high, permutation_p(x @ y, products), n)


def permutation_p(value: float, permuted: np.ndarray) -> float:
    """Two-sided: how many permutations, the one observed among them, go as far from 0."""
    # Equal but for the order of the sum is as far.
    as_far = np.abs(permuted) >= abs(value) * (1 - 1e-9)
    return float((1 + as_far.sum()) / (1 + len(permuted)))


def blocks(size: int, most: int) -> Iterator[int]:
    """How many repeats of `size` numbers to do at a time: `most` altogether if that is affordable."""
    left = max(min(most, _BUDGET // max(size, 1)), 199)
    while left:
        rows = min(left, max(1, _BLOCK // max(size, 1)))
        yield rows
        left -= rows


def spread(resamples: np.ndarray) -> np.ndarray:
    """Standard error along the first axis: half the way from the 15.87th to the 84.13th percentile.

    That of a normal distribution; a few resamples of few distinct classes do not blow it up.
    """
    low, high = np.quantile(resamples, [0.1587, 0.8413], axis=0)
    error: np.ndarray = (high - low) / 2
    return error


def permutations(generator: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """Int [rows, n], each a permutation."""
    orders: np.ndarray = generator.permuted(np.tile(np.arange(n), (rows, 1)), axis=1)
    return orders


def resampled_weights(generator: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """How often each of n classes is drawn in a resample with replacement: fp64 [rows, n]."""
    weights: np.ndarray = generator.multinomial(n, np.full(n, 1 / n), size=rows).astype(np.float64)
    return weights


def weighted_correlation(
    x: np.ndarray,  # [n]
    y: np.ndarray,  # [n]
    weights: np.ndarray,  # [R, n]
    method: str,
) -> np.ndarray:  # [R]; NaN where a side is constant
    """Correlation of observations that count as often as their weights say."""
    if method == "spearman":
        of_x, of_y = _weighted_ranks(x, weights), _weighted_ranks(y, weights)
    else:
        of_x, of_y = np.broadcast_to(x, weights.shape), np.broadcast_to(y, weights.shape)
    total = weights.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_x = of_x - (weights * of_x).sum(1, keepdims=True) / total
        of_y = of_y - (weights * of_y).sum(1, keepdims=True) / total
        both, left, right = (
            (weights * a * b).sum(1) for a, b in ((of_x, of_y), (of_x, of_x), (of_y, of_y))
        )
        # A side that is constant but for rounding tells nothing.
        told = (left > 1e-18 * total[:, 0]) & (right > 1e-18 * total[:, 0])
        result = np.where(told, both / np.sqrt(left * right), np.nan)
    clipped: np.ndarray = np.clip(result, -1, 1)
    return clipped


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average ranks, but for a constant: what is below, and half of what is equal."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: np.ndarray = (np.cumsum(mass, axis=1) - mass / 2)[:, group]
    return ranks


def fisher_interval(value: float, resamples: np.ndarray, freedom: int) -> tuple[float, float]:
    """Interval of a correlation from its resamples, by Fisher's z and Student's t."""
    z = np.arctanh(np.clip(resamples[~np.isnan(resamples)], -1 + 1e-12, 1 - 1e-12))
    if len(z) < 2:
        return np.nan, np.nan
    center = float(np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)))
    low, high = t_interval(center, float(spread(z)), freedom)
    return float(np.tanh(low)), float(np.tanh(high))
