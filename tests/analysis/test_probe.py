"""The probe by all other samples, against regressions without each of them."""

from __future__ import annotations

import numpy as np
import pytest

from fastpie import FastpieError
from fastpie.analysis import probe
from fastpie.analysis.probe import leave_one_out, probe_margins


def one_by_one(x, y, penalty=0.1):
    """Literally without each sample; standardised and penalised as with it."""
    x = x[:, x.std(0) > 1e-8]
    x = np.concatenate([(x - x.mean(0)) / x.std(0), np.ones((len(x), 1))], 1)
    found = np.empty(y.shape)
    for i in range(len(x)):
        z, t = np.delete(x, i, 0), np.delete(y, i, 0)
        gram = z.T @ z + penalty * len(x) * np.eye(x.shape[1])
        found[i] = x[i] @ np.linalg.solve(gram, z.T @ t)
    return found


@pytest.fixture
def generator():
    return np.random.default_rng(5)


@pytest.mark.parametrize("shape", [(40, 7), (40, 39), (40, 40), (12, 60), (2, 3), (50, 1)])
@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_it_is_what_a_regression_without_the_sample_gives(generator, shape, penalty):
    x = generator.normal(3, 5, shape)
    y = generator.normal(size=(shape[0], 4))
    np.testing.assert_allclose(
        leave_one_out(x, y, penalty=penalty), one_by_one(x, y, penalty), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(90, 20), (30, 70)])
def test_blocks_change_nothing(generator, shape, monkeypatch):
    x, y = generator.normal(size=shape).astype(np.float32), generator.normal(size=(shape[0], 2))
    whole = leave_one_out(x, y)
    monkeypatch.setattr(probe, "_BLOCK", 7 * shape[1])
    np.testing.assert_allclose(leave_one_out(x, y), whole, rtol=1e-9, atol=1e-12)


def test_columns_that_do_not_vary_are_left_out(generator):
    x, y = generator.normal(size=(30, 5)), generator.normal(size=(30, 2))
    dead = np.concatenate([x, np.full((30, 2), 7.0)], 1)
    np.testing.assert_allclose(leave_one_out(dead, y), leave_one_out(x, y), rtol=1e-9)
    constant = leave_one_out(np.ones((4, 2)), np.array([[0.0], [1], [1], [1]]))
    assert np.isfinite(constant).all()


def test_rows_that_are_not_finite_take_no_part(generator):
    x, y = generator.normal(size=(30, 5)), generator.normal(size=(30, 2))
    x[3, 1], x[7, 0] = np.nan, np.inf
    rest = np.delete(np.arange(30), [3, 7])
    found = leave_one_out(x, y)
    assert np.isnan(found[[3, 7]]).all()
    np.testing.assert_allclose(found[rest], leave_one_out(x[rest], y[rest]), rtol=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few(n):
    assert np.isnan(leave_one_out(np.ones((n, 3)), np.ones((n, 2)))).all()


def blobs(generator, n=300, classes=3):
    labels = generator.integers(0, classes, n)
    x = generator.normal(size=(n, 10))
    x[np.arange(n), labels] += 5
    return x, labels


def test_wrong_labels_have_the_lowest_margins(generator):
    x, labels = blobs(generator)
    wrong = generator.permutation(300)[:20]
    given = labels.copy()
    given[wrong] = (given[wrong] + 1) % 3
    margins = probe_margins(x, given, 3)
    assert set(np.argsort(margins)[:20]) == set(wrong)
    assert np.median(np.delete(margins, wrong)) > 0


def test_the_margin_by_its_definition(generator):
    x, labels = blobs(generator, 50)
    told = leave_one_out(x, np.eye(3)[labels])
    expected = [
        t[c] - max(t[k] for k in range(3) if k != c) for t, c in zip(told, labels, strict=True)
    ]
    np.testing.assert_allclose(probe_margins(x, labels, 3), expected)


def test_unknown_labels(generator):
    x, labels = blobs(generator, 60)
    labels[[5, 9]] = -1
    rest = np.delete(np.arange(60), [5, 9])
    margins = probe_margins(x, labels, 3)
    assert np.isnan(margins[[5, 9]]).all()
    np.testing.assert_allclose(margins[rest], probe_margins(x[rest], labels[rest], 3))
    assert np.isnan(probe_margins(x, np.full(60, -1), 3)).all()


def test_several_labels(generator):
    x, labels = blobs(generator, 80)
    several = np.eye(3)[labels].astype(np.float32)
    several[4, 1] = np.nan
    margins = probe_margins(x, several, 3)
    assert margins.shape == (80, 3)
    assert np.isnan(margins[4, 1])
    assert np.isfinite(margins[4, [0, 2]]).all()
    filled = several.astype(np.float64)
    filled[4, 1] = np.delete(filled[:, 1], 4).mean()
    expected = (2 * several - 1) * (leave_one_out(x, filled) - 0.5)
    np.testing.assert_allclose(margins, expected, rtol=1e-7)


def test_one_class_has_no_margin(generator):
    assert np.isnan(probe_margins(generator.normal(size=(9, 2)), np.zeros(9, int), 1)).all()


def test_bad_input():
    for x, y in ((np.ones(3), np.ones((3, 1))), (np.ones((3, 1)), np.ones((4, 1)))):
        with pytest.raises(FastpieError, match=r"`features` of shape \[N, D\]"):
            leave_one_out(x, y)
    with pytest.raises(FastpieError, match="`penalty` above 0, but got 0"):
        leave_one_out(np.ones((3, 1)), np.ones((3, 1)), penalty=0)
    with pytest.raises(FastpieError, match="Expected 3 labels, but got 4"):
        probe_margins(np.ones((3, 1)), np.zeros(4, int), 2)
