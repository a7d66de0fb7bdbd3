"""Doubtful labels: planted ones are found, from every source of evidence, and what cannot be told is null."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import rankdata

import fastpie
from fastpie.analysis import Predictions
from fastpie.analysis.cleanlab_agreement import cleanlab_agreement, cleanlab_doubt
from fastpie.analysis.doubt import label_in_doubt, label_margins
from fastpie.analysis.folds import fold_predictions, fold_table
from fastpie.analysis.probe import probe_margins
from fastpie.errors import FastpieError

N, C = 120, 3
WRONG = [7, 33, 64, 101]


def planted(seed=0):
    """Features in three clusters, and labels of which four are wrong."""
    generator = np.random.default_rng(seed)
    truth = np.arange(N) % C
    features = np.eye(C)[truth] * 4 + generator.normal(size=(N, C)) * 0.5
    labels = truth.copy()
    labels[WRONG] = (labels[WRONG] + 1) % C
    return features, labels, truth, generator


def score_table(labels, margins, **columns):
    """A score table: margins [1 + L, N]."""
    levels = {f"margin_pruned@0.{i}": margins[i] for i in range(1, len(margins))}
    return pa.table(
        {
            "sample_id": [f"s{i:03d}" for i in range(len(labels))],
            "label": pa.array(labels),
            "margin_dense": margins[0],
            "loss_dense": -margins[0],
            **levels,
            **columns,
        }
    )


def score(doubt):
    return doubt.samples["label_in_doubt"].to_numpy(zero_copy_only=False)


def test_the_margin_over_the_levels_without_anything_else():
    _, labels, _, generator = planted()
    margins = generator.normal(size=(3, N))
    doubt = label_in_doubt(score_table(labels, margins))
    np.testing.assert_allclose(score(doubt), rankdata(-margins.mean(0)) / N)
    np.testing.assert_allclose(doubt.samples["label_margin"], margins.mean(0))
    assert doubt.samples["doubtful_class"].to_pylist() == [str(c) for c in labels]
    assert "the dense model and its levels" in doubt.formula
    assert not doubt.out_of_sample


def test_the_probe_finds_wrong_labels_that_the_model_has_memorised():
    features, labels, _, _ = planted()
    margins = np.full((2, N), 5.0)  # nothing to see
    doubt = label_in_doubt(score_table(labels, margins), features=features)
    assert set(np.argsort(-score(doubt))[:4]) == set(WRONG)
    np.testing.assert_allclose(doubt.samples["label_margin"], probe_margins(features, labels, C))
    assert "probe" in doubt.formula


def test_the_best_source_of_margins_is_taken():
    features, labels, _, generator = planted()
    margins, committee, epochs, outside = (generator.normal(size=(4, N))[i] for i in range(4))
    table = score_table(labels, margins[None], margin_committee=committee)
    records = pa.table({"sample_id": table["sample_id"], "margin_dense_mean": epochs})
    records = records.take(pa.array(generator.permutation(N)))
    folds = score_table(labels, outside[None]).take(pa.array(generator.permutation(N)))

    def made(**sources):
        return label_in_doubt(table, **sources)

    def same(doubt, source):
        np.testing.assert_allclose(doubt.samples["label_margin"], source)

    same(made(), committee)
    same(made(committee=margins * 2), margins * 2)
    same(made(epochs=records), epochs)
    same(made(epochs=records.rename_columns(["sample_id", "aum"])), epochs)
    same(made(epochs=records, features=features), probe_margins(features, labels, C))
    with_folds = made(epochs=records, features=features, out_of_sample=folds)
    same(with_folds, outside)
    assert with_folds.out_of_sample
    assert "out of sample" in with_folds.formula


def test_probabilities_out_of_sample():
    _, labels, truth, _ = planted()
    probabilities = np.full((N, C), 0.05)
    probabilities[np.arange(N), truth] = 0.9
    doubt = label_in_doubt(score_table(labels, np.ones((1, N))), out_of_sample=probabilities)
    assert set(np.argsort(-score(doubt))[:4]) == set(WRONG)
    margins = doubt.samples["label_margin"].to_numpy()
    np.testing.assert_allclose(margins[WRONG], -0.85)
    np.testing.assert_allclose(np.delete(margins, WRONG), 0.85)


def test_samples_that_a_source_does_not_know():
    features, labels, _, generator = planted()
    margins = generator.normal(size=(1, N))
    margins[0, 3] = np.nan
    features[[3, 8]] = np.nan
    table = score_table(labels, margins)
    doubt = label_in_doubt(table, features=features)
    nulls = doubt.samples["label_in_doubt"].is_null().to_pylist()
    assert nulls == [i in (3, 8) for i in range(N)]
    assert doubt.samples["doubtful_class"][3].as_py() is None
    records = pa.table({"sample_id": table["sample_id"][10:], "aum": margins[0, 10:]})
    few = label_in_doubt(table, epochs=records)
    assert few.samples["label_in_doubt"].null_count == 10


def test_margins_of_arrays():
    logits = np.array([[1.0, 3.0, 0.0], [2.0, 2.0, np.nan], [0.0, 1.0, 4.0], [1.0, 0, 0]])
    margins = label_margins(np.stack([logits, 2 * logits]), [0, 1, 2, -1])
    np.testing.assert_array_equal(margins[0], [-2, np.nan, 3, np.nan])
    np.testing.assert_array_equal(margins[1], [-4, np.nan, 6, np.nan])
    several = label_margins(logits[:2], [[1, 0, np.nan], [0, 1, 1]], task="multilabel")
    np.testing.assert_array_equal(several, [[1, -3, np.nan], [-2, 2, np.nan]])
    assert np.isnan(label_margins(np.ones((2, 1)), [0, 0])).all()
    assert label_margins(np.array([[-np.inf, 1.0]]), [0]) == -np.inf  # of probability zero
    table_of = fastpie.disagreement(
        torch.from_numpy(logits[:1]), torch.from_numpy(logits[:1]), torch.tensor([0])
    )
    assert table_of["margin_dense"].item() == margins[0, 0]


def several_labels():
    """Logits that say the truth, and labels of which one class of some samples is wrong."""
    generator = np.random.default_rng(4)
    truth = generator.integers(0, 2, (60, 4)).astype(np.float32)
    logits = (2 * truth - 1) * (3 + generator.random((60, 4)))
    labels, wrong = truth.copy(), {5: 2, 20: 0, 41: 3}
    for i, c in wrong.items():
        labels[i, c] = 1 - labels[i, c]
    labels[7, 1] = np.nan
    predictions = Predictions.of_arrays(
        logits,
        logits * 0.8,
        0.5,
        task="multilabel",
        labels=labels,
        sample_ids=[f"s{i:03d}" for i in range(60)],
        class_names=["a", "b", "c", "d"],
        logits=True,
    )
    flat = pa.FixedSizeListArray.from_arrays(pa.array(labels.ravel()), 4)
    table = pa.table(
        {
            "sample_id": predictions.sample_ids,
            "label": flat,
            "margin_dense": generator.normal(size=60),
            "loss_dense": generator.random(60),
        }
    )
    return table, predictions, wrong, truth


def test_the_most_doubtful_of_several_labels():
    table, predictions, wrong, truth = several_labels()
    doubt = label_in_doubt(table, predictions=predictions)
    assert set(np.argsort(-score(doubt))[:3]) == set(wrong)
    classes = doubt.samples["doubtful_class"].to_pylist()
    assert [classes[i] for i in wrong] == ["c", "a", "d"]
    assert classes[7] != "b"
    features = truth * 2 - 1 + np.random.default_rng(5).normal(size=truth.shape) * 0.1
    doubt = label_in_doubt(table, predictions=predictions, features=features)
    assert set(np.argsort(-score(doubt))[:3]) == set(wrong)
    outside = label_in_doubt(table, out_of_sample=predictions)
    assert set(np.argsort(-score(outside))[:3]) == set(wrong)
    assert outside.samples["doubtful_class"][5].as_py() == "2"


def test_several_labels_from_the_score_table_alone():
    table, _, _, _ = several_labels()
    doubt = label_in_doubt(table)
    loss = table["loss_dense"].to_numpy()
    np.testing.assert_allclose(score(doubt), rankdata(loss) / 60)
    np.testing.assert_allclose(doubt.samples["label_margin"], -loss)
    assert doubt.samples["doubtful_class"].null_count == 60
    outside = label_in_doubt(table.slice(1), out_of_sample=table)
    np.testing.assert_allclose(score(outside), rankdata(loss[1:]) / 59)
    records = pa.table({"sample_id": table["sample_id"], "loss_dense_mean": 1 - loss})
    np.testing.assert_allclose(score(label_in_doubt(table, epochs=records)), 61 / 60 - score(doubt))


def test_classes_come_before_epochs_that_know_only_samples():
    table, predictions, _, _ = several_labels()
    records = pa.table({"sample_id": table["sample_id"], "loss_dense_mean": np.zeros(60)})
    doubt = label_in_doubt(table, predictions=predictions, epochs=records)
    assert doubt.samples.equals(label_in_doubt(table, predictions=predictions).samples)


def test_a_committee_of_several_labels():
    table, predictions, _, _ = several_labels()
    margins = np.random.default_rng(9).normal(size=(60, 4))
    doubt = label_in_doubt(table, predictions=predictions, committee=margins)
    np.testing.assert_allclose(doubt.samples["label_margin"], margins.min(1))
    assert doubt.samples["doubtful_class"].to_pylist() == ["abcd"[c] for c in margins.argmin(1)]


def test_the_probe_of_several_labels():
    table, _, wrong, truth = several_labels()
    labels = np.array(table["label"].to_pylist(), float)
    doubt = label_in_doubt(table, features=truth)
    margins = probe_margins(truth, labels, 4)
    np.testing.assert_allclose(score(doubt), rankdata(-np.nanmin(margins, 1)) / 60)
    classes = doubt.samples["doubtful_class"].to_pylist()
    assert all(classes[i] == str(c) for i, c in wrong.items())


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_agreement_with_cleanlab(task):
    pytest.importorskip("cleanlab")
    if task == "multilabel":
        table, predictions, wrong, _ = several_labels()
        known = 59  # one sample has an unknown label
    else:
        _, labels, truth, generator = planted()
        logits = np.eye(C)[truth] * 3 + generator.random((N, C))
        wrong, known = WRONG, N
        predictions = Predictions.of_arrays(
            logits, logits, 0.5, task=task, labels=labels, logits=True,
            sample_ids=[f"s{i:03d}" for i in range(N)],
        )  # fmt: skip
        table = score_table(labels, label_margins(logits, labels)[None])
    theirs = cleanlab_doubt(predictions)
    assert np.isfinite(theirs).sum() == known
    assert set(np.argsort(-np.nan_to_num(theirs))[: len(wrong)]) == set(wrong)
    doubt = label_in_doubt(table, predictions=predictions)
    fraction = (len(wrong) + 0.5) / known
    row = cleanlab_agreement(doubt, predictions, fraction=fraction).to_pylist()[0]
    assert row["a"] == "label_in_doubt"
    assert row["b"] == "cleanlab, in sample"
    assert row["jaccard"] == 1
    assert row["n"] == len(wrong)
    assert 0.5 < row["rank_correlation"] <= 1
    nothing = cleanlab_agreement(doubt, predictions, fraction=0, out_of_sample=True).to_pylist()[0]
    assert nothing["b"] == "cleanlab, out of sample"
    assert nothing["jaccard"] is None


def test_cleanlab_is_joined_by_sample_id():
    pytest.importorskip("cleanlab")
    table, predictions, _, _ = several_labels()
    doubt = label_in_doubt(table, predictions=predictions)
    expected = cleanlab_agreement(doubt, predictions).to_pylist()
    order = np.random.default_rng(6).permutation(60)
    mixed = Predictions.of_arrays(
        predictions.dense[:, order], predictions.pruned[:, :, order], [0.5], task="multilabel",
        labels=predictions.labels[order], logits=True,
        sample_ids=[predictions.sample_ids[i] for i in order],
    )  # fmt: skip
    assert cleanlab_agreement(doubt, mixed).to_pylist() == expected


def test_cleanlab_that_is_not_installed(monkeypatch):
    _, predictions, _, _ = several_labels()
    monkeypatch.setitem(__import__("sys").modules, "cleanlab.multilabel_classification", None)
    with pytest.raises(
        FastpieError, match=r"Expected cleanlab for its quality scores.*\[cleanlab\]"
    ):
        cleanlab_doubt(predictions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"committee": np.zeros(5)}, r"`committee` of shape \[120\], but got \[5\]"),
        (
            {"out_of_sample": np.zeros((5, C))},
            r"`out_of_sample` of shape \[120, C\], but got \[5, 3\]",
        ),
        ({"out_of_sample": np.zeros((N, 2))}, "with the classes of the labels"),
        ({"features": np.zeros((5, 2))}, "`features` of the 120 samples of the table, but got 5"),
        ({"epochs": pa.table({"sample_id": ["a"]})}, "`epochs` to have one of the columns"),
    ],
)
def test_bad_input(arguments, message):
    _, labels, _, _ = planted()
    with pytest.raises(FastpieError, match=message):
        label_in_doubt(score_table(labels, np.zeros((1, N))), **arguments)


def test_a_table_without_labels():
    with pytest.raises(
        FastpieError, match=r"with labels, but it has no columns \['label', 'loss_dense'\]"
    ):
        label_in_doubt(pa.table({"sample_id": ["a"], "margin_dense": [1.0]}))


class Items(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.sample_ids = [f"s{i:03d}" for i in range(len(images))]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


class Network(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Linear(4, 8)
        self.head = torch.nn.Linear(8, C)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one data set, by two models, with everything kept; a sample that is broken."""
    images = torch.randn(30, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images[11] = torch.nan
    data = Items(images, [i % C for i in range(30)])
    made = []
    for seed in range(2):
        model = Network(seed).eval()
        dual = fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.5]), features="body")
        made.append(
            fastpie.mine(
                dual, data, tmp_path_factory.mktemp("runs") / "run", batch_size=8,
                keep_logits=True, keep_features=True, progress=False,
            )
        )  # fmt: skip
    return made


def test_of_a_run(runs):
    run = runs[0]
    doubt = label_in_doubt(run)
    assert doubt.samples["sample_id"].to_pylist() == run.table["sample_id"].to_pylist()
    from_table = label_in_doubt(run.table, features=run.features()[0])
    assert from_table.samples.equals(doubt.samples)
    labels = run.table["label"].to_numpy()
    margins = probe_margins(run.features()[0], labels, C)
    np.testing.assert_allclose(doubt.samples["label_margin"], margins)


def test_folds_make_a_run_out_of_sample(runs):
    folds = {f"s{i:03d}": i % 2 for i in range(30) if i != 4}
    table = fold_table(runs, folds)
    ids = table["sample_id"].to_pylist()
    assert ids == sorted(i for i in folds if i != "s011")
    by_id = [dict(zip(r.table["sample_id"].to_pylist(), r.table["margin_pruned@0.5"].to_pylist(),
                      strict=True)) for r in runs]  # fmt: skip
    assert table["margin_pruned@0.5"].to_pylist() == [by_id[folds[i]][i] for i in ids]

    predictions = fold_predictions(runs, folds)
    assert predictions.sample_ids == ids
    assert predictions.labels.tolist() == table["label"].to_pylist()
    rows = [r.table["sample_id"].to_pylist() for r in runs]
    for i, sample in enumerate(ids):
        run, row = runs[folds[sample]], rows[folds[sample]].index(sample)
        assert (predictions.dense[0, i] == run.logits()[0][row]).all()
        assert (predictions.pruned[0, :, i] == run.logits()[1][:, row]).all()

    of_table, of_predictions = (
        label_in_doubt(runs[0].table, out_of_sample=given) for given in (table, predictions)
    )
    assert of_table.samples["label_in_doubt"].null_count == 1  # in no fold
    np.testing.assert_allclose(
        of_table.samples["label_margin"].to_numpy(zero_copy_only=False),
        of_predictions.samples["label_margin"].to_numpy(zero_copy_only=False),
        atol=1e-5,
    )


def test_folds_without_a_run(runs):
    with pytest.raises(FastpieError, match=r"folds in \[0, 2\), the number of runs, but got \[2\]"):
        fold_table(runs, {"s000": 2})
    with pytest.raises(FastpieError, match="but got no run"):
        fold_predictions([], {})
