"""Definitions of PIEs against literal computations, on random, tied and unknown predictions."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from fastpie import FastpieError
from fastpie.scores.pie import DEFINITIONS, exemplars, scored_exemplars
from fastpie.scores.rank_correlation import as_pandas, rank_sums, spearman

PROBABILITIES = [d for d in DEFINITIONS if d != "drift"]


def pie_scores(dense, pruned, definition, threshold=0.5, task=None):
    return scored_exemplars(dense, pruned, definition, threshold=threshold, task=task)[1]


def predictions(seed=0, models=5, samples=200, classes=6, digits=None, dtype=np.float64):
    """Dense and pruned probabilities [S, N, C] that agree by and large."""
    generator = np.random.default_rng(seed)
    dense = generator.random((models, samples, classes))
    pruned = (dense + generator.normal(0, 0.3, dense.shape)).clip(0, 1)
    if digits is not None:
        dense, pruned = dense.round(digits), pruned.round(digits)
    return dense.astype(dtype), pruned.astype(dtype)


def softmax(seed=0, models=5, samples=200, classes=4, dtype=np.float64):
    generator = np.random.default_rng(seed)
    dense = generator.random((models, samples, classes))
    pruned = dense + generator.normal(0, 0.3, dense.shape)
    dense, pruned = np.exp(4 * dense), np.exp(4 * pruned)
    return tuple((x / x.sum(-1, keepdims=True)).astype(dtype) for x in (dense, pruned))


def bernoulli_js(p, q):
    def entropy(x):
        return -sum(v * np.log(v) for v in (x, 1 - x) if v > 0)

    return sum(entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2 for a, b in zip(p, q))  # noqa: B905


def ranks(row):  # doubled and centred, of fractions
    return [sum(x > y for y in row) - sum(x < y for y in row) for x in row]


def exact_rho(p, q):
    """Sign and square of rho as fractions; None for a constant row."""
    a, b = ranks(p), ranks(q)
    product = sum(x * x for x in a) * sum(x * x for x in b)
    if product == 0:
        return None
    covariance = sum(x * y for x, y in zip(a, b))  # noqa: B905
    return Fraction(covariance * abs(covariance), product)


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("models", [1, 5])
def test_spearman_takes_equal_correlations_for_equal(digits, models):
    dense, pruned = predictions(1, models, digits=digits)
    dense[:, 3] = 0.5
    p, q = dense.mean(0), pruned.mean(0)
    rho = [exact_rho(*rows) for rows in zip(p, q, strict=True)]
    js = [bernoulli_js(*rows) for rows in zip(p, q, strict=True)]
    order = exemplars(dense, pruned, fraction=1).tolist()
    assert sorted(order) == list(range(200))
    keys = [(rho[i] is None, rho[i] or 0) for i in order]
    assert keys == sorted(keys)  # constant rows last
    inside = [js[a] - js[b] for a, b in itertools.pairwise(order) if rho[a] == rho[b]]
    assert len(inside) > 50  # ties to break, by js from high to low
    assert min(inside) > -1e-12
    assert exemplars(dense, pruned, fraction=0.1).tolist() == order[:20]


def test_correlations_from_different_ranks_can_be_equal():
    # 1/2 = 12/24 = 9/18: two values tie in the first row of the second pair.
    p = np.array([[1.0, 2, 3], [1, 1, 2]]) / 10
    q = np.array([[1.0, 3, 2], [1, 2, 2]]) / 10
    sums = rank_sums(p, q)
    assert list(zip(sums.covariance, sums.first, sums.second, strict=True)) == [
        (4, 8, 8),
        (3, 6, 6),
    ]
    rho = spearman(sums)
    assert rho[0] == rho[1] == 0.5


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [2, 7, 20])
def test_the_correlation_of_pandas_bit_for_bit(digits, dtype, classes):
    p, q = (x[0] for x in predictions(2, 1, 300, classes, digits, dtype))
    expected = pd.DataFrame(p).corrwith(pd.DataFrame(q), axis=1, method="spearman")
    got = as_pandas(rank_sums(p, q))
    assert np.array_equal(got, expected.to_numpy(), equal_nan=True)
    assert np.isfinite(got).sum() > 200


@pytest.mark.skipif(int(pd.__version__.split(".")[0]) < 3, reason="pandas 2 orders NaN otherwise")
@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("fraction", [0.05, 0.5, 1])
@pytest.mark.parametrize("models", [1, 3, 30])
def test_the_rows_and_the_order_of_the_public_script(models, fraction):
    dense, pruned = predictions(3, models, samples=400, classes=4, dtype=np.float32)
    dense[:, 5] = 0.5  # constant
    pruned[:, 6] = 0.25
    dense[0, 7, 1] = np.nan  # left out of the correlation
    pruned[0, 8, 2] = np.nan
    dense[0, 9] = np.nan
    dense[0, 10, 1:] = np.nan  # one class remains
    averaged = [pd.DataFrame(np.stack(list(x), axis=0).mean(axis=0)) for x in (dense, pruned)]
    correlations = averaged[0].corrwith(averaged[1], method="spearman", axis=1)
    expected = np.argsort(correlations)[: int(fraction * correlations.size)]
    got = exemplars(dense, pruned, fraction=fraction, compat="prunecxr")
    assert got.tolist() == expected.tolist()
    assert correlations.nunique() < 100  # ties decide


def test_the_layout_of_arrays_does_not_matter_to_compat():
    dense, pruned = predictions(4, 30, classes=4, dtype=np.float32)
    expected = exemplars(dense, pruned, fraction=0.3, compat="prunecxr")
    ladder = np.stack([dense, pruned], 1)  # [S, L, N, C]
    turned = np.asfortranarray(pruned)
    assert exemplars(ladder[:, 0], ladder[:, 1], fraction=0.3, compat="prunecxr").tolist() == (
        expected.tolist()
    )
    assert exemplars(dense, turned, fraction=0.3, compat="prunecxr").tolist() == expected.tolist()


def modal(labels):
    counts = Counter(labels)
    return max(counts, key=lambda c: (counts[c], c))


@pytest.mark.parametrize("models", [(1, 1), (4, 4), (4, 3)])
def test_taxicab_and_modal_from_label_counts(models):
    dense, pruned = predictions(5, max(models), classes=3, digits=1)
    dense, pruned = dense[: models[0]], pruned[: models[1]]
    distance, differs = [], []
    for i in range(200):
        first = [list(row).index(max(row)) for row in dense[:, i]]
        second = [list(row).index(max(row)) for row in pruned[:, i]]
        distance.append(
            sum(
                abs(Fraction(first.count(c), models[0]) - Fraction(second.count(c), models[1]))
                for c in range(3)
            )
        )
        differs.append(modal(first) != modal(second))
    score = pie_scores(dense, pruned, "taxicab")
    assert np.allclose(score, [float(d) for d in distance], atol=1e-15)
    for value in set(distance):  # equal distances are equal numbers
        assert len({s for s, d in zip(score, distance, strict=True) if d == value}) == 1
    chosen = exemplars(dense, pruned, "taxicab", 0.1)
    assert len(chosen) == 20
    assert sorted((distance[i] for i in chosen), reverse=True) == sorted(distance)[:-21:-1]
    assert [distance[i] for i in chosen] == sorted((distance[i] for i in chosen), reverse=True)
    assert set(exemplars(dense, pruned, "modal")) == set(np.flatnonzero(differs))


def test_many_classes_are_counted_in_pieces(monkeypatch):
    dense, pruned = softmax(6, models=3, samples=50, classes=9)
    whole = {d: exemplars(dense, pruned, d, 0.5).tolist() for d in DEFINITIONS}
    monkeypatch.setattr("fastpie.scores.pie._CHUNK", 20)
    monkeypatch.setattr("fastpie.scores.rank_correlation._CHUNK", 20)
    assert {d: exemplars(dense, pruned, d, 0.5).tolist() for d in DEFINITIONS} == whole


def test_drift_is_the_distance_of_normalised_embeddings():
    generator = np.random.default_rng(7)
    dense = generator.normal(0, 5, (3, 40, 8)).astype(np.float32)
    pruned = generator.normal(0, 5, (3, 40, 8)).astype(np.float32)
    dense[:, 4] = pruned[:, 4] = 0
    dense[1, 5, 2] = np.nan
    dense[0, 6, 2] = np.inf
    score = pie_scores(dense, pruned, "drift")
    for i in (0, 1, 2, 3, 39):
        parts = []
        for f, g in zip(dense[:, i].astype(float), pruned[:, i].astype(float), strict=True):
            cosine = f @ g / np.sqrt((f @ f) * (g @ g))
            parts.append(np.sqrt(2 - 2 * cosine))
        assert score[i] == pytest.approx(np.mean(parts), rel=1e-9)
    assert score[4] == 0
    assert np.flatnonzero(np.isnan(score)).tolist() == [5, 6]
    order = exemplars(dense, pruned, "drift", 1)
    assert order[-3:].tolist() == [4, 5, 6]
    assert (np.diff(score[order[:-2]]) <= 0).all()


@pytest.mark.parametrize("models", [1, 4])
def test_flip_and_margin_of_one_class_an_image(models):
    dense, pruned = softmax(8, models)
    p, q = dense.mean(0), pruned.mean(0)
    margin = []
    for i in range(200):
        c = int(p[i].argmax())
        margin.append(q[i][c] - max(q[i][j] for j in range(4) if j != c))
    assert np.allclose(pie_scores(dense, pruned, "margin"), -np.array(margin), atol=1e-15)
    assert exemplars(dense, pruned, "margin", 0.2).tolist() == np.argsort(margin)[:40].tolist()
    flips = set(np.flatnonzero(p.argmax(1) != q.argmax(1)))
    assert set(exemplars(dense, pruned, "flip")) == flips == set(np.flatnonzero(np.less(margin, 0)))
    assert flips


@pytest.mark.parametrize("models", [1, 4])
def test_flip_vote_and_margin_of_several_classes_an_image(models):
    dense, pruned = predictions(9, models)
    p, q = dense.mean(0), pruned.mean(0)
    margin = [
        min((q[i][c] - 0.6) * (1 if p[i][c] > 0.6 else -1) for c in range(6)) for i in range(200)
    ]
    assert np.allclose(pie_scores(dense, pruned, "margin", 0.6), -np.array(margin), atol=1e-15)
    flips = {i for i in range(200) if any((p[i] > 0.6) != (q[i] > 0.6))}
    assert set(exemplars(dense, pruned, "flip", threshold=0.6)) == flips
    votes = {
        i
        for i in range(200)
        if any(
            (sum(dense[:, i, c] > 0.6) > models / 2) != (sum(pruned[:, i, c] > 0.6) > models / 2)
            for c in range(6)
        )
    }
    assert set(exemplars(dense, pruned, "vote", threshold=0.6)) == votes
    if models == 1:
        assert flips == votes


def test_js_of_both_tasks():
    dense, pruned = softmax(10)
    p, q = dense.mean(0), pruned.mean(0)
    m = (p + q) / 2
    expected = ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)) / 2
    assert np.allclose(pie_scores(dense, pruned, "js"), expected, rtol=1e-9)
    assert exemplars(dense, pruned, "js").tolist() == np.argsort(-expected)[:10].tolist()
    several = [bernoulli_js(*rows) for rows in zip(p, q, strict=True)]
    got = pie_scores(dense, pruned, "js", task="multilabel")
    assert np.allclose(got, several, rtol=1e-9)
    dense, pruned = predictions(10)
    p, q = dense.mean(0), pruned.mean(0)
    several = [bernoulli_js(*rows) for rows in zip(p, q, strict=True)]
    assert np.allclose(pie_scores(dense, pruned, "js"), several, rtol=1e-9)


@pytest.mark.parametrize("definition", ["modal", "vote", "flip"])
def test_definitions_that_decide_are_ordered_by_js(definition):
    dense, pruned = predictions(11)
    chosen = exemplars(dense, pruned, definition)
    p, q = dense.mean(0), pruned.mean(0)
    if definition == "modal":
        js = pie_scores(dense, pruned, "js", task="multiclass")
    else:
        js = np.array([bernoulli_js(*rows) for rows in zip(p, q, strict=True)])
    assert len(chosen) > 5
    assert (np.diff(js[chosen]) <= 1e-12).all()


@pytest.mark.parametrize("definition", PROBABILITIES)
def test_a_sample_with_nan_in_any_model_is_last_or_no_pie(definition):
    dense, pruned = softmax(12)
    without = exemplars(np.delete(dense, [3, 4], 1), np.delete(pruned, [3, 4], 1), definition, 1)
    dense[1, 3, 2] = np.nan
    pruned[4, 4] = np.nan
    order = exemplars(dense, pruned, definition, 1).tolist()
    if definition not in ("modal", "vote", "flip"):
        assert order[-2:] == [3, 4]
        order = order[:-2]
    assert order == [i + 2 * (i >= 3) for i in without]
    assert np.isnan(pie_scores(dense, pruned, definition)[[3, 4]]).all()


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_equal_predictions_in_the_order_of_the_rows(definition):
    dense, _ = softmax(13)
    decides = definition in ("modal", "vote", "flip")
    expected = [] if decides else list(range(20))
    if definition == "margin":  # does not compare the two
        expected = np.argsort(-pie_scores(dense, dense, "margin"), kind="stable")[:20].tolist()
    assert exemplars(dense, dense, definition, 0.1).tolist() == expected


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_fp32_tensors_and_no_samples(definition):
    dense, pruned = softmax(14, dtype=np.float32)
    expected = exemplars(dense.astype(np.float64), pruned.astype(np.float64), definition)
    got = exemplars(torch.from_numpy(dense), torch.from_numpy(pruned), definition)
    assert got.dtype == np.int64
    assert got.tolist() == expected.tolist()
    assert exemplars(dense[:, :0], pruned[:, :0], definition).shape == (0,)


def test_one_class_has_no_ranking_and_no_margin():
    dense, pruned = predictions(15, classes=1)
    assert np.isnan(pie_scores(dense, pruned, "spearman")).all()
    assert np.isnan(pie_scores(dense, pruned, "margin", task="multiclass")).all()
    js = pie_scores(dense, pruned, "js", task="multilabel")
    assert exemplars(dense, pruned).tolist() == np.argsort(-js)[:10].tolist()


def test_bad_input_is_refused():
    dense, pruned = predictions(16)
    with pytest.raises(FastpieError, match="definition"):
        pie_scores(dense, pruned, "median")
    with pytest.raises(FastpieError, match="compat"):
        exemplars(dense, pruned, "modal", compat="prunecxr")
    with pytest.raises(FastpieError, match="compat"):
        exemplars(dense, pruned, compat="hooker")
    with pytest.raises(FastpieError, match="as many dense"):
        exemplars(dense, pruned[:2], "drift")
    with pytest.raises(FastpieError, match="task"):
        exemplars(dense, pruned, "js", task="segmentation")
