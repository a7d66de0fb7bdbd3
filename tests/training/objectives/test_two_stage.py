from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import WeightedRandomSampler

from fastpie import _extras
from fastpie.errors import FastpieError
from fastpie.training.criteria.criterion import criterion
from fastpie.training.objectives.metric_losses import SampleMetricLoss
from fastpie.training.objectives.objective import TrainBatch
from fastpie.training.objectives.two_stage import (
    HeadRetraining,
    MetricLearning,
    class_balanced_draw_weights,
)

losses = pytest.importorskip("pytorch_metric_learning.losses")
reducers = pytest.importorskip("pytorch_metric_learning.reducers")


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.embed(x)))


def batch_of(n: int = 12) -> TrainBatch:
    return TrainBatch(torch.randn(n, 1, 6, 6), torch.arange(n) % 3, [str(i) for i in range(n)])


MANY: list[Any] = [
    losses.TripletMarginLoss(margin=0.3),
    losses.ContrastiveLoss(),
    losses.NTXentLoss(),
    losses.MultiSimilarityLoss(),
    losses.SupConLoss(),
    losses.NormalizedSoftmaxLoss(3, 5),
    losses.ProxyNCALoss(3, 5, softmax_scale=2),
    losses.ProxyAnchorLoss(3, 5),
    losses.ArcFaceLoss(3, 5),
    losses.MarginLoss(),
    losses.NPairsLoss(),
    losses.TripletMarginLoss(reducer=reducers.ThresholdReducer(high=0.2)),
    losses.TripletMarginLoss(reducer=reducers.MeanReducer()),
]


@pytest.mark.parametrize("loss", MANY, ids=lambda loss: type(loss).__name__)
def test_the_mean_is_the_librarys(loss: nn.Module) -> None:
    """And so is its gradient, that of the loss's own parameters included."""
    embeddings = torch.randn(14, 5, requires_grad=True)
    labels = torch.randint(3, (14,))
    labels[:3] = torch.arange(3)
    ours = SampleMetricLoss(loss)
    found = ours(embeddings, labels)
    assert found.shape == (14,)
    wanted = loss(embeddings, labels)
    torch.testing.assert_close(found.mean(), wanted.reshape(()))
    for mine, theirs in (
        (embeddings, embeddings),
        *zip(ours.loss.parameters(), loss.parameters(), strict=True),
    ):
        torch.testing.assert_close(
            torch.autograd.grad(found.mean(), mine, retain_graph=True)[0],
            torch.autograd.grad(wanted, theirs, retain_graph=True)[0],
        )


def test_triplets_belong_to_their_anchors() -> None:
    """Literally: all triplets, distances of normalised embeddings, over the count that is not 0."""
    embeddings, labels = torch.randn(7, 4), torch.tensor([0, 0, 1, 1, 1, 2, -1])
    found = SampleMetricLoss(losses.TripletMarginLoss(margin=0.2))(embeddings, labels)
    unit = functional.normalize(embeddings)
    sums, count = torch.zeros(7), 0
    for a in range(6):
        for p in range(6):
            for n in range(6):
                if a != p and labels[a] == labels[p] and labels[n] != labels[a]:
                    near, far = (unit[a] - unit[p]).norm(), (unit[a] - unit[n]).norm()
                    value = (near - far + 0.2).clamp_min(0)
                    sums[a] += value
                    count += int(value > 0)
    torch.testing.assert_close(found, sums * 7 / count)
    assert found[6] == 0


def test_elements_are_the_samples_own() -> None:
    loss = losses.NormalizedSoftmaxLoss(3, 5, temperature=0.5)
    embeddings, labels = torch.randn(6, 5), torch.tensor([0, 1, -1, 2, 1, 0])
    cosines = functional.normalize(embeddings) @ functional.normalize(loss.W, dim=0)
    known = labels >= 0
    wanted = functional.cross_entropy(cosines / 0.5, labels.clamp_min(0), reduction="none")
    found = SampleMetricLoss(loss)(embeddings, labels)
    torch.testing.assert_close(found, torch.where(known, wanted, 0) * 6 / 5)


@pytest.mark.parametrize("name", ["triplet", "prototype", "ContrastiveLoss"])
def test_both_losses_are_added(name: str) -> None:
    net, batch = Net().eval(), batch_of()
    objective = MetricLearning(net, criterion("cross_entropy"), name, weight=0.7)
    found = objective(batch)
    entropy = functional.cross_entropy(net(batch.images), batch.labels, reduction="none")
    metric = objective.metric_loss(net.embed(batch.images), batch.labels)
    torch.testing.assert_close(found, entropy + 0.7 * metric)
    objective.train()(batch).mean().backward()
    assert all((p.grad != 0).any() for p in objective.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    own = {id(p) for p in net.parameters()}
    prototypes = [p for p in objective.parameters() if id(p) not in own]
    assert [list(p.shape) for p in prototypes] == ([[6, 3]] if name == "prototype" else [])


def test_other_features_and_losses_that_are_made() -> None:
    net, batch = Net().eval(), batch_of()
    loss = losses.ContrastiveLoss()
    objective = MetricLearning(net, criterion("cross_entropy"), loss, features="stem")
    torch.testing.assert_close(
        objective(batch),
        MetricLearning(net, criterion("cross_entropy"), loss)(batch),
    )


def test_batches_without_pairs_or_labels() -> None:
    for name in ("triplet", "prototype"):
        objective = MetricLearning(Net(), criterion("cross_entropy"), name)
        batch = batch_of(4)
        batch.labels[:] = -1
        found = objective(batch)
        found.sum().backward()
        assert (found == 0).all()
        assert all((p.grad == 0).all() for p in objective.metric_loss.parameters())
        batch.labels[:] = 1
        assert objective(batch).isfinite().all()
        objective.eval()
        assert objective(batch_of(0)).shape == (0,)
        assert objective(batch_of(1)).isfinite().all()


@pytest.mark.parametrize("name", ["triplet", "prototype"])
def test_autocast(name: str) -> None:
    objective = MetricLearning(Net().eval(), criterion("cross_entropy"), name)
    batch = batch_of()
    wanted = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.3)
    found.mean().backward()


def test_the_metric_loss_draws_classes_together() -> None:
    labels = torch.arange(24) % 3
    images = torch.randn(24, 1, 6, 6) + labels.view(-1, 1, 1, 1)
    batch = TrainBatch(images, labels, [""] * 24)
    net = Net()
    objective = MetricLearning(net, criterion("cross_entropy"), "triplet", margin=0.5)

    def spread() -> float:
        unit = functional.normalize(net.eval().embed(images)).detach()
        net.train()
        distances = torch.cdist(unit, unit)
        same = labels[:, None] == labels
        return float(distances[same].mean() / distances[~same].mean())

    before = spread()
    optimizer = torch.optim.Adam(objective.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        objective(batch).mean().backward()
        optimizer.step()
    assert spread() < 0.8 * before


def test_only_the_head_is_trained() -> None:
    net, batch = Net(), batch_of()
    net.stem[0].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    asked = [p.requires_grad for p in net.parameters()]
    objective = HeadRetraining(net, criterion("cross_entropy"))
    assert not torch.equal(net.fc.weight, before["fc.weight"])
    started = net.fc.weight.detach().clone()
    optimizer = torch.optim.SGD(objective.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        objective.train()
        optimizer.zero_grad()
        objective(batch).mean().backward()
        optimizer.step()
    after = net.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == (not name.startswith("fc")), name
    assert not torch.equal(net.fc.weight, started)
    with torch.no_grad():
        torch.testing.assert_close(objective(batch), objective(batch))  # no dropout
    objective.release()
    assert [p.requires_grad for p in net.parameters()] == asked


def test_a_head_that_is_kept_or_named() -> None:
    net = Net()
    weight = net.fc.weight.detach().clone()
    HeadRetraining(net, criterion("cross_entropy"), reset=False)
    assert torch.equal(net.fc.weight, weight)
    net = Net()
    HeadRetraining(net, criterion("cross_entropy"), head="stem").train()
    assert net.stem[1].training
    assert not net.drop.training
    assert next(n for n, p in net.named_parameters() if p.requires_grad) == "stem.0.weight"
    assert not net.fc.weight.requires_grad


def test_draws_are_balanced() -> None:
    labels = torch.tensor([0] * 90 + [1] * 9 + [2] * 3 + [-1] * 5)
    weights = class_balanced_draw_weights(labels)
    assert weights.dtype is torch.float64
    assert weights[[0, 90, 99, 102]].tolist() == pytest.approx([1 / 90, 1 / 9, 1 / 3, 0])
    torch.testing.assert_close(class_balanced_draw_weights(labels.tolist()), weights)
    drawn = torch.tensor(list(WeightedRandomSampler(weights, 3000)))
    shares = torch.bincount(labels[drawn], minlength=3) / 3000
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    nan = float("nan")
    many = torch.tensor([[1, 0], [1, 1], [1, nan], [0, 0], [0, nan], [nan, nan]])
    assert class_balanced_draw_weights(many).tolist() == pytest.approx(
        [1 / 3, 1, 1 / 3, 0.5, 0.5, 0]
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: MetricLearning(Net(), criterion("focal"), "quadruplet"), "'triplet', 'prototype'"),
        (lambda: MetricLearning(Net(), criterion("focal"), "triplet", gap=1), "gap"),
        (lambda: MetricLearning(Net(), criterion("focal"), nn.MSELoss()), "MSELoss"),
        (
            lambda: MetricLearning(Net(), criterion("focal"), losses.NCALoss(), margin=1),
            "no options",
        ),
        (lambda: MetricLearning(Net(), criterion("focal"), weight=-1), "weight"),
        (
            lambda: MetricLearning(Net(), criterion("focal"), "prototype", features="stem"),
            "embedding_size",
        ),
        (
            lambda: MetricLearning(Net(), criterion("focal", "multilabel"))(
                TrainBatch(torch.randn(2, 1, 6, 6), torch.ones(2, 3), ["a", "b"])
            ),
            "class indices",
        ),
        (lambda: HeadRetraining(Net(), criterion("focal"), head="neck"), "'neck'"),
        (lambda: HeadRetraining(Net(), criterion("focal"), head="drop"), "none"),
        (lambda: HeadRetraining(nn.Conv2d(1, 1, 1), criterion("focal")), "`head`"),
        (lambda: class_balanced_draw_weights([-1, -1]), "known label"),
        (lambda: class_balanced_draw_weights([0.5, 1.0]), "integers"),
    ],
)
def test_bad_input(call: Any, text: str) -> None:
    with pytest.raises(FastpieError, match=text):
        call()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(_extras.importlib, "import_module", missing)
    with pytest.raises(FastpieError, match=r"pip install 'fastpie\[train\]'"):
        MetricLearning(Net(), criterion("cross_entropy"))
