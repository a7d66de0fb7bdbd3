"""`analyze`: what a run has data for, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from fastpie.analysis import Analysis, Predictions, analyze, analyze_predictions
from fastpie.analysis.analyze import DEFAULT_DEFINITIONS
from fastpie.dual import stage_features
from multilabel_set import multilabel_set

N = 90


class Images(torch.utils.data.Dataset):
    """Blobs at three places; four labels are wrong, one image is blank, one is there twice."""

    class_names = ("left", "middle", "right")
    wrong = (3, 17, 40, 66)

    def __init__(self, task: str = "multiclass"):
        generator = torch.Generator().manual_seed(2)
        truth = torch.arange(N) % 3
        self.images = 0.1 * torch.rand(N, 1, 12, 12, generator=generator)
        for i, c in enumerate(truth.tolist()):
            self.images[i, 0, 4:8, 4 * c : 4 * c + 4] += 0.6
        self.images[50] = 0.3
        self.images[73] = self.images[70]  # of the same class
        labels = truth.clone()
        labels[list(self.wrong)] = (labels[list(self.wrong)] + 1) % 3
        self.labels = labels
        if task == "multilabel":
            self.labels = nn.functional.one_hot(labels, 3).float()
        self.sample_ids = [f"s{i:03d}" for i in range(N)]

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


def network(seed=0, channels=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(72, channels),
    ).eval()


def trained(data, seed=0):
    model = network(seed).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loss = nn.CrossEntropyLoss() if data.labels.ndim == 1 else nn.BCEWithLogitsLoss()
    for _ in range(15):
        optimizer.zero_grad()
        loss(model(data.images), data.labels).backward()
        optimizer.step()
    return model.eval()


def mined(folder, data, *models, **options):
    duals = []
    for model in models:
        names = stage_features(model, data.images[:1]) if options.get("keep_features") else None
        duals.append(
            fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6, 0.9]), features=names)
        )
    return fastpie.mine(
        duals if len(duals) > 1 else duals[0], data, folder, progress=False, **options
    )


@pytest.fixture(scope="module")
def data():
    return Images()


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("analyze") / "run"
    return mined(folder, data, trained(data), keep_logits=True, keep_features="dense")


@pytest.fixture(scope="module")
def analysis(run, data):
    return analyze(run, dataset=data, seed=1, progress=False)


def test_every_table_that_the_run_has_data_for(analysis):
    expected = {"levels", "curves", "classes", "links", "pairs", "regression", "stability"}
    assert expected | {"agreement", "subgroups"} == set(analysis.tables)
    assert analysis.tables["classes"]["class"].to_pylist() == ["left", "middle", "right"]
    for name in ("ap", "ap_pruned", "impact", "pie_ratio", "first_drop"):
        assert name in analysis.tables["classes"].column_names
    for name, table in analysis.tables.items():
        for field in table.schema:
            if field.type == "double":
                values = table[field.name].to_numpy(zero_copy_only=False)
                # NaN or inf instead of null would not survive JSON and charts.
                assert not np.isinf(values).any(), (name, field.name)
                assert np.isnan(values).sum() == table[field.name].null_count, (name, field.name)


def test_the_columns_of_the_samples(analysis, run, data):
    samples = analysis.samples
    assert samples["sample_id"].to_pylist() == run.table["sample_id"].to_pylist()
    doubtful = np.argsort(-samples["label_in_doubt"].to_numpy(zero_copy_only=False))
    assert set(doubtful[:5]) == {*Images.wrong, 50}  # which has no sign of its label
    assert set(np.argsort(-samples["hard"].to_numpy(zero_copy_only=False))[:4]) >= {3, 17}
    assert samples["atypical"].to_numpy(zero_copy_only=False).argmax() == 50
    assert samples["blank"].to_pylist()[50] is True
    assert samples["duplicate_of"].to_pylist()[73] == "s070"
    assert samples["quadrant"].to_pylist()[3] == "hard, label in doubt"
    assert samples["doubtful_class"].to_pylist()[3] == "middle"
    np.testing.assert_allclose(samples["hardness"], run.table["hardness"])
    for name in ("hardness_low", "hardness_high"):  # also where `hard` is another score
        assert samples[name].null_count == 0
    pies = [i for i, pie in zip(data.sample_ids, samples["pie"].to_pylist(), strict=True) if pie]
    assert sorted(pies) == sorted(fastpie.pie(run, "modal"))
    assert sum(analysis.facts["quadrants"].values()) == N


def test_it_is_kept_and_says_what_it_found(analysis, tmp_path):
    again = Analysis.load(analysis.save(tmp_path))
    assert again.samples.equals(analysis.samples)
    assert again.facts == analysis.facts
    assert again.sentences == analysis.sentences
    assert any("deserve a second look" in sentence for sentence in analysis.sentences)
    assert any("a copy of another image" in sentence for sentence in analysis.sentences)


def test_a_run_that_kept_nothing(tmp_path, data):
    found = analyze(mined(tmp_path / "run", data, trained(data)))
    assert set(found.tables) == {"stability", "subgroups"}
    assert found.samples["atypical"].null_count == N
    assert found.samples["label_in_doubt"].null_count == 0  # from the levels
    low, high = (found.samples[name].to_numpy() for name in ("hardness_low", "hardness_high"))
    hard = found.samples["hard"].to_numpy()
    assert (low <= hard + 1e-6).all()
    assert (hard <= high + 1e-6).all()


def test_several_models_and_several_labels(tmp_path):
    data = Images("multilabel")
    run = mined(
        tmp_path / "run", data, trained(data, 0), trained(data, 1),
        task="multilabel", keep_logits=True, keep_features="dense",
    )  # fmt: skip
    found = analyze(run, dataset=data, progress=False)
    assert "counts" in found.tables
    assert found.facts["definition"] == DEFAULT_DEFINITIONS["multilabel"]
    assert found.facts["models"] == 2
    what = set(found.tables["stability"]["what"].to_pylist())
    assert {"level", "model", "definition"} == what
    doubtful = np.argsort(-found.samples["label_in_doubt"].to_numpy(zero_copy_only=False))
    assert len(set(doubtful[:4]) & set(Images.wrong)) >= 3


def test_a_run_of_embeddings_without_labels(tmp_path, data):
    run = mined(tmp_path / "run", data, network(), task="embedding")
    found = analyze(run)
    assert set(found.tables) == {"stability", "subgroups"}
    assert found.samples["label_in_doubt"].null_count == N


def test_against_random_masks(tmp_path, data):
    model = trained(data)
    runs = []
    for method in ("l1", "random"):
        masks = fastpie.prune(model, [0.3, 0.9], method=method, seed=0)
        dual = fastpie.DualModel(model, masks)
        runs.append(fastpie.mine(dual, data, tmp_path / method, keep_logits=True, progress=False))
    found = analyze(runs[0], control=runs[1], definition="js")
    assert "control" in found.tables["stability"]["what"].to_pylist()
    shares = found.facts["control"]
    assert shares["own"] is None or 0 <= shares["own"] <= 1
    with pytest.raises(FastpieError, match="logits kept beside `control`"):
        analyze(mined(tmp_path / "plain", data, model), control=runs[1])


def test_what_the_training_recorded(tmp_path, data):
    model = trained(data)
    run = mined(tmp_path / "run", data, model)
    recorder = fastpie.mining.Recorder(model, data)
    recorder.step(0)
    found = analyze(run, records=recorder.result())
    assert "mean over the epochs" in found.facts["label_in_doubt"]


@pytest.mark.parametrize("compat", [None, "prunecxr"])
def test_predictions_alone(compat):
    made = multilabel_set(3, samples=400, classes=6, models=2, sparsities=[0.5, 0.9])
    predictions = Predictions.of_arrays(
        made.dense, made.pruned, [0.5, 0.9], task="multilabel", labels=made.labels
    )
    found = analyze_predictions(predictions, compat=compat)
    assert found.facts["sparsity"] == 0.9
    assert len(found.facts["pie_rows"]) == 20
    dense, pruned = made.dense, made.pruned[:, 1]
    if compat:
        dense, pruned = (x.astype(np.float32) for x in (dense, pruned))
    rows = fastpie.pie((dense, pruned), compat=compat)
    assert found.facts["pie_rows"] == rows.tolist()
    assert found.samples["sample_id"].to_pylist()[:2] == ["0", "1"]
    assert sum(found.samples["pie"].to_pylist()) == 20
    unlabelled = Predictions.of_arrays(made.dense, made.pruned, [0.5, 0.9], task="multilabel")
    assert set(analyze_predictions(unlabelled).tables) == {"stability"}


def test_no_run(tmp_path):
    with pytest.raises(FastpieError, match="Expected a run folder"):
        analyze(tmp_path / "nothing")
