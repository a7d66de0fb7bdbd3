"""The look at a few labelled samples before a run."""

import numpy as np
import pytest
import torch
from torch import nn

import fastpie
from fastpie.mining.preflight import mean_auroc, preflight


class Clusters(torch.utils.data.Dataset):
    """Three well separated classes in four dimensions."""

    def __init__(self, count=90, multilabel=False, labelled=True):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % 3
        self.x = 4 * torch.eye(4)[self.labels] + 0.1 * torch.randn(count, 4, generator=generator)
        self.multilabel, self.labelled = multilabel, labelled

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index == 5:
            raise OSError("unreadable")
        if not self.labelled:
            return self.x[index], None
        label = int(self.labels[index])
        return self.x[index], torch.eye(3)[label] if self.multilabel else label


def classifier(right=True):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 4) if right else torch.zeros(3, 4))
        model.bias.zero_()
    return fastpie.DualModel(model, fastpie.prune(model, [0.0, 0.5]))


@pytest.mark.parametrize(
    ("multilabel", "metric"), [(False, "balanced accuracy"), (True, "mean AUROC")]
)
def test_a_good_model_is_said_to_be_good(multilabel, metric):
    task = "multilabel" if multilabel else "multiclass"
    check = preflight(classifier(), Clusters(multilabel=multilabel), task=task)
    assert check["metric"] == metric
    assert check["samples"] == 89
    assert check["values"] == {"dense": 1.0, "pruned at 0": 1.0, "pruned at 0.5": 1.0}
    assert check["near_chance"] == []


def test_a_model_at_chance_is_named():
    check = preflight(classifier(right=False), Clusters(), task="multiclass")
    assert check["near_chance"] == ["dense", "pruned at 0", "pruned at 0.5"]
    assert check["chance"] == pytest.approx(1 / 3, abs=1e-4)


def test_without_labels_or_for_other_tasks_there_is_nothing_to_say():
    assert preflight(classifier(), Clusters(labelled=False), task="multiclass") is None
    assert preflight(classifier(), Clusters(), task="embedding") is None


def test_the_dual_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5)).train()
    before = {name: value.clone() for name, value in dual.state_dict().items()}
    preflight(dual, Clusters(), task="multiclass")
    assert dual.training
    assert all(torch.equal(before[name], value) for name, value in dual.state_dict().items())


def test_mean_auroc_equals_scikit_learn_and_skips_unknown():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    scores = generator.random((200, 4)).round(2)  # with ties
    labels = (generator.random((200, 4)) < 0.3).astype(float)
    labels[:, 3] = 1  # a class with one outcome
    unknown = generator.random((200, 4)) < 0.1
    expected = np.mean(
        [
            metrics.roc_auc_score(labels[~unknown[:, c], c], scores[~unknown[:, c], c])
            for c in range(3)
        ]
    )
    labels[unknown] = np.nan
    got = mean_auroc(torch.from_numpy(scores), torch.from_numpy(labels))
    assert got == pytest.approx(expected)


class HalfLabelled(Clusters):
    """Every second label is missing, and one image is of another shape."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image[:2] if index == 8 else image), (label if index % 2 else -1)


def test_missing_labels_and_odd_images_do_not_count():
    check = preflight(classifier(), HalfLabelled(), task="multiclass")
    assert check["values"]["dense"] == 1.0
    assert check["samples"] == 88


def test_a_model_that_refuses_the_images_is_named():
    model = nn.Linear(5, 3)
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    with pytest.raises(fastpie.FastpieError, match=r"take images of shape \[4\]"):
        preflight(dual, Clusters(), task="multiclass")
