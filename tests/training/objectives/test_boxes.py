"""Losses and scores of regressed boxes, against MONAI's boxes and a literal transcription."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from monai.data import box_utils
from torch import Tensor, nn
from torch.nn import functional

from fastpie import DualModel, prune
from fastpie.dual import DualOutput
from fastpie.errors import FastpieError
from fastpie.training.objectives.boxes import BoxLoss, SupervisedBoxes, box_disagreement
from fastpie.training.objectives.objective import Supervised, TrainBatch


def some_boxes(count: int, sides: int = 2, **options: Any) -> Tensor:
    low = torch.rand(count, sides, **options) * 0.6
    return torch.cat([low, low + 0.1 + 0.3 * torch.rand(count, sides, **options)], 1)


class Regressor(nn.Module):
    """Class logits and a box from the corner and the size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.classes = nn.Linear(6 * 49, 3)
        self.box = nn.Linear(6 * 49, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        corner, size = self.box(x).sigmoid().chunk(2, 1)
        return self.classes(x), torch.cat([corner, corner + size], 1)


class TestLoss:
    @pytest.mark.parametrize("sides", [2, 3])
    def test_literally(self, sides: int) -> None:
        a, b = some_boxes(7, sides), some_boxes(7, sides)
        losses = BoxLoss(l1=3.0, giou=0.5, beta=0.1)(a, b)
        giou = box_utils.box_pair_giou(a, b)
        for n in range(7):
            distance = 0.0
            for u, v in zip(a[n].tolist(), b[n].tolist(), strict=True):
                d = abs(u - v)
                distance += 0.5 * d * d / 0.1 if d < 0.1 else d - 0.05
            expected = 3.0 * distance / (2 * sides) + 0.5 * (1 - giou[n].item())
            assert losses[n].item() == pytest.approx(expected, rel=1e-5)
        same = BoxLoss()(a, a)
        torch.testing.assert_close(same, torch.zeros(7), atol=1e-5, rtol=0)

    def test_gradient(self) -> None:
        a, b = some_boxes(5, dtype=torch.float64), some_boxes(5, dtype=torch.float64)
        b[2, 1] = torch.nan
        a.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: BoxLoss(beta=0.05)(x, b), (a,))
        BoxLoss()(a, b).sum().backward()
        assert a.grad is not None
        assert (a.grad[2] == 0).all()
        assert (a.grad[[0, 1, 3, 4]] != 0).any(1).all()

    def test_far_boxes_are_drawn_together(self) -> None:
        """Where boxes do not meet GIoU alone still says in which direction the true one lies."""
        a = torch.tensor([[0.0, 0.0, 0.1, 0.1]], requires_grad=True)
        BoxLoss(l1=0)(a, torch.tensor([[0.5, 0.5, 0.7, 0.7]])).sum().backward()
        assert a.grad is not None
        assert (a.grad[0, 2:] < 0).all()

    def test_unknown_and_odd_input(self) -> None:
        a = torch.full((2, 4), torch.nan, requires_grad=True)
        b = some_boxes(2)
        b[0] = torch.nan
        losses = BoxLoss()(a, b)
        assert losses[0] == 0
        assert losses[1].isnan()
        assert BoxLoss()(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
        half = BoxLoss()(some_boxes(3).bfloat16(), some_boxes(3))
        assert half.dtype is torch.float32
        for true in (torch.zeros(2, 6), torch.zeros(2), None):
            with pytest.raises(FastpieError, match="true boxes"):
                BoxLoss()(a, true)
        with pytest.raises(FastpieError, match="boxes"):
            BoxLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
        with pytest.raises(FastpieError, match="giou"):
            BoxLoss(giou=-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def drawn(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rectangles of a brightness that tells their class."""
    boxes, labels = some_boxes(count), torch.arange(count) % 3
    images = torch.zeros(count, 1, 16, 16)
    for image, box, label in zip(images, boxes, labels, strict=True):
        x0, y0, x1, y1 = (16 * box).round().int().tolist()
        image[0, y0:y1, x0:x1] = 1.0 + label
    return images, boxes, labels


class TestObjective:
    def test_is_the_sum(self) -> None:
        images, boxes, labels = drawn(6)
        boxes[2] = torch.nan
        model = Regressor()
        objective = SupervisedBoxes(model, cross_entropy)
        batch = TrainBatch(images, labels, list("abcdef"), extra={"box": boxes})
        logits, predicted = model(images)
        expected = cross_entropy(logits, labels) + BoxLoss()(predicted, boxes)
        assert torch.equal(objective(batch), expected)
        assert objective(batch)[2] == cross_entropy(logits, labels)[2]
        with pytest.raises(FastpieError, match="'box'"):
            objective(TrainBatch(images, labels, list("abcdef")))

    def test_boxes_alone_are_learnt(self) -> None:
        images, boxes, _ = drawn(64)
        objective = Supervised(Regressor(), BoxLoss(), output=1)
        optimizer = torch.optim.Adam(objective.parameters(), 5e-3)
        batch = TrainBatch(images, boxes, [str(i) for i in range(64)])
        first = objective(batch).mean().item()
        for _ in range(80):
            optimizer.zero_grad()
            loss = objective(batch).mean()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.4 * first


class TestScore:
    def test_of_a_dual_model(self) -> None:
        model = Regressor().eval()
        images = drawn(5)[0]
        masks = prune(model, [0.3, 0.8])
        out = DualModel(model, masks)(images)
        score = functools.partial(box_disagreement, output=1)
        iou = [box_utils.box_iou(out.dense[1], level).diagonal() for level in out.pruned[1]]
        torch.testing.assert_close(score(out), 1 - (iou[0] + iou[1]) / 2)
        assert (score(out) > 0.01).all()
        at = DualModel(model, masks.at(0.8))(images)
        torch.testing.assert_close(score(at, torch.zeros(5)), 1 - iou[1])

    def test_edges(self) -> None:
        boxes = some_boxes(3)
        other = boxes.clone()
        other[1] = torch.nan
        other[2] = 0
        score = box_disagreement(DualOutput(boxes, other, None))
        assert score[0] == 0
        assert score[1].isnan()
        assert score[2] == 1
        with pytest.raises(FastpieError, match="boxes"):
            box_disagreement(DualOutput(boxes, boxes[:2], None))
