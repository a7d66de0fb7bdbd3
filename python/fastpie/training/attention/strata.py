"""Ranks, and the top of a ranking, within strata."""

from __future__ import annotations

import numpy as np

__all__ = ["codes_of", "rank01", "rarest_positive", "top"]


def rank01(
    values: np.ndarray,  # [N]
    strata: np.ndarray | None = None,  # integers [N]
) -> np.ndarray:  # fp64 [N]
    """The place of each value among those of its stratum, from 0 (lowest) to 1 (highest).

    Equal values have the mean of their places; one that is alone in its stratum is at 0.5; NaN takes
    no part and stays NaN.
    """
    ranks = np.full(len(values), np.nan)
    rows = np.flatnonzero(~np.isnan(values))
    if not len(rows):
        return ranks
    group = np.zeros(len(rows), np.int64) if strata is None else strata[rows]
    order = np.lexsort((values[rows], group))
    rows, group = rows[order], group[order]
    value = values[rows]
    new_group = np.r_[True, group[1:] != group[:-1]]
    new_value = np.r_[True, (value[1:] != value[:-1]) | new_group[1:]]
    start, size = _runs(new_group)
    first, ties = _runs(new_value)
    place = first + (ties - 1) / 2 - start
    ranks[rows] = np.where(size > 1, place / np.maximum(size - 1, 1), 0.5)
    return ranks


def top(
    values: np.ndarray,  # [N]
    fraction: float,
    strata: np.ndarray | None = None,  # integers [N]
    *,
    at_least: int = 0,
) -> np.ndarray:  # bool [N]
    """The `int(fraction * n)` highest of the n values of each stratum; of equal ones the first.

    NaN takes no part.

    Args:
        values: to choose by.
        fraction: in [0, 1].
        strata: None for one.
        at_least: how many of each stratum that has so many.
    """
    chosen = np.zeros(len(values), bool)
    rows = np.flatnonzero(~np.isnan(values))
    if not len(rows):
        return chosen
    group = np.zeros(len(rows), np.int64) if strata is None else strata[rows]
    order = np.lexsort((-values[rows], group))  # stable
    rows, group = rows[order], group[order]
    start, size = _runs(np.r_[True, group[1:] != group[:-1]])
    # .2 * 15 is 3, but for rounding.
    count = np.maximum(np.floor(fraction * size + 1e-9), at_least)
    chosen[rows] = np.arange(len(rows)) - start < count
    return chosen


def codes_of(values: object, count: int) -> np.ndarray | None:  # int64 [N]
    """Numbers of the different values of a sequence (None and NaN are values); None if it is no such.

    Args:
        values: a sequence, array or Arrow column of `count` values.
        count: N.
    """
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        return None
    if len(values) != count:
        return None
    listed = values.tolist() if hasattr(values, "tolist") else list(values)  # type: ignore[call-overload]
    texts = [str(v.as_py() if hasattr(v, "as_py") else v) for v in listed]
    codes: np.ndarray = np.unique(np.asarray(texts), return_inverse=True)[1]
    return codes.reshape(-1).astype(np.int64)


def rarest_positive(labels: np.ndarray) -> np.ndarray:  # [N, C] of 1, 0, NaN -> int64 [N]
    """Of each sample's positive classes the one with the fewest; -1 without a positive one."""
    positive = labels == 1
    frequency = np.where(positive, positive.sum(0), np.iinfo(np.int64).max)
    if not labels.size:
        return np.full(len(labels), -1)
    return np.where(positive.any(1), frequency.argmin(1), -1)


def _runs(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # bool [n] -> int64 [n] each
    """Where the run that each place lies in starts, and how long it is."""
    starts = np.flatnonzero(new)
    run = np.cumsum(new) - 1
    return starts[run], np.diff(np.r_[starts, len(new)])[run]
