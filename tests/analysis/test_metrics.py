"""measure() against scikit-learn, on random and tied predictions, in every dtype and form."""

import warnings

import numpy as np
import pytest
import torch
from scipy import special
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    recall_score,
    roc_auc_score,
)

from fastpie import FastpieError
from fastpie.analysis import Predictions
from fastpie.analysis.metrics import METRICS, measure

SPARSITIES = [0.3, 0.6, 0.9]


def outputs(kind, seed=0, models=2, samples=211, classes=5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    values = rng.random((models, 1 + len(SPARSITIES), samples, classes))
    if kind == "tied":
        values = values.round(1)
    if kind == "few":  # nearly everything is the same, -0. included
        values = np.where(values > 0.9, 0.7, np.where(values > 0.5, 0.0, -0.0))
    if kind == "close":  # neighbours that fp32 cannot tell apart
        values = 0.5 + np.floor(values * 50) * 2.0**-52
    return values.astype(dtype), (rng.random((samples, classes)) < 0.3).astype(np.float64)


def predictions(values, labels, task="multilabel", **how):
    return Predictions.of_arrays(
        values[:, 0], values[:, 1:], SPARSITIES, task=task, labels=labels, **how
    )


def expected(values, labels, metric):
    """[S, L + 1, C] of scikit-learn, of the samples with a known label and a score."""
    found = np.empty((*values.shape[:2], values.shape[3]))
    for place in np.ndindex(found.shape):
        score, label = values[place[0], place[1], :, place[2]], labels[:, place[2]]
        known = ~np.isnan(label) & ~np.isnan(score)
        found[place] = metric(label[known], score[known])
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["random", "tied", "few", "close"])
def test_probabilities_against_sklearn(kind, dtype):
    values, labels = outputs(kind, dtype=dtype)
    found = measure(predictions(values, labels)).models
    for name, metric in (("ap", average_precision_score), ("auroc", roc_auc_score)):
        np.testing.assert_allclose(found.of(name), expected(values, labels, metric), atol=1e-13)
    recall = expected(values, labels, lambda y, p: recall_score(y, p > 0.5))
    np.testing.assert_array_equal(found.recall, recall)
    assert np.isnan(found.accuracy).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_do_not_tie(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(40, 3, (1, 4, 300, 2)).astype(dtype)
    labels = (rng.random((300, 2)) < 0.4).astype(float)
    assert (special.expit(values.astype(np.float64)) == 1).mean() > 0.5
    found = measure(predictions(values, labels, logits=True), repeats=2).models
    ranked = expected(values, labels, average_precision_score)
    np.testing.assert_allclose(found.ap, ranked, atol=1e-13)
    tied = expected(special.expit(values.astype(np.float64)), labels, average_precision_score)
    assert np.abs(found.ap - tied).max() > 0.01


def test_threshold_of_logits_and_probabilities():
    values, labels = outputs("random", models=3)
    logits = special.logit(values)
    for threshold in (0.2, 0.5, 0.9):
        found = measure(predictions(logits, labels, logits=True), threshold=threshold).models
        wanted = expected(values, labels, lambda y, p, t=threshold: recall_score(y, p > t))
        np.testing.assert_array_equal(found.recall, wanted)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_multiclass_against_sklearn(kind, logits):
    values, _ = outputs(kind, samples=307, models=3)
    labels = np.random.default_rng(1).integers(-1, 5, 307)
    given = np.log(values + 0.1) if logits else values
    measured = measure(predictions(given, labels, task="multiclass", logits=logits))
    found = measured.models
    exact = special.softmax(given, axis=-1) if logits else values
    one_hot = (labels[:, None] == np.arange(5)).astype(float)
    one_hot[labels < 0] = np.nan
    # Two softmaxes can round a tie apart; ranks of the logits' own softmax are what is compared.
    if logits:
        exact = torch.from_numpy(given).softmax(-1).numpy()
    for name, metric in (("ap", average_precision_score), ("auroc", roc_auc_score)):
        np.testing.assert_allclose(found.of(name), expected(exact, one_hot, metric), atol=1e-13)
    known = labels >= 0
    for place in np.ndindex(found.accuracy.shape):
        chosen = exact[place].argmax(-1)[known]
        wanted = recall_score(labels[known], chosen, average=None)
        np.testing.assert_allclose(found.recall[place], wanted, atol=1e-13)
        assert found.accuracy[place] == accuracy_score(labels[known], chosen)
        overall = measured.overall(found, "balanced_accuracy")[place]
        assert overall == pytest.approx(balanced_accuracy_score(labels[known], chosen))


def test_unknown_labels_and_nan_scores_take_no_part():
    values, labels = outputs("tied", samples=400, dtype=np.float32)
    rng = np.random.default_rng(2)
    labels[rng.random(labels.shape) < 0.2] = np.nan
    values[:, 1:][rng.random(values[:, 1:].shape) < 0.1] = np.nan
    found = measure(predictions(values, labels)).models
    for name, metric in (("ap", average_precision_score), ("auroc", roc_auc_score)):
        np.testing.assert_allclose(found.of(name), expected(values, labels, metric), atol=1e-13)
    recall = expected(values, labels, lambda y, p: recall_score(y, p > 0.5))
    np.testing.assert_allclose(found.recall, recall, atol=1e-13)


def test_nan_rows_of_multiclass_take_no_part():
    values, _ = outputs("random", models=1)
    labels = np.random.default_rng(1).integers(0, 5, 211)
    values[0, 1, :40] = np.nan
    values[0, 1, 40:60, 2] = np.nan  # a row that is broken in one class is broken
    broken = measure(predictions(values, labels, task="multiclass"), repeats=2)
    without = measure(
        predictions(values[:, :, 60:], labels[60:], task="multiclass"), repeats=2
    ).models
    for name in (*METRICS, "accuracy"):
        found, wanted = getattr(broken.models, name), getattr(without, name)
        np.testing.assert_array_equal(found[:, 1], wanted[:, 1])


def test_classes_without_positives_or_negatives():
    values, labels = outputs("random", classes=4)
    labels[:, 1], labels[:, 2], labels[:, 3] = 0, 1, np.nan
    measured = measure(predictions(values, labels))
    found = measured.models
    nothing = np.isnan(found.ap).all((0, 1))
    assert nothing.tolist() == [False, True, True, True]
    assert np.isnan(found.auroc).all((0, 1)).tolist() == [False, True, True, True]
    assert np.isnan(found.recall).all((0, 1)).tolist() == [False, True, False, True]
    assert measured.positives.tolist() == [labels[:, 0].sum(), 0, 211, 0]
    np.testing.assert_array_equal(measured.overall(found, "map"), found.ap[:, :, 0])
    labels[:, 0] = 0
    empty = measure(predictions(values, labels))
    assert np.isnan(empty.overall(empty.models, "map")).all()


def test_any_number_of_threads_and_any_block(monkeypatch):
    values, labels = outputs("tied", models=1)
    whole = measure(predictions(values, labels), repeats=7)
    monkeypatch.setattr("fastpie.analysis.metrics._BLOCK", 500)
    monkeypatch.setattr("fastpie.analysis.metrics._WEIGHTS", 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parts = measure(predictions(values, labels), repeats=7)
    np.testing.assert_array_equal(parts.models.ap, whole.models.ap)
    assert parts.resampled.ap.shape == whole.resampled.ap.shape == (7, 4, 5)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize("kind", ["random", "tied", "few"])
def test_resamples_are_sklearn_with_weights(kind, task):
    values, labels = outputs(kind, models=1, samples=97)
    values[0, 2, 5] = np.nan
    if task == "multiclass":
        labels = np.random.default_rng(1).integers(-1, 5, 97)
        one_hot = np.where(labels[:, None] < 0, np.nan, labels[:, None] == np.arange(5))
    else:
        labels[::10, 3] = np.nan
        one_hot = labels
    found = measure(predictions(values, labels, task=task), repeats=4, seed=3).resampled
    weights = np.random.default_rng(3).standard_exponential((97, 4))
    for r, k, c in np.ndindex(4, 4, 5):
        score, label = values[0, k, :, c], one_hot[:, c]
        some = ~np.isnan(score) & ~np.isnan(label)
        score, label, weight = score[some], label[some], weights[some, r]
        said = score > 0.5
        if task == "multiclass":
            said = values[0, k, some].argmax(1) == c
        wanted = {
            "ap": average_precision_score(label, score, sample_weight=weight),
            "auroc": roc_auc_score(label, score, sample_weight=weight),
            "recall": recall_score(label, said, sample_weight=weight),
        }
        for name, value in wanted.items():
            assert found.of(name)[r, k, c] == pytest.approx(value, abs=1e-12), name
    if task == "multiclass":
        known = (labels >= 0) & ~np.isnan(values[0, 2, :, 0])
        right = values[0, 2].argmax(1)[known] == labels[known]
        wanted = [np.average(right, weights=weights[known, r]) for r in range(4)]
        np.testing.assert_allclose(found.accuracy[:, 2], wanted, atol=1e-12)


def test_resampling_is_for_one_model_alone():
    values, labels = outputs("random", models=2)
    assert measure(predictions(values, labels)).resampled is None


def test_infinite_logits_are_ranked():
    values, labels = outputs("random", models=1)
    logits = special.logit(values)
    logits[0, :, :30], logits[0, :, 30:60] = np.inf, -np.inf
    ranks = np.argsort(np.argsort(np.clip(logits, -99, 99), axis=2), axis=2).astype(float)
    ranks[0, :, :30], ranks[0, :, 30:60] = 999, -1
    found = measure(predictions(logits, labels, logits=True), repeats=2).models
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        wanted = expected(ranks, labels, average_precision_score)
    np.testing.assert_allclose(found.ap, wanted, atol=1e-13)


def test_bad_input():
    values, labels = outputs("random")
    good = predictions(values, labels)
    with pytest.raises(FastpieError, match=r"`threshold` in \(0, 1\), but got 1"):
        measure(good, threshold=1)
    with pytest.raises(FastpieError, match="at least 2 `repeats`, but got 1"):
        measure(good, repeats=1)
    with pytest.raises(FastpieError, match="with labels"):
        measure(predictions(values, None))
    with pytest.raises(FastpieError, match=r"one of .*'auroc'.*, but got 'f1'"):
        measure(good).models.of("f1")
    with pytest.raises(FastpieError, match="at least one model and one sample"):
        measure(predictions(values[:, :, :0], labels[:0]))
