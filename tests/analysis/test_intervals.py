"""Intervals and tests against SciPy, and against their own promises over many generated sets."""

import itertools

import numpy as np
import pytest
from scipy import stats

from fastpie import FastpieError
from fastpie.analysis import intervals
from fastpie.analysis.intervals import (
    correlation,
    median_interval,
    paired_drop,
    q_values,
    resampled_interval,
    weighted_correlation,
)


def band(rate, repeats):
    """Counts that a rate gives with probability .9999."""
    return stats.binom.interval(0.9999, repeats, rate)


@pytest.mark.parametrize("count", [6, 7, 12, 30])
@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential", "standard_cauchy"])
def test_median_interval_covers(count, draw):
    repeats = 4000
    values = getattr(np.random.default_rng(0), draw)((count, repeats))
    median = np.log(2) if draw == "standard_exponential" else 0
    low, high = median_interval(values)
    held = ((low <= median) & (median <= high)).mean()
    assert 0.935 < held < 0.965  # Hettmansperger and Sheather: within a percent; and the noise


@pytest.mark.parametrize("count", [2, 3, 5])
def test_median_interval_of_few_is_their_range(count):
    values = np.random.default_rng(0).normal(size=(count, 4, 3))
    low, high = median_interval(values)
    np.testing.assert_array_equal(low, values.min(0))
    np.testing.assert_array_equal(high, values.max(0))


def test_median_interval_interpolates_as_published():
    # n = 10: (2nd, 9th) holds .9785, (3rd, 8th) .8906; the weight by hand from the paper's formula.
    low, high = median_interval(np.arange(1.0, 11)[:, None])
    part = (0.978515625 - 0.95) / (0.978515625 - 0.890625)
    step = 8 * part / (2 + 6 * part)
    assert low[0] == pytest.approx(2 + step)
    assert high[0] == pytest.approx(9 - step)


def test_median_interval_of_one_or_of_nan_is_unknown():
    assert np.isnan(median_interval(np.ones((1, 2)))).all()
    values = np.random.default_rng(0).normal(size=(8, 2))
    values[3, 1] = np.nan
    assert np.isnan(median_interval(values)).tolist() == [[False, True], [False, True]]


def test_resampled_interval():
    resamples = np.random.default_rng(0).normal(5, 2, (500, 3))
    low, high = resampled_interval(np.array([1.0, 2, 3]), resamples)
    np.testing.assert_allclose((low + high) / 2, [1, 2, 3])
    reach = stats.norm.ppf(0.975) * resamples.std(0, ddof=1)
    np.testing.assert_allclose((high - low) / 2, reach)


@pytest.mark.parametrize("models", [2, 3, 9])
def test_paired_drop_is_scipys_t_test(models):
    rng = np.random.default_rng(0)
    dense = rng.random(models)
    pruned = dense[:, None] - rng.normal(0.01, 0.02, (models, 4))
    wanted = [stats.ttest_rel(p, dense, alternative="less").pvalue for p in pruned.T]
    np.testing.assert_allclose(paired_drop(dense, pruned), wanted, rtol=1e-9)


def test_paired_drop_where_nothing_varies():
    dense = np.array([0.5, 0.25])
    pruned = np.stack([dense, dense - 0.125, dense + 0.125, [np.nan, 0]], axis=1)
    np.testing.assert_array_equal(paired_drop(dense, pruned), [1, 0, 1, np.nan])


def test_q_values_are_scipys_without_what_is_unknown():
    p = np.array([0.04, np.nan, 0.01, 0.5])
    wanted = stats.false_discovery_control([0.04, 0.01, 0.5])
    np.testing.assert_array_equal(q_values(p)[[0, 2, 3]], wanted)
    assert np.isnan(q_values(p)[1])
    assert np.isnan(q_values(np.full(2, np.nan))).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_weights_are_repetitions(method, ties):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 15))
    if ties:
        x, y = x.round(), y.round()
    weights = rng.integers(0, 4, (6, 15)).astype(float)
    weights[0] = 1
    scipys = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[method]
    wanted = [scipys(np.repeat(x, w.astype(int)), np.repeat(y, w.astype(int)))[0] for w in weights]
    np.testing.assert_allclose(weighted_correlation(x, y, weights, method), wanted, atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_correlation_against_all_permutations(method, ties):
    rng = np.random.default_rng(3)
    x = rng.normal(size=6)
    y = x + rng.normal(size=6)
    if ties:
        x, y = x.round(), y.round()
    scipys = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[method]
    value = scipys(x, y)[0]
    every = [abs(scipys(x, y[list(order)])[0]) for order in itertools.permutations(range(6))]
    exact = np.mean(np.array(every) >= abs(value) - 1e-12)
    found = correlation(x, y, method)
    assert found.value == pytest.approx(value)
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 9999) + 1e-4)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found == correlation(x, y, method)
    assert found != correlation(x, y, method, seed=1)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_correlation_at_the_nominal_rate_and_within_its_interval(method, monkeypatch):
    monkeypatch.setattr(intervals, "_BUDGET", 1)  # the fewest repeats: 199
    rng = np.random.default_rng(0)
    significant = held = 0
    repeats, n, r = 300, 20, 0.6
    true = r if method == "pearson" else 6 / np.pi * np.arcsin(r / 2)
    for seed in range(repeats):
        x, noise = rng.normal(size=(2, n))
        significant += correlation(x, noise, method, seed=seed).p <= 0.05
        linked = correlation(x, r * x + np.sqrt(1 - r * r) * noise, method, seed=seed)
        held += linked.low <= true <= linked.high
    low, high = band(0.05, repeats)
    assert low <= significant <= high
    assert held >= band(0.93, repeats)[0]  # measured over 2,000 sets: see docs/design/analysis.md


def test_correlation_that_cannot_be_told():
    x = np.arange(5.0)
    for y in (np.ones(5), np.array([1, 2, np.nan, np.inf, 3])):
        found = correlation(x, y, "pearson")
        assert np.isnan([found.value, found.low, found.high, found.p]).all()
    assert found.n == 3
    perfect = correlation(x, 2 * x, "spearman")
    assert (perfect.value, perfect.low, perfect.high) == pytest.approx((1, 1, 1))
    with pytest.raises(FastpieError, match=r"one of .*'spearman'.*, but got 'kendall'"):
        correlation(x, x, "kendall")
