"""Ranks and tops within strata, against SciPy and loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import rankdata

from fastpie.training.attention.strata import codes_of, rank01, rarest_positive, top

RANDOM = np.random.default_rng()


@pytest.mark.parametrize("count", [0, 1, 2, 50, 501])
@pytest.mark.parametrize("groups", [1, 4])
def test_ranks_are_those_of_scipy_in_each_stratum(count: int, groups: int) -> None:
    values = RANDOM.integers(0, 20, count).astype(float)  # many ties
    values[RANDOM.random(count) < 0.1] = np.nan
    strata = RANDOM.integers(-1, groups - 1, count) if groups > 1 else None
    found = rank01(values, strata)
    expected = np.full(count, np.nan)
    for group in range(-1, groups):
        here = ~np.isnan(values) & (True if strata is None else strata == group)
        n = int(here.sum())
        if n:
            expected[here] = (rankdata(values[here]) - 1) / (n - 1) if n > 1 else 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_infinite_values_are_ranked() -> None:
    assert rank01(np.array([np.inf, 0, -np.inf])).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize("at_least", [0, 1])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_the_top_of_each_stratum_is_that_of_a_stable_sort(fraction: float, at_least: int) -> None:
    values = RANDOM.integers(0, 9, 203).astype(float)
    values[RANDOM.random(203) < 0.1] = np.nan
    strata = RANDOM.integers(0, 30, 203)
    found = top(values, fraction, strata, at_least=at_least)
    for group in range(30):
        rows = [r for r in range(203) if strata[r] == group and not np.isnan(values[r])]
        count = max(int(fraction * len(rows) + 1e-9), at_least)
        hardest = sorted(rows, key=lambda r: -values[r])[:count]
        assert set(np.flatnonzero(found & (strata == group))) == set(hardest)
    assert top(np.array([]), 0.5).shape == (0,)


def test_a_fraction_is_not_rounded_down_by_its_bits() -> None:
    assert top(np.arange(10.0), 0.3).sum() == 3  # .3 * 10 is 3, .29 * 100 28.999...
    assert top(np.arange(100.0), 0.29).sum() == 29


def test_values_become_numbers() -> None:
    given = ["b", None, "a", "b", float("nan")]
    for values in (given, np.array(given, object), pa.array(["b", None, "a", "b", "nan"])):
        codes = codes_of(values, 5)
        assert codes is not None
        assert codes[0] == codes[3]
        assert len(set(codes.tolist())) == 4
    assert codes_of(pd.Series([3, 1, 3]), 3).tolist() == [1, 0, 1]
    assert codes_of([1, 2], 3) is None
    assert codes_of("ab", 2) is None


def test_rarest_positive_class() -> None:
    labels = (RANDOM.random((40, 5)) < [0.9, 0.5, 0.2, 0.1, 0]).astype(np.float32)
    labels[RANDOM.random((40, 5)) < 0.1] = np.nan
    count = [int((labels[:, c] == 1).sum()) for c in range(5)]
    for row, found in zip(labels, rarest_positive(labels), strict=True):
        positive = [c for c in range(5) if row[c] == 1]
        assert found == (min(positive, key=lambda c: count[c]) if positive else -1)
    assert rarest_positive(np.empty((0, 3))).shape == (0,)
