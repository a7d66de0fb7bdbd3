"""cleanlab itself on runs made by the real `mine`: planted wrong labels are found, by their sample ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from fastpie.analysis import Predictions

pytest.importorskip("cleanlab")

from fastpie.integrations.cleanlab import issues, to_cleanlab

CLASSES, COUNT = 3, 90


class Net(nn.Module):
    """Reads the class off the mean of each row: confident and right, dense and pruned."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.fc = nn.Linear(9, CLASSES)
        with torch.no_grad():
            self.conv.weight.fill_(1)
            rows = torch.eye(3).repeat_interleave(3, 1)
            self.fc.weight.copy_(4 * rows + 0.01 * torch.rand(3, 9, generator=generator))
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


def images(classes):
    """Bright rows say which classes are there."""
    generator = torch.Generator().manual_seed(1)
    x = 0.1 * torch.randn(len(classes), 1, 3, 3, generator=generator)
    for image, present in zip(x, classes, strict=True):
        image[0, torch.as_tensor(present)] += 1
    return x


class Labelled(torch.utils.data.Dataset):
    def __init__(self, x, labels):
        self.x, self.labels = x, labels
        self.sample_ids = [f"s{i:03d}" for i in reversed(range(len(x)))]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.labels[index]


def mined(path, labels, present, task="multiclass", models=1, **options):
    data = Labelled(images(present), labels)
    duals = [
        fastpie.DualModel(net, fastpie.prune(net, [0.1, 0.3])) for net in map(Net, range(models))
    ]
    return fastpie.mine(
        duals[0] if models == 1 else duals, data, path, task=task, batch_size=30, backend="reference",
        recalibrate=False, keep_logits=True, progress=False, **options,
    )  # fmt: skip


def name(index):
    return f"s{COUNT - 1 - index:03d}"


def test_planted_wrong_labels_are_found(tmp_path):
    truth = np.arange(COUNT) % CLASSES
    labels = truth.copy()
    wrong = [4, 33, 71]
    labels[wrong] = (labels[wrong] + 1) % CLASSES
    run = mined(tmp_path, labels.tolist(), [[c] for c in truth])
    table = issues(run)
    assert list(table.columns) == [
        "is_label_issue",
        "label_quality",
        "given_label",
        "predicted_label",
    ]
    assert table.index.name == "sample_id"
    assert set(table.index[table.is_label_issue]) == {name(i) for i in wrong}
    assert set(table.sort_values("label_quality").index[:3]) == {name(i) for i in wrong}
    assert table.loc[name(4), "given_label"] == labels[4]
    assert table.loc[name(4), "predicted_label"] == truth[4]
    few = issues(str(tmp_path), 0.3, filter_by="low_self_confidence")
    assert set(few.index[few.is_label_issue]) <= {name(i) for i in wrong}


def test_probabilities_are_those_of_the_run_by_model_and_level(tmp_path):
    labels = [i % CLASSES for i in range(COUNT)]
    run = mined(tmp_path, labels, [[c] for c in labels], models=2)
    given, probabilities, ids = to_cleanlab(run)
    assert ids == run.table["sample_id"].to_pylist()
    assert given.tolist() == run.table["label"].to_pylist()
    dense, pruned = zip(*(member.logits() for member in run.members), strict=True)
    softmax = lambda x: torch.from_numpy(x).double().softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, np.mean([softmax(x) for x in dense], 0))
    at = to_cleanlab(run, 0.3)[1]
    np.testing.assert_allclose(at, np.mean([softmax(x[1]) for x in pruned], 0))
    assert not np.allclose(at, probabilities)
    with pytest.raises(FastpieError, match=r"0\.25"):
        to_cleanlab(run, 0.25)


def test_several_labels(tmp_path):
    present = [[i % 3] if i % 2 else [i % 3, (i + 1) % 3] for i in range(COUNT)]
    labels = torch.zeros(COUNT, CLASSES)
    for row, classes in zip(labels, present, strict=True):
        row[classes] = 1
    labels[10] = 1 - labels[10]
    labels[11, 2] = torch.nan
    run = mined(tmp_path, labels - 0.0, present, task="multilabel")
    with pytest.warns(UserWarning, match="1 of 90 samples have an unknown label"):
        given, probabilities, ids = to_cleanlab(run)
    assert len(given) == len(probabilities) == len(ids) == COUNT - 1
    assert name(11) not in ids
    assert given[ids.index(name(12))] == sorted(present[12])
    with pytest.warns(UserWarning, match="unknown"):
        table = issues(run)
    assert table.label_quality.idxmin() == name(10)
    assert table.loc[name(10), "is_label_issue"]
    assert table.loc[name(10), "given_label"] == np.flatnonzero(labels[10]).tolist()


def test_runs_that_do_not_do(tmp_path):
    labels = [i % CLASSES for i in range(COUNT)]
    net = Net()
    dual = fastpie.DualModel(net, fastpie.prune(net, 0.3))
    options = {"batch_size": 30, "backend": "reference", "recalibrate": False, "progress": False}
    data = Labelled(images([[c] for c in labels]), labels)
    with pytest.raises(FastpieError, match="logits"):
        to_cleanlab(fastpie.mine(dual, data, tmp_path / "a", **options))
    none = Predictions.of_arrays(np.full((5, 2), 0.5), np.full((5, 2), 0.5), 0.3, task="multiclass")
    with pytest.raises(FastpieError, match="Expected labels"):
        to_cleanlab(none)


def test_predictions_with_unknown_labels():
    dense = np.tile([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], (4, 1))
    labels = np.tile([0, 1, -1], 4)
    some = Predictions.of_arrays(dense, dense, 0.3, task="multiclass", labels=labels)
    with pytest.warns(UserWarning, match="4 of 12 samples have an unknown label"):
        given, probabilities, ids = to_cleanlab(some)
    assert given.tolist() == [0, 1] * 4
    assert ids == ["0", "1", "3", "4", "6", "7", "9", "10"]
    np.testing.assert_allclose(probabilities, dense[labels >= 0])
    unknown = Predictions.of_arrays(dense, dense, 0.3, task="multiclass", labels=np.full(12, -1))
    with (
        pytest.warns(UserWarning, match="12 of 12"),
        pytest.raises(FastpieError, match="known labels"),
    ):
        issues(unknown)
