"""Spearman's rank correlation of many short rows, from exact integers, and pandas' own of the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["RankSums", "as_pandas", "rank_sums", "spearman"]

_CHUNK = 1 << 21  # elements at a time: temporaries of some tens of MiB


@dataclass(frozen=True)
class RankSums:
    """What the rank correlation of N rows is made of; every number an exact integer.

    Ranks are average ranks, doubled and centred: (#less + #not greater) - C.

    Attributes:
        count: int64 [N], elements of the row that are numbers in both.
        covariance: int64 [N], sum of the products of the ranks.
        first: int64 [N], sum of the squared ranks of the first rows; 0 where a row is constant.
        second: int64 [N], of the second rows.
    """

    count: np.ndarray
    covariance: np.ndarray
    first: np.ndarray
    second: np.ndarray


def rank_sums(
    first: np.ndarray,  # [N, C]
    second: np.ndarray,  # [N, C]
) -> RankSums:
    """Of finite numbers; elements that are NaN in either row are left out of both."""
    sums = np.zeros((4, len(first)), np.int64)
    step = max(1, _CHUNK // max(1, first.shape[1]))
    for begin in range(0, len(first), step):
        rows = slice(begin, begin + step)
        known = ~(np.isnan(first[rows]) | np.isnan(second[rows]))
        a, b = _ranks(first[rows], known), _ranks(second[rows], known)
        sums[0, rows] = known.sum(1)
        for place, (x, y) in enumerate(((a, b), (a, a), (b, b)), 1):
            sums[place, rows] = np.einsum("nc,nc->n", x, y)
    return RankSums(*sums)


def _ranks(values: np.ndarray, known: np.ndarray) -> np.ndarray:  # [n, C] -> int64 [n, C]
    if not known.all():
        values = np.where(known, values, np.inf)  # behind all others, which do not count them then
    order = values.argsort(axis=1)  # in what order equal ones come does not matter
    ordered = np.take_along_axis(values, order, 1)
    begins = np.ones(values.shape, bool)  # of a run of equal values; none goes beyond its row
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.flatnonzero(begins)
    length = np.diff(first, append=values.size)
    doubled = 2 * (first % values.shape[1]) + length  # #less + #not greater
    ranks = np.empty(values.shape, np.int64)
    np.put_along_axis(ranks, order, np.repeat(doubled, length).reshape(values.shape), 1)
    ranks -= known.sum(1, keepdims=True)
    ranks[~known] = 0
    return ranks


def spearman(sums: RankSums) -> np.ndarray:  # fp64 [N]
    """Spearman's rho; NaN for a constant row.

    Equal correlations come out as equal numbers, whatever the ranks behind them: the square of rho
    is one correctly rounded division of integers. (Up to 657 elements a row; beyond, these integers
    pass 2^53, and equal ones from different ranks can differ in the last bit.)
    """
    covariance = sums.covariance.astype(np.float64)
    product = sums.first.astype(np.float64) * sums.second.astype(np.float64)
    with np.errstate(invalid="ignore"):
        square = covariance * covariance / product  # 0 / 0 where a row is constant
    rho: np.ndarray = np.sign(covariance) * np.sqrt(square)
    return rho


def as_pandas(sums: RankSums) -> np.ndarray:  # fp64 [N]
    """The same, with the rounding of pandas' `corrwith(axis=1, method="spearman")`, bit for bit.

    pandas (2 and 3) hands each pair of rows to `scipy.stats.spearmanr`, and that the ranks to
    `numpy.corrcoef`. The sums there are exact (multiples of 1/4), so only the steps after them
    round: times 1 / (n - 1), divided by one standard deviation, then by the other, clipped.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1.0 / (sums.count - 1)
        covariance = sums.covariance / 4.0 * share
        of_first, of_second = (np.sqrt(s / 4.0 * share) for s in (sums.first, sums.second))
        rho = np.clip(covariance / of_second / of_first, -1.0, 1.0)
    rho[(sums.count < 2) | (sums.first == 0) | (sums.second == 0)] = np.nan
    result: np.ndarray = rho
    return result
