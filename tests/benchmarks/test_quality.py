"""The quality benchmark: its data, its formulas, and a whole run on a few images."""

import json

import numpy as np
import pytest
import torch
from benchmarks.quality import __main__ as quality
from benchmarks.quality import (
    data,
    levels,
    measures,
    metrics,
    neighbours,
    scores,
    segmentation,
    table,
    training,
    trials,
)
from sklearn.linear_model import Ridge

import fastpie

SIZE = 120


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", data.SETS)
def test_what_is_planted(name):
    planted = data.make(name, 3, 200)
    again = data.make(name, 3, 200)
    np.testing.assert_array_equal(planted.images, again.images)
    np.testing.assert_array_equal(planted.labels, again.labels)
    assert not np.array_equal(planted.images, data.make(name, 4, 200).images)
    for kind, fraction in data.FRACTIONS.items():
        assert planted.has(kind).sum() == round(fraction * 200)
    assert np.isfinite(planted.images).all()
    expected = (200, planted.classes) if planted.multilabel else (200,)
    assert planted.labels.shape == expected


def test_a_mislabelled_film_has_one_finding_more_or_less(rng):
    world = data.film.World(rng)
    truth = world.findings(rng, 300)
    changes = [np.abs(world.mislabel(rng, row) - row).sum() for row in truth]
    assert changes == [1.0] * 300
    assert world.prevalence.max() / world.prevalence.min() == pytest.approx(data.film.RATIO)


def test_rings_are_hollow(rng):
    classes = np.zeros(40, dtype=np.int64)
    _, masks = data.skin.paint(rng, classes, np.arange(40) < 20, np.zeros(40, dtype=bool))
    filled = [_holes(mask) for mask in masks]
    assert np.mean(filled[:20]) > 5 * (np.mean(filled[20:]) + 0.1)


def _holes(mask):
    from scipy import ndimage

    return (ndimage.binary_fill_holes(mask) & ~mask).sum()


def test_formulas_are_the_librarys(rng):
    dense, pruned = rng.normal(0, 3, (2, 50, 6)).astype(np.float32)
    labels = rng.integers(0, 6, 50)
    theirs = fastpie.disagreement(*map(torch.from_numpy, (dense, pruned, labels)))
    pairs = {
        "js": measures.js(dense, pruned, False),
        "spearman": measures.spearman(dense, pruned),
        "loss_dense": measures.loss(dense, labels),
        "margin_pruned": measures.margin(pruned, labels),
    }
    for name, ours in pairs.items():
        np.testing.assert_allclose(ours, theirs[name].numpy(), rtol=1e-4, atol=1e-5)
    several = (rng.random((50, 6)) < 0.3).astype(np.float32)
    theirs = fastpie.disagreement(
        *map(torch.from_numpy, (dense, pruned, several)), task="multilabel"
    )
    np.testing.assert_allclose(measures.js(dense, pruned, True), theirs["js"].numpy(), atol=1e-5)
    np.testing.assert_allclose(
        measures.loss(pruned, several) / 6, theirs["loss_pruned"].numpy(), rtol=1e-4
    )


def test_the_probe_is_the_refitted_one(rng):
    features, labels = rng.normal(0, 2, (30, 4)), rng.integers(0, 3, 30)
    found = neighbours.probe(features, labels)
    x = np.c_[(features - features.mean(0)) / features.std(0), np.ones(30)]
    for i in (0, 7, 29):
        others = np.arange(30) != i
        model = Ridge(0.1 * 30, fit_intercept=False)
        model.fit(x[others], np.eye(3)[labels[others]])
        told = model.predict(x[[i]])[0]
        margin = told[labels[i]] - np.delete(told, labels[i]).max()
        np.testing.assert_allclose(found[i], -margin, rtol=1e-8)


def test_neighbours_leave_the_sample_itself_out():
    features = np.array([[0.0], [1.0], [3.0], [10.0]])
    distances, indices = neighbours.nearest(features, 2)
    np.testing.assert_allclose(distances, [[1, 3], [1, 2], [2, 3], [7, 9]])
    assert indices[3].tolist() == [2, 1]
    labels = np.array([0, 0, 1, 1])
    np.testing.assert_allclose(neighbours.agreement(indices, labels), [0.5, 0.5, 0, 0.5])
    entropy = neighbours.label_entropy(indices, labels)
    np.testing.assert_allclose(entropy, np.log(2) * np.array([1, 1, 0, 1]))
    conflict = neighbours.conflict(features, labels, 1)
    np.testing.assert_allclose(conflict, [1 / 4, 1 / 3, 7 / 9, 7 / 16])
    assert neighbours.conflict(features, np.array([0, 0, 0, 1]), 1)[3] == 0.5


def test_ties_share_places():
    planted = np.zeros(100, dtype=bool)
    planted[:10] = True
    assert metrics.precision_at_5(np.zeros(100), planted) == pytest.approx(0.1)
    assert metrics.auroc(np.zeros(100), planted) == 0.5
    assert metrics.precision_at_5(planted.astype(float), planted) == 1
    assert metrics.auroc(np.full(100, np.nan), planted) == 0.5


def test_intervals_over_seeds():
    found = metrics.interval([0.1, 0.2, 0.3])
    assert found["mean"] == 0.2
    assert found["high"] - found["mean"] == pytest.approx(4.3027 * 0.1 / np.sqrt(3), abs=1e-4)
    assert metrics.paired([0.3, 0.4], [0.3, 0.4])["p"] is None
    assert metrics.paired([0.3, 0.41, 0.5], [0.2, 0.3, 0.4])["p"] < 0.01


def test_forgetting_counts_what_was_never_learned_most():
    right = np.array([[1.0, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]])
    epochs = np.stack([right, np.full_like(right, 0.5)], axis=-1)
    events = {s.name: s for s in scores.SCORES}["forgetting"].of(
        {"epochs": epochs}, np.zeros(3, dtype=np.int64)
    )
    assert events.tolist() == [2, 0, 4]


def test_a_rule_takes_the_last_level_before_the_first_that_fails():
    assert levels._last([True, True, False, True]) == 1
    assert levels._last([False, True]) == 0
    assert levels._last([True] * 9) == 8


def test_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "CASES", (("digits", "cnn"), ("chest film", "cnn")))
    monkeypatch.setitem(training.train.__kwdefaults__, "epochs", 6)
    monkeypatch.setenv("OUT", str(tmp_path / "results"))
    monkeypatch.setattr("sys.argv", ["benchmarks/quality/__main__.py", "--seeds", "2"])
    arguments = ["--work", str(tmp_path / "work"), "--seeds", "2", "--size", str(SIZE)]
    quality.main([*arguments, "--train"])

    def again(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(trials, "run_trial", again)
    quality.main(arguments)
    (path,) = (tmp_path / "results").glob("quality-*.json")
    content = json.loads(path.read_text())
    assert content["command"] == "python -m benchmarks.quality --seeds 2"
    rows = [row for row in content["rows"] if "score" in row and "kind" in row]
    assert len(rows) == 2 * len(data.KINDS) * len(scores.SCORES)
    assert all(0 <= row["auroc"]["mean"] <= 1 and row["auroc"]["seeds"] == 1 for row in rows)
    by = {(r["data"], r["kind"], r["score"]): r["auroc"]["mean"] for r in rows}
    assert by["digits", "wrong label", scores.COLUMNS["label in doubt"][0]] > 0.6
    comparisons = [row for row in content["rows"] if "difference" in row]
    assert {row["kind"] for row in comparisons} == set(data.KINDS)

    text = table.quality_table(content["rows"], variants=True)
    for score in scores.SCORES:
        assert f"| {score.name} |" in text
    assert {score.name for score in scores.SCORES} > table._VARIANTS
    assert table.quality_table(content["rows"]).count("*label in doubt*") == 1
    assert "best level, chosen by the truth" in table.level_table(content["rows"])
    assert table.comparison_table(content["rows"]).count("(peer)") == 2 * len(data.KINDS)


def test_segmentation(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "EPOCHS", 6)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["/x/benchmarks/repo/benchmarks/quality/segmentation.py"])
    segmentation.main(range(2), SIZE)
    (path,) = tmp_path.glob("quality-segmentation-*.json")
    content = json.loads(path.read_text())
    assert content["command"] == "python -m benchmarks.quality.segmentation"
    for row in content["rows"]:
        assert -1 <= row["spearman_with_error"]["mean"] <= 1
        assert f"| {row['score']} |" in table.segmentation_table(content["rows"])
