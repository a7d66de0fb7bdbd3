from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fastpie.dual.grad_cam import feature_maps_of, grad_cam
from fastpie.errors import FastpieError
from fastpie.scores.boxes import boxes_of_masks, masks_of_boxes
from fastpie.training.criteria.criterion import criterion
from fastpie.training.objectives.care import CARE, attention_loss, min_max_map
from fastpie.training.objectives.lesion_boxes import saliency_boxes, segmentation_boxes
from fastpie.training.objectives.objective import TrainBatch

NONE = float("nan")


class Net(nn.Module):
    """A CNN whose Grad-CAM weights depend on the image: the head is not linear."""

    def __init__(self, dims: int = 2, inplace: bool = False) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.features = nn.Sequential(
            conv(2, 4, 3, stride=2, padding=1), nn.Tanh(), conv(4, 5, 3, padding=1)
        )
        self.relu = nn.ReLU(inplace=inplace)
        self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.features(x)).flatten(2).mean(2))


def batch_of(n: int = 6, size: tuple[int, ...] = (9, 12), **extra: Any) -> TrainBatch:
    images = torch.randn(n, 2, *size, dtype=torch.float64)
    labels = torch.tensor([0, 2, 3, 3, 2, 1, 3, 0])[:n]
    return TrainBatch(images, labels, [str(i) for i in range(n)], extra=extra)


BOXES = torch.tensor(
    [[1, 1, 5, 5], [2, 0, 9, 3], [0, 3, 4, 9], [NONE] * 4, [5, 2, 11, 7], [0, 0, 4, 4]],
    dtype=torch.float64,
)


def literal(
    net: Net, batch: TrainBatch, rare: tuple[int, ...], alpha: float, tau: float, second: bool
) -> Tensor:
    """The formula of the paper and the published code, image by image; 2D, boxes of whole pixels."""
    maps = net.features(batch.images)
    logits = net.head(functional.relu(maps).mean((2, 3)))
    height, width = batch.images.shape[2:]
    total = torch.zeros((), dtype=torch.float64)
    entropy = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(batch.labels.tolist()):
        entropy = entropy - (logits[i].exp() / logits[i].exp().sum())[label].log() / len(batch)
        box = batch.extra["box"][i]
        if label not in rare or box.isnan().any():
            continue
        (slope,) = torch.autograd.grad(
            logits[i, label], maps, retain_graph=True, create_graph=second
        )
        cam = torch.zeros(maps.shape[2:], dtype=torch.float64)
        for k in range(maps.shape[1]):
            cam = cam + slope[i, k].mean() * maps[i, k]
        cam = cam - cam.min()
        cam = cam / cam.max()
        cam = functional.interpolate(cam[None, None], (height, width), mode="bilinear")[0, 0]
        inner = torch.zeros(height, width, dtype=torch.float64)
        x0, y0, x1, y1 = (int(v) for v in box)
        inner[y0:y1, x0:x1] = 1
        inside = (cam * inner).sum()
        if inside > tau:
            inside = torch.tensor(tau, dtype=torch.float64)
        total = total - inside + (cam * (1 - inner)).sum()
    return alpha * total + (1 - alpha) * entropy


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("tau", [0.5, 9.0])
def test_against_the_formula(second: bool, tau: float) -> None:
    net, batch = Net().double(), batch_of(box=BOXES)
    wanted = literal(net, batch, (2, 3), 0.3, tau, second)
    slopes = torch.autograd.grad(wanted, list(net.parameters()))
    objective = CARE(
        net,
        criterion("cross_entropy"),
        layer="features",
        rare_classes=[3, 2],
        alpha=0.3,
        tau=tau,
        second_order=second,
    )
    losses = objective(batch)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), wanted)
    losses.mean().backward()
    for parameter, slope in zip(net.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope)


def test_second_order_differs() -> None:
    batch, net = batch_of(box=BOXES), Net().double()
    slopes = []
    for second in (False, True):
        objective = CARE(
            net,
            criterion("cross_entropy"),
            layer="features",
            rare_classes=[2, 3],
            alpha=1,
            second_order=second,
        )
        slopes.append(torch.autograd.grad(objective(batch).sum(), net.head[0].weight)[0])
    assert (slopes[0] == 0).all()  # the weights are constants, and the maps lie before the head
    assert (slopes[1] != 0).any()


def test_each_sample_has_its_own_loss() -> None:
    net, batch = Net().double(), batch_of(box=BOXES)
    options: dict[str, Any] = {"layer": "features", "rare_classes": [2, 3], "alpha": 0.3}
    losses = CARE(net, criterion("cross_entropy"), reduction="mean", **options)(batch)
    summed = CARE(net, criterion("cross_entropy"), **options)(batch)
    plain = 0.7 * functional.cross_entropy(net(batch.images), batch.labels, reduction="none")
    torch.testing.assert_close(summed - plain, 6 * (losses - plain))
    attended = (losses - plain).abs() > 1e-6
    assert attended.tolist() == [False, True, True, False, True, False]
    for i in range(6):
        one = TrainBatch(
            batch.images[i : i + 1], batch.labels[i : i + 1], ["0"], extra={"box": BOXES[i : i + 1]}
        )
        alone = CARE(net, criterion("cross_entropy"), **options)(one)
        torch.testing.assert_close(alone, losses[i : i + 1])


def test_slopes_of_the_loss_and_the_map() -> None:
    inner = torch.rand(3, 5, 6) < 0.5
    cam = torch.rand(3, 5, 6, dtype=torch.float64, requires_grad=True)
    for tau, by_area in ((0.5, False), (100.0, False), (0.9, True)):
        assert torch.autograd.gradcheck(
            lambda c, t=tau, a=by_area: attention_loss(c, inner.double(), t, by_area=a), cam
        )
    raw = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: min_max_map(c, (8, 9)), raw)


def test_by_area() -> None:
    cam, inner = torch.rand(4, 7, 7, dtype=torch.float64), torch.rand(4, 7, 7) < 0.4
    inner[0] = True
    found = attention_loss(cam, inner.double(), 0.5, by_area=True)
    for i in range(4):
        inside = min(cam[i][inner[i]].mean().item(), 0.5)
        outside = cam[i][~inner[i]].mean().item() if i else 0
        assert found[i].item() == pytest.approx(outside - inside)


def test_constant_maps_cost_nothing() -> None:
    cam = torch.full((2, 3, 3), 4.0, requires_grad=True)
    scaled = min_max_map(cam, (6, 6))
    scaled.sum().backward()
    assert (scaled == 0).all()
    assert (cam.grad == 0).all()


def test_the_map_moves_into_the_box_and_the_network_is_as_before() -> None:
    """Two places tell the class, one of them in the box; only CARE makes the network prefer it."""
    labels = torch.arange(8) % 4
    images = 0.3 * torch.randn(8, 2, 16, 16)
    signal = (labels - 1.5).view(-1, 1, 1)
    images[:, 0, 2:7, 2:7] += signal + 3
    images[:, 1, 8:14, 8:14] += signal + 3
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(8, 4)
    batch = TrainBatch(images, labels, [""] * 8, extra={"box": boxes})
    blank = Net()

    def trained(alpha: float) -> tuple[Net, float]:
        """The network, and how much of the map is in the box."""
        net = copy.deepcopy(blank)
        objective = CARE(
            net,
            criterion("cross_entropy"),
            layer="features",
            rare_classes=[0, 1, 2, 3],
            alpha=alpha,
            start_epoch=1,
            by_area=True,
            second_order=True,
            reduction="mean",
        )
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for epoch in range(61):
            objective.begin_epoch(epoch)
            loss = objective(batch).mean()
            if epoch == 0:
                torch.testing.assert_close(loss, functional.cross_entropy(net(images), labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.after_step()
        with feature_maps_of(net, "features") as seen:
            score = net(images).gather(1, labels[:, None]).sum()
        cam = min_max_map(grad_cam(score, seen[0]), (16, 16)).detach()
        return net, float(cam[:, :8, :8].sum() / cam.sum())

    _, plain = trained(0.0)
    net, attending = trained(0.5)
    assert attending > plain + 0.2
    assert [type(m) for m in net.modules()] == [type(m) for m in blank.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert list(net.state_dict()) == list(blank.state_dict())


def test_volumes() -> None:
    net = Net(3).double()
    size = (6, 8, 10)
    boxes = torch.tensor([[1, 0, 2, 7, 4, 5], [NONE] * 6, [0, 1, 0, 3, 8, 6], [0] * 6])
    batch = batch_of(4, size, box=boxes)
    objective = CARE(net, criterion("cross_entropy"), layer="features", rare_classes=[0, 2, 3])
    losses = objective(batch)
    masks = torch.zeros(4, *size)
    masks[0, 2:5, 0:4, 1:7] = 1
    masks[2, 0:6, 1:8, 0:3] = 1
    batch.extra = {"mask": masks}
    torch.testing.assert_close(losses, objective(batch))
    batch.extra = {"mask": masks[:, None].bool()}
    torch.testing.assert_close(losses, objective(batch))
    losses.sum().backward()
    assert net.features[0].weight.grad.isfinite().all()


def test_layers_that_are_changed_in_place_or_frozen() -> None:
    batch = batch_of(box=BOXES)
    options: dict[str, Any] = {"rare_classes": [2, 3], "alpha": 0.5}
    net = Net(inplace=True).double()
    after = CARE(net, criterion("cross_entropy"), layer="relu", **options)(batch)
    torch.testing.assert_close(
        CARE(net, criterion("cross_entropy"), layer="features", **options)(batch), after
    )
    net = Net().double()
    wanted = CARE(net, criterion("cross_entropy"), layer="features", **options)(batch)
    net.features.requires_grad_(False)
    objective = CARE(net, criterion("cross_entropy"), layer="features", **options)
    torch.testing.assert_close(objective(batch), wanted)
    with torch.no_grad():
        losses = objective(batch)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, wanted)


def test_multilabel() -> None:
    """The CAM is of the positive rare classes together; unknown labels count for nothing."""
    net, batch = Net().double(), batch_of(3, box=BOXES[:3])
    batch.labels = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [NONE, NONE, NONE, NONE]])
    options: dict[str, Any] = {"layer": "features", "rare_classes": [2, 3], "alpha": 1}
    losses = CARE(net, criterion("cross_entropy", "multilabel"), **options)(batch)
    maps = net.features(batch.images)
    logits = net.head(functional.relu(maps).mean((2, 3)))
    cam = min_max_map(grad_cam(logits[0, 2] + logits[0, 3], maps), (9, 12))
    inner = masks_of_boxes(BOXES[:1], (9, 12)).double()
    torch.testing.assert_close(
        losses, torch.cat([3 * attention_loss(cam[:1], inner), torch.zeros(2)])
    )


def test_unknown_classes_and_empty_batches() -> None:
    net = Net()
    objective = CARE(net, criterion("cross_entropy"), layer="features", rare_classes=[2, 3])
    images = torch.randn(2, 2, 9, 12)
    batch = TrainBatch(images, torch.tensor([-1, -1]), ["a", "b"], extra={"box": BOXES[:2]})
    losses = objective(batch)
    losses.sum().backward()
    assert (losses == 0).all()
    assert all((p.grad == 0).all() for p in net.parameters())
    empty = TrainBatch(images[:0], batch.labels[:0], [], extra={"box": BOXES[:0]})
    assert objective(empty).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [False, True])
def test_autocast(dtype: torch.dtype, second: bool) -> None:
    net, batch = Net(), batch_of(box=BOXES.float())
    batch.images = batch.images.float()
    objective = CARE(
        net,
        criterion("cross_entropy"),
        layer="features",
        rare_classes=[2, 3],
        alpha=0.3,
        second_order=second,
    )
    wanted = objective(batch)
    with torch.autocast("cpu", dtype):
        losses = objective(batch)
    assert losses.dtype is torch.float32
    torch.testing.assert_close(losses, wanted, rtol=0.1, atol=0.05)
    losses.mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def care_of(net: Net) -> CARE:
    return CARE(
        net,
        criterion("cross_entropy"),
        layer="features",
        rare_classes=[2, 3],
        second_order=True,
    )


def of_rank(rank: int, folder: Path) -> None:
    """A process of the test below: the gradient of its half of the batch, averaged over both."""
    torch.set_num_threads(1)
    state = torch.load(folder / "state.pt", weights_only=True)
    net = Net().double()
    net.load_state_dict(state["net"])
    half = slice(3 * rank, 3 * rank + 3)
    extra = {"box": state["boxes"][half]}
    own = TrainBatch(state["images"][half], state["labels"][half], [""] * 3, extra=extra)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    objective = nn.parallel.DistributedDataParallel(care_of(net))
    objective(own).mean().backward()
    torch.save([p.grad for p in net.parameters()], folder / f"slopes{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    net, batch = Net().double(), batch_of(box=BOXES)
    state = {"net": net.state_dict(), "images": batch.images, "labels": batch.labels}
    torch.save({**state, "boxes": BOXES}, tmp_path / "state.pt")
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in (0, 1)]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            for command in commands
        ]
        for process in running:
            stack.callback(process.kill)
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    care_of(net)(batch).mean().backward()
    for rank in (0, 1):
        slopes = torch.load(tmp_path / f"slopes{rank}.pt", weights_only=True)
        for parameter, slope in zip(net.parameters(), slopes, strict=True):
            torch.testing.assert_close(slope, parameter.grad)


def test_boxes() -> None:
    boxes = torch.tensor([[1.0, 2.0, 4.0, 3.0], [0.6, 0.0, 2.4, 9.0], [NONE] * 4, [3, 3, 3, 3]])
    wanted = torch.zeros(4, 5, 6, dtype=torch.bool)
    wanted[0, 2:3, 1:4] = True
    wanted[1, :, 1:2] = True
    inside = masks_of_boxes(boxes, (5, 6))
    assert (inside == wanted).all()
    found = boxes_of_masks(wanted)
    assert found[:2].tolist() == [[1, 2, 4, 3], [1, 0, 2, 5]]
    assert found[2:].isnan().all()
    masks = torch.zeros(1, 4, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5, 3:4] = True
    assert (masks_of_boxes(boxes_of_masks(masks), (4, 5, 6)) == masks).all()


@pytest.mark.parametrize("size", [(64, 64), (150, 100), (24, 32, 40)])
def test_saliency_finds_what_stands_out(size: tuple[int, ...]) -> None:
    """A bright patch on a repeating texture."""
    grids = torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in size], indexing="ij")
    texture = sum(torch.sin(2 * torch.pi * g / 8) for g in grids)
    images = (texture + 0.05 * torch.randn(2, 1, *size)).repeat(1, 3, *[1] * len(size))
    place = tuple(slice(s // 2, s // 2 + s // 4) for s in size)
    images[(slice(0, 1), slice(None), *place)] += 3
    images[1] = 7  # nothing
    box = saliency_boxes(images)
    found = masks_of_boxes(box, size)[0]
    wanted = torch.zeros(size, dtype=torch.bool)
    wanted[place] = True
    assert (found & wanted).sum() / (found | wanted).sum() > 0.3  # the whole image has 1/16
    assert box[1].isnan().all()


class Bright(nn.Module):
    """A segmentation model at half the size: what is brighter than a learnt level."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(2.0))
        self.classes = classes
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.seen += len(x)
        logits = functional.avg_pool2d(x.mean(1, keepdim=True), 2) - self.level
        return logits if self.classes == 1 else torch.cat([-logits, logits], 1)


@pytest.mark.parametrize("classes", [1, 2])
def test_boxes_by_a_segmentation_model(classes: int) -> None:
    images = torch.zeros(6, 2, 12, 12, dtype=torch.float64)
    images[1, :, 4:8, 2:10] = 5
    images[2, :, 0:2, 0:2] = 5
    segmenter = Bright(classes).train()
    boxes = segmentation_boxes(segmenter)(images)
    assert boxes[1].tolist() == [2, 4, 10, 8]
    assert boxes[2].tolist() == [0, 0, 2, 2]
    assert boxes[[0, 3, 4, 5]].isnan().all()
    segmenter.seen = 0
    net = Net().double()
    options: dict[str, Any] = {"layer": "features", "rare_classes": [2, 3]}
    objective = CARE(net, criterion("cross_entropy"), boxes=segmenter, **options)
    batch = batch_of(6, (12, 12))
    batch.images = images + 0.1 * torch.randn_like(images)
    losses = objective.train()(batch)
    assert segmenter.seen == 4  # of rare classes
    assert not any(p is segmenter.level for p in objective.parameters())
    batch.extra["box"] = boxes
    given = CARE(net, criterion("cross_entropy"), **options)
    torch.testing.assert_close(losses, given(batch))
    masks = masks_of_boxes(boxes, (12, 12))
    of_function = CARE(
        net, criterion("cross_entropy"), boxes=lambda some: masks[[1, 2, 3, 4]], **options
    )
    torch.testing.assert_close(losses, of_function(batch))
    salient = CARE(net, criterion("cross_entropy"), boxes="saliency", **options)
    batch.extra["box"] = saliency_boxes(batch.images)
    torch.testing.assert_close(salient(batch), given(batch))


@pytest.mark.parametrize(
    ("options", "extra", "text"),
    [
        ({"layer": "stem"}, {}, "`layer`"),
        ({"alpha": 2}, {}, "alpha"),
        ({"tau": -1}, {}, "tau"),
        ({"reduction": "none"}, {}, "reduction"),
        ({"boxes": "guess"}, {}, "boxes"),
        ({"rare_classes": []}, {}, "rare_classes"),
        ({"rare_classes": [9]}, {"box": BOXES}, "below 4, but got 9"),
        ({}, {}, "'box' or a 'mask'"),
        ({}, {"box": BOXES[:2]}, "6 images, but got 2"),
        ({}, {"box": torch.ones(6, 6)}, r"\[n, 4\]"),
        ({}, {"mask": torch.ones(6, 3, 3)}, r"\[9, 12\]"),
        ({"layer": "head"}, {"box": BOXES}, r"maps \[n, K, ...\]"),
    ],
)
def test_bad_input(options: dict[str, Any], extra: dict[str, Any], text: str) -> None:
    options = {"layer": "features", "rare_classes": [2, 3], **options}
    net = Net().double()
    with pytest.raises(FastpieError, match=text):
        CARE(net, criterion("cross_entropy"), **options)(batch_of(**extra))
    assert not any(m._forward_hooks for m in net.modules())


if __name__ == "__main__":
    of_rank(int(sys.argv[1]), Path(sys.argv[2]))
