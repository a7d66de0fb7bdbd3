"""Mean teacher and pseudo-labels, against literal transcriptions of their formulas."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fastpie.errors import FastpieError
from fastpie.training.objectives.objective import TrainBatch
from fastpie.training.objectives.semi_supervised import MeanTeacher, labelled
from fastpie.training.objectives.teacher_losses import consistency_loss, pseudo_label_loss


class Network(nn.Module):
    def __init__(self, classes: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.conv(x)))
        return self.fc(self.dropout(functional.adaptive_max_pool2d(x, 4).flatten(1)))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A criterion that knows nothing of unknown labels."""
    assert (labels >= 0).all()
    assert len(labels)
    return functional.cross_entropy(logits, labels, reduction="none")


def binary(logits: Tensor, labels: Tensor) -> Tensor:
    losses = functional.binary_cross_entropy_with_logits(
        logits, labels.nan_to_num(0.0), reduction="none"
    )
    return losses.where(~labels.isnan(), 0.0).mean(1)


def pixelwise(logits: Tensor, labels: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    return losses.flatten(1).mean(1)


SHAPES = [
    ("multiclass", (5, 4)),
    ("multilabel", (5, 3)),
    ("segmentation", (3, 3, 4, 2)),
    ("segmentation", (3, 1, 4, 2)),
    ("segmentation", (2, 3, 2, 3, 2)),
]


def probabilities(logits: Tensor, task: str) -> list[list[list[float]]]:
    """By sample and position: the probability of each class, or of yes and no of one."""
    result = []
    for sample in logits.flatten(2) if logits.ndim > 2 else logits[..., None]:
        places = []
        for z in sample.T.tolist():
            if task == "multilabel" or len(z) == 1:
                places.append([1 / (1 + math.exp(-v)) for v in z])
            else:
                total = sum(math.exp(v) for v in z)
                places.append([math.exp(v) / total for v in z])
        result.append(places)
    return result


class TestConsistency:
    @pytest.mark.parametrize(("task", "shape"), SHAPES)
    @pytest.mark.parametrize("distance", ["mse", "kl"])
    def test_literally(self, task: str, shape: tuple[int, ...], distance: str) -> None:
        student, teacher = torch.randn(2, *shape)
        losses = consistency_loss(student, teacher, task=task, distance=distance)
        independent = task == "multilabel" or shape[1] == 1
        for n, (places, of_teacher) in enumerate(
            zip(probabilities(student, task), probabilities(teacher, task), strict=True)
        ):
            total = 0.0
            for p, q in zip(places, of_teacher, strict=True):
                pairs = list(zip(p, q, strict=True))
                if distance == "mse":
                    total += sum((a - b) ** 2 for a, b in pairs) / len(p)
                elif independent:
                    total += sum(
                        b * math.log(b / a) + (1 - b) * math.log((1 - b) / (1 - a))
                        for a, b in pairs
                    ) / len(p)
                else:
                    total += sum(b * math.log(b / a) for a, b in pairs)
            assert losses[n].item() == pytest.approx(total / len(places), rel=1e-4)

    @pytest.mark.parametrize(("task", "shape"), SHAPES)
    @pytest.mark.parametrize("distance", ["mse", "kl"])
    def test_gradient(self, task: str, shape: tuple[int, ...], distance: str) -> None:
        student, teacher = torch.randn(2, *shape, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda s: consistency_loss(s, teacher.detach(), task=task, distance=distance),
            (student,),
        )
        teacher = teacher.detach().requires_grad_()
        consistency_loss(student, teacher, task=task, distance=distance).sum().backward()
        assert teacher.grad is None

    def test_edges(self) -> None:
        for distance in ("mse", "kl"):
            x = torch.randn(3, 4)
            assert (consistency_loss(x, x, distance=distance).abs() < 1e-6).all()
            assert consistency_loss(x[:0], x[:0], distance=distance).shape == (0,)
            assert consistency_loss(x.bfloat16(), x, distance=distance).dtype is torch.float32
            impossible = torch.tensor([[0.0, 0.0, -torch.inf, 0.0]])
            assert consistency_loss(x[:1], impossible, distance=distance).isfinite().all()
            # Far beyond where probabilities round to 0 and 1 in fp32.
            big = torch.tensor([[300.0]], requires_grad=True)
            loss = consistency_loss(big, -big, task="multilabel", distance=distance)
            assert loss.item() == pytest.approx(300.0 if distance == "kl" else 1.0)
        with pytest.raises(FastpieError, match="distance"):
            consistency_loss(x, x, distance="l1")
        with pytest.raises(FastpieError, match="task"):
            consistency_loss(x, x, task="boxes")
        with pytest.raises(FastpieError, match="one shape"):
            consistency_loss(x, x[:2])


class TestPseudoLabels:
    @pytest.mark.parametrize(("task", "shape"), SHAPES)
    def test_literally(self, task: str, shape: tuple[int, ...]) -> None:
        student, teacher = 2 * torch.randn(2, 4 * shape[0], *shape[1:])
        threshold = 0.8
        losses = pseudo_label_loss(student, teacher, threshold=threshold, task=task)
        taken = 0
        for n, (places, of_teacher) in enumerate(
            zip(probabilities(student, task), probabilities(teacher, task), strict=True)
        ):
            total = 0.0
            for p, q in zip(places, of_teacher, strict=True):
                if task == "multilabel" or shape[1] == 1:
                    for a, b in zip(p, q, strict=True):
                        if max(b, 1 - b) >= threshold:
                            total -= math.log(a if b >= 0.5 else 1 - a) / len(p)
                            taken += 1
                elif max(q) >= threshold:
                    total -= math.log(p[q.index(max(q))])
                    taken += 1
            assert losses[n].item() == pytest.approx(total / len(places), rel=1e-4, abs=1e-7)
        independent = task == "multilabel" or shape[1] == 1
        assert 0 < taken < student.numel() / (1 if independent else shape[1])

    def test_gradient(self) -> None:
        student, teacher = torch.randn(2, 6, 3, dtype=torch.float64).requires_grad_()
        for task in ("multiclass", "multilabel"):
            assert torch.autograd.gradcheck(
                lambda s, task=task: pseudo_label_loss(
                    s, teacher.detach(), threshold=0.6, task=task
                ),
                (student,),
            )

    def test_edges(self) -> None:
        x = torch.randn(4, 3)
        everything = pseudo_label_loss(x, x, threshold=0.0)
        expected = functional.cross_entropy(x, x.argmax(1), reduction="none")
        torch.testing.assert_close(everything, expected)
        assert pseudo_label_loss(x, x, threshold=1.0).tolist() == [0] * 4
        assert pseudo_label_loss(x[:0], x[:0]).shape == (0,)
        with pytest.raises(FastpieError, match="threshold"):
            pseudo_label_loss(x, x, threshold=0.4, task="multilabel")


def batch_of(count: int = 8, known: int = 4, hard: Tensor | None = None) -> TrainBatch:
    labels = torch.arange(count) % 4
    labels[known:] = -1
    images = torch.randn(count, 1, 8, 8)
    return TrainBatch(images, labels, [str(i) for i in range(count)], hard)


def trained(objective: MeanTeacher, steps: int = 3) -> MeanTeacher:
    optimizer = torch.optim.SGD(objective.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(batch_of()).mean().backward()
        optimizer.step()
        objective.after_step()
    return objective


class TestTeacher:
    def test_is_the_average(self) -> None:
        objective = MeanTeacher(Network(dropout=0.3), cross_entropy, decay=0.8)
        optimizer = torch.optim.SGD(objective.parameters(), 0.3)
        expected: dict[str, Tensor] = {}
        for t in range(12):
            objective(batch_of()).mean().backward()
            optimizer.step()
            objective.after_step()
            alpha = min(0.8, 1 - 1 / (t + 1))
            for name, value in objective.model.state_dict().items():
                value = value.double().clone()
                old = expected.get(name, value)
                expected[name] = alpha * old + (1 - alpha) * value
                if name == "bn.num_batches_tracked":
                    expected[name] = value
        state = objective.teacher.module.state_dict()
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
            same = torch.equal(value, objective.model.state_dict()[name])
            assert same == (name == "bn.num_batches_tracked")

    def test_is_not_trained(self) -> None:
        objective = MeanTeacher(Network(), cross_entropy).train()
        assert objective.model.training
        assert not any(m.training for m in objective.teacher.modules())
        objective(batch_of()).sum().backward()
        assert all(p.grad is not None for p in objective.model.parameters())
        before = copy.deepcopy(objective.teacher.state_dict())
        assert not any(p.requires_grad for p in objective.teacher.parameters())
        torch.optim.SGD(objective.parameters(), 0.1, weight_decay=0.1).step()
        for name, value in objective.teacher.state_dict().items():
            assert torch.equal(value, before[name])

    def test_state_goes_round(self, tmp_path: Path) -> None:
        objective = trained(MeanTeacher(Network(), cross_entropy, decay=0.5))
        torch.save(objective.state_dict(), tmp_path / "state.pt")
        again = MeanTeacher(Network(), cross_entropy, decay=0.5)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        batch = batch_of()
        assert torch.equal(again(batch), objective(batch))
        for one in (objective, again):
            with torch.no_grad():
                one.model.fc.weight.zero_()
            one.after_step()
        for name, value in objective.state_dict().items():
            assert torch.equal(value, again.state_dict()[name])

    def test_distributed(self, tmp_path: Path) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
        )
        try:
            alone = MeanTeacher(Network(), cross_entropy, threshold=0.3)
            wrapped = copy.deepcopy(alone)
            parallel = DistributedDataParallel(wrapped)
            for known in (4, 0, 8):  # a rank may have no labels in a batch
                batch = batch_of(known=known)
                for module, objective in ((alone, alone), (parallel, wrapped)):
                    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
                    optimizer.zero_grad()
                    module(batch).mean().backward()
                    optimizer.step()
                    objective.after_step()
        finally:
            torch.distributed.destroy_process_group()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(value, wrapped.state_dict()[name], msg=name)


class TestLosses:
    def test_literally(self) -> None:
        objective = MeanTeacher(
            Network(),
            cross_entropy,
            weight=3.0,
            ramp_up=4,
            threshold=0.3,
            pseudo_weight=0.5,
            hard_weight=2.0,
        )
        trained(objective)
        objective.begin_epoch(2)
        hard = torch.tensor([True, False] * 4)
        batch = batch_of(8, 4, hard)
        weak, strong = batch.images, batch.images + torch.randn(8, 1, 8, 8)
        batch.images = (weak, strong)
        losses = objective(batch)
        student, teacher = objective.model(strong), objective.teacher.module(weak)
        p, q = student.softmax(1), teacher.softmax(1)
        for i in range(8):
            expected = 3.0 * math.exp(-5 * 0.25) * (p[i] - q[i]).square().mean()
            if i < 4:
                expected = expected - p[i, batch.labels[i]].log()
            else:
                if q[i].max() >= 0.3:
                    expected = expected - 0.5 * p[i, q[i].argmax()].log()
                if hard[i]:
                    expected = expected * 3
            torch.testing.assert_close(losses[i], expected)
        assert (q[4:].amax(1) >= 0.3).any()

    def test_ramp(self) -> None:
        objective = MeanTeacher(Network(), cross_entropy, weight=2.0, ramp_up=4)
        weights = []
        for epoch in range(7):
            objective.begin_epoch(epoch)
            weights.append(objective.consistency_weight())
        assert weights[0] == pytest.approx(2 * math.exp(-5))
        assert weights[1] == pytest.approx(2 * math.exp(-5 * 0.75**2))
        assert weights[4:] == [2.0] * 3
        assert MeanTeacher(Network(), cross_entropy, ramp_up=0).consistency_weight() == 1.0

    def test_which_are_labelled(self) -> None:
        assert labelled(torch.tensor([0, -1, 3]), 3).tolist() == [True, False, True]
        nan = torch.nan
        rows = torch.tensor([[nan, nan], [nan, 0.0], [1.0, 0.0]])
        assert labelled(rows, 3).tolist() == [False, True, True]
        masks = torch.full((2, 4, 4), -1)
        masks[1, 2, 2] = 0
        assert labelled(masks, 2).tolist() == [False, True]
        assert labelled(masks.float().masked_fill(masks < 0, nan), 2).tolist() == [False, True]
        assert labelled(torch.zeros(2, 4, 4, dtype=torch.bool), 2).all()
        assert not labelled(None, 2).any()
        assert labelled(torch.zeros(0, 4), 0).shape == (0,)
        for wrong in ([1, 2], torch.zeros(3)):
            with pytest.raises(FastpieError, match="labels"):
                labelled(wrong, 2)

    def test_multilabel(self) -> None:
        objective = MeanTeacher(Network(3), binary, task="multilabel", ramp_up=0, distance="kl")
        with torch.no_grad():
            objective.model.fc.weight.mul_(2)
        batch = batch_of()
        batch.labels = torch.randint(0, 2, (8, 3)).float()
        batch.labels[5:] = torch.nan
        batch.labels[0, 1] = torch.nan
        losses = objective(batch)
        student, teacher = objective.model(batch.images), objective.teacher(batch.images)
        expected = consistency_loss(student, teacher, task="multilabel", distance="kl")
        expected[:5] = expected[:5] + binary(student[:5], batch.labels[:5])
        torch.testing.assert_close(losses, expected)

    @pytest.mark.parametrize("known", [0, 2, 4])
    def test_segmentation_under_autocast(self, known: int) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        objective = MeanTeacher(model, pixelwise, task="segmentation", threshold=0.5, ramp_up=0)
        labels = torch.randint(0, 3, (4, 8, 8))
        labels[known:] = -1
        batch = TrainBatch(torch.randn(4, 1, 8, 8), labels, list("abcd"))
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(batch)
        assert losses.dtype is torch.float32
        losses.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        full = objective(batch)
        torch.testing.assert_close(losses, full, rtol=0.05, atol=0.02)

    def test_no_labels_and_refusals(self) -> None:
        objective = MeanTeacher(Network(), cross_entropy)
        batch = batch_of(known=0)
        expected = objective(batch)
        batch.labels = None
        assert torch.equal(objective(batch), expected)
        batch.images = (batch.images,) * 3
        with pytest.raises(FastpieError, match="pair"):
            objective(batch)
        options: list[dict[str, Any]] = [
            {"task": "boxes"},
            {"distance": "l1"},
            {"decay": 1.0},
            {"threshold": 1.5},
            {"weight": -1.0},
            {"pseudo_weight": math.nan},
            {"hard_weight": math.inf},
            {"ramp_up": -1},
        ]
        for option in options:
            with pytest.raises(FastpieError, match=next(iter(option))):
                MeanTeacher(Network(), cross_entropy, **option)


def test_learns_from_a_hundred_labels() -> None:
    """Only that it learns: the teacher reads most digits that it was never shown."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]
    truth = torch.from_numpy(digits.target)
    order = torch.randperm(len(truth))
    train, test = order[:1200], order[1200:]
    labels = truth.clone()
    labels[train[100:]] = -1
    objective = MeanTeacher(
        Network(10), cross_entropy, decay=0.9, weight=10.0, ramp_up=3, threshold=0.95
    )
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    for epoch in range(6):
        objective.begin_epoch(epoch)
        # Every batch has labelled and unlabelled samples.
        of_labelled = train[:100][torch.randint(100, (18, 32))]
        unlabelled = train[100:][torch.randperm(1100)][:1080].reshape(18, 60)
        for rows in torch.cat([of_labelled, unlabelled], 1):
            weak = images[rows]
            strong = weak + 0.1 * torch.randn_like(weak)
            batch = TrainBatch((weak, strong), labels[rows], [str(i) for i in rows.tolist()])
            optimizer.zero_grad()
            objective(batch).mean().backward()
            optimizer.step()
            objective.after_step()
    with torch.no_grad():
        right = objective.teacher(images[test]).argmax(1) == truth[test]
    assert right.float().mean() > 0.7
