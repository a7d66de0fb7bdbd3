"""Class activation maps of dense and pruned model, against the formulas of their papers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import DenseNet, ResNet
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fastpie import DualModel, prune
from fastpie.analysis.cam_localisation import localise
from fastpie.dual.grad_cam import grad_cam
from fastpie.errors import FastpieError
from fastpie.scores.cam import (
    CamLayers,
    cam_layers,
    class_activation_map,
    hard_overlap,
    scaled_map,
    soft_overlap,
)
from fastpie.scores.cam_disagreement import (
    CamDisagreement,
    DualMaps,
    cam_disagreement,
    dual_cams,
    dual_grad_cams,
)
from fastpie.training.objectives.objective import TrainBatch
from fastpie.training.objectives.weakly_supervised import WeaklySupervised


class Classifier(nn.Module):
    """Convolutions, BatchNorm, dropout, average pooling and a linear head; 1, 2 or 3 dimensions."""

    def __init__(self, classes: int = 4, dims: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stages = nn.Sequential(
            conv(3, 6, 3, padding=1), norm(6), nn.ReLU(inplace=True), conv(6, 8, 3, stride=2)
        )
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stages(x))
        return self.fc(self.dropout(x.flatten(2).mean(2)))


class Perceptron(Classifier):
    """A head for which CAM does not exist."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.act(self.stages(x)).mean((2, 3))).tanh())


class FullyConvolutional(nn.Module):
    """The channels before the pooling are the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.classes = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classes(self.body(x).tanh()).mean((2, 3))}


def run_to(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a module of a model gives."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, o: seen.append(o))
    model(x)
    handle.remove()
    return seen[0]


def literal_overlap(a: Tensor, b: Tensor) -> float:
    lower = higher = 0.0
    for u, v in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        lower, higher = lower + min(u, v), higher + max(u, v)
    return lower / higher if higher > 0 else 1.0


class TestFindsLayers:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_of_own_network(self, dims: int) -> None:
        model = Classifier(dims=dims)
        x = torch.randn(2, 3, *(9,) * dims)
        before = copy.deepcopy(model.state_dict())
        assert cam_layers(model, x) == CamLayers("act", "fc")
        assert model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])

    def test_of_monai(self) -> None:
        resnet = ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 8], n_input_channels=1, num_classes=3)
        assert cam_layers(resnet, torch.randn(1, 1, 32, 32, 32)) == CamLayers("layer4", "fc")
        dense = DenseNet(2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2), bn_size=2)
        layers = cam_layers(dense, torch.randn(2, 1, 32, 32))
        assert layers == CamLayers("class_layers.relu", "class_layers.out")

    def test_relu_that_is_no_module(self) -> None:
        model = Classifier()
        model.act = nn.Identity()

        def forward(x: Tensor) -> Tensor:
            return model.fc(functional.relu(model.stages(x)).mean((2, 3)))

        model.forward = forward  # type: ignore[method-assign]
        layers = cam_layers(model, torch.randn(2, 3, 9, 9))
        assert layers == CamLayers("stages", "fc", relu=True)

    def test_of_class_channels_and_none(self) -> None:
        x = torch.randn(2, 3, 9, 9)
        model = FullyConvolutional()
        assert cam_layers(model, x, output="logits") == CamLayers("classes", None)
        with pytest.raises(FastpieError, match="output"):
            cam_layers(model, x)
        with pytest.raises(FastpieError, match="Grad-CAM"):
            cam_layers(Perceptron(), x)


class TestFormulas:
    def test_cam(self) -> None:
        features, weights = torch.randn(3, 5, 4, 6), torch.randn(3, 5)
        cam = class_activation_map(features, weights)
        for n in range(3):
            by_channel = [weights[n, k] * features[n, k] for k in range(5)]
            torch.testing.assert_close(cam[n], sum(by_channel))
        half = class_activation_map(features.half(), weights.half())
        assert half.dtype is torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(class_activation_map(features, weights), cam)

    def test_is_grad_cam_times_positions(self) -> None:
        features = torch.randn(3, 5, 4, 6, requires_grad=True)
        head = nn.Linear(5, 4)
        classes = torch.tensor([2, 0, 3])
        scores = head(features.mean((2, 3)))[range(3), classes]
        cam = class_activation_map(features, head.weight[classes])
        torch.testing.assert_close(grad_cam(scores.sum(), features, retain_graph=True), cam / 24)

    def test_overlap(self) -> None:
        a, b = scaled_map(torch.randn(6, 5, 4)), scaled_map(torch.randn(6, 5, 4))
        a[4], a[5], b[5] = 0, 0, 0
        assert a.flatten(1).amax(1).tolist() == [1, 1, 1, 1, 0, 0]
        expected = [literal_overlap(u, v) for u, v in zip(a, b, strict=True)]
        torch.testing.assert_close(soft_overlap(a, b), torch.tensor(expected))
        expected = [
            literal_overlap((u > 0.2).float(), (v > 0.2).float()) for u, v in zip(a, b, strict=True)
        ]
        torch.testing.assert_close(hard_overlap(a, 3 * b), torch.tensor(expected))
        assert expected[4:] == [0, 1]
        b[0, 0, 0] = torch.nan
        assert soft_overlap(a, b)[0].isnan()
        assert hard_overlap(a, b)[0].isnan()

    def test_overlap_gradient(self) -> None:
        a, b = torch.rand(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda u, v: soft_overlap(scaled_map(u - 0.3), scaled_map(v)), (a, b)
        )

    def test_refuses(self) -> None:
        with pytest.raises(FastpieError, match="weights"):
            class_activation_map(torch.randn(2, 3, 4), torch.randn(2, 4))


class TestDualMaps:
    @pytest.mark.parametrize("sparsity", [0.6, [0.3, 0.6]])
    @pytest.mark.parametrize("dims", [2, 3])
    def test_of_a_pruned_copy(self, sparsity: Any, dims: int) -> None:
        model = Classifier(dims=dims).eval()
        masks = prune(model, sparsity)
        assert not masks["fc.weight"].all()
        dual = DualModel(model, masks, features="act")
        x, labels = torch.randn(5, 3, *(9,) * dims), torch.tensor([0, 3, -1, 1, 9])
        out = dual(x)
        maps = dual_cams(dual, out, CamLayers("act", "fc"), labels)
        top = out.dense.argmax(1)
        classes = torch.tensor([0, 3, top[2], 1, top[4]])
        assert torch.equal(maps.classes, classes)
        copies = [model]
        for level in masks.sparsities:
            copies.append(copy.deepcopy(model))
            masks.at(level).apply_(copies[-1])
        for one, cam in zip(copies, [maps.dense, *maps.pruned], strict=True):
            features = run_to(one, "act", x)
            expected = torch.einsum("nk...,nk->n...", features, one.fc.weight[classes])
            torch.testing.assert_close(cam, expected)
            # The mean of the map and the bias are the logit.
            logits = one(x)[range(5), classes]
            mean = cam.flatten(1).mean(1) + one.fc.bias[classes]
            torch.testing.assert_close(mean, logits)
        score = CamDisagreement(CamLayers("act", "fc"), dual)(out, labels)
        dense = scaled_map(maps.dense)
        expected = [
            sum(1 - literal_overlap(dense[n], scaled_map(level)[n]) for level in maps.pruned)
            / len(maps.pruned)
            for n in range(5)
        ]
        torch.testing.assert_close(score, torch.tensor(expected))
        assert (score > 0.01).any()

    def test_through_the_engine(self) -> None:
        model = Classifier().eval()
        dual = DualModel(model, prune(model, 0.6), features="act")
        x = torch.randn(4, 3, 12, 12)
        score = CamDisagreement(CamLayers("act", "fc"))
        with pytest.raises(FastpieError, match="bind"):
            score(dual(x))
        score.bind(dual)
        torch.testing.assert_close(score(dual.compile(x)(x)), score(dual(x)), rtol=1e-4, atol=1e-5)

    def test_all_ones_masks_agree(self) -> None:
        model = Classifier().eval()
        dual = DualModel(model, prune(model, 0.0), features="act")
        x = torch.randn(4, 3, 9, 9)
        for options in ({}, {"fraction": 0.2}):
            score = CamDisagreement(CamLayers("act", "fc"), dual, **options)
            assert torch.equal(score(dual(x)), torch.zeros(4))
            score = CamDisagreement("act", dual, **options)
            assert torch.equal(score(dual(x), None, x), torch.zeros(4))

    def test_several_labels(self) -> None:
        model = Classifier().eval()
        dual = DualModel(model, prune(model, 0.6), features="act")
        x = torch.randn(3, 3, 9, 9)
        out = dual(x)
        labels = torch.tensor([[1.0, 0, 1, torch.nan], [0, 0, 0, 0], [0, 0, 0, 1]])
        score = CamDisagreement(CamLayers("act", "fc"), dual, fraction=0.2)
        by_class = [score(out, torch.full((3,), c)) for c in range(4)]
        expected = torch.stack(
            [
                (by_class[0][0] + by_class[2][0]) / 2,
                by_class[int(out.dense[1].argmax())][1],
                by_class[3][2],
            ]
        )
        torch.testing.assert_close(score(out, labels), expected)

    def test_class_channels(self) -> None:
        model = FullyConvolutional().eval()
        dual = DualModel(model, prune(model, 0.5), features="classes")
        x = torch.randn(3, 3, 9, 9)
        maps = dual_cams(
            dual, dual(x), CamLayers("classes", None), torch.arange(3), output="logits"
        )
        expected = run_to(model, "classes", x)[range(3), range(3)]
        torch.testing.assert_close(maps.dense, expected)

    @pytest.mark.parametrize("sparsity", [0.5, [0.3, 0.5]])
    def test_grad_cam_of_both(self, sparsity: Any) -> None:
        model = Perceptron()
        masks = prune(model, sparsity)
        dual = DualModel(model, masks)
        x = torch.randn(3, 3, 9, 9)
        labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
        maps = dual_grad_cams(dual, x, "act", labels)
        assert maps.rows.tolist() == [0, 0, 1, 2, 2]
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        pruned = copy.deepcopy(model).eval()
        masks.apply_(pruned)
        for one, cams in ((copy.deepcopy(model).eval(), maps.dense), (pruned, maps.pruned[-1])):
            for n, c, cam in zip(maps.rows, maps.classes, cams, strict=True):
                features = run_to(one, "stages", x[n : n + 1]).relu().detach().requires_grad_()
                logit = one.fc(one.hidden(features.mean((2, 3))).tanh())[0, c]
                (slope,) = torch.autograd.grad(logit, features)
                alpha = slope[0].mean((1, 2))  # Grad-CAM from its formula
                expected = sum(alpha[k] * features[0, k] for k in range(8)).relu()
                torch.testing.assert_close(cam, expected)
        frozen = copy.deepcopy(dual).requires_grad_(False)
        with torch.inference_mode():
            again = dual_grad_cams(frozen, x, "act", labels)
        torch.testing.assert_close(again.dense, maps.dense)

    def test_nothing_and_nan(self) -> None:
        model = Classifier().eval()
        dual = DualModel(model, prune(model, 0.6), features="act")
        score = CamDisagreement(CamLayers("act", "fc"), dual)
        assert score(dual(torch.zeros(0, 3, 9, 9)), torch.zeros(0).long()).shape == (0,)
        x = torch.randn(2, 3, 9, 9)
        x[1] = torch.nan
        assert score(dual(x), torch.tensor([0, 0])).isnan().tolist() == [False, True]
        with pytest.raises(FastpieError, match="features"):
            dual_cams(dual, dual(x), CamLayers("stages", "fc"))
        with pytest.raises(FastpieError, match="labels"):
            score(dual(x), torch.zeros(3))
        with pytest.raises(FastpieError, match="images"):
            CamDisagreement("act", dual)(dual(x))
        for module in ("nowhere", "fc"):
            with pytest.raises(FastpieError, match="module"):
                dual_grad_cams(dual, x, module)


def batch_of(count: int, hard: Tensor | None = None) -> TrainBatch:
    labels = torch.arange(count) % 4
    return TrainBatch(torch.randn(count, 3, 9, 9), labels, [str(i) for i in range(count)], hard)


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


class TestObjective:
    def objective(self, **options: Any) -> WeaklySupervised:
        model = Classifier(dropout=options.pop("dropout", 0.0))
        return WeaklySupervised(model, losses_of, CamLayers("act", "fc"), **options)

    def test_literally(self) -> None:
        objective = self.objective(weight=0.3, sparsity=0.6)
        hard = torch.tensor([True, False, True, True, False, False])
        batch = batch_of(6, hard)
        losses = objective(batch)
        # In training mode both models normalise by the batch's own statistics.
        dense = copy.deepcopy(objective.model)
        pruned = copy.deepcopy(dense)
        objective.dual.masks.apply_(pruned)
        cams = [
            torch.einsum("nkhw,nk->nhw", run_to(m, "act", batch.images), m.fc.weight[batch.labels])
            for m in (dense, pruned)
        ]
        overlap = soft_overlap(scaled_map(cams[0]), scaled_map(cams[1].detach()))
        expected = losses_of(dense(batch.images), batch.labels) + 0.3 * hard * (1 - overlap)
        torch.testing.assert_close(losses, expected)
        assert ((1 - overlap) > 0.01).any()
        losses.sum().backward()
        expected.sum().backward()
        for (name, p), q in zip(
            objective.model.named_parameters(), dense.parameters(), strict=True
        ):
            torch.testing.assert_close(p.grad, q.grad, msg=name)

    def test_distributed(self, tmp_path: Path) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
        )
        try:
            alone = self.objective()
            wrapped = copy.deepcopy(alone)
            parallel = DistributedDataParallel(wrapped)
            for hard in (None, torch.zeros(6, dtype=torch.bool)):
                batch = batch_of(6, hard)
                for module in (alone, parallel):
                    module.zero_grad()
                    module(batch).mean().backward()
                    torch.optim.SGD(module.parameters(), 0.1).step()
        finally:
            torch.distributed.destroy_process_group()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(value, wrapped.state_dict()[name], msg=name)

    def test_all_are_hard_without_attention(self) -> None:
        objective = self.objective()
        batch = batch_of(4)
        every = objective(batch)
        batch.hard = torch.ones(4, dtype=torch.bool)
        assert torch.equal(objective(batch), every)
        batch.hard = torch.zeros(4, dtype=torch.bool)
        plain = losses_of(objective.model(batch.images), batch.labels)
        torch.testing.assert_close(objective(batch), plain)

    def test_consistency_gradient(self) -> None:
        features, other = torch.rand(2, 3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.rand(3, 4, dtype=torch.float64)

        def apart(features: Tensor) -> Tensor:
            rows = torch.tensor([0, 2, 2])
            dense, pruned = (class_activation_map(f, weight) for f in (features, other.detach()))
            return cam_disagreement(DualMaps(rows, rows, dense, pruned[None]), 3)

        assert torch.autograd.gradcheck(apart, (features,))
        assert apart(features)[1] == 0

    def test_masks_follow_and_state(self) -> None:
        objective = self.objective(sparsity=0.5, every=2)
        first = objective.dual.masks["fc.weight"].clone()
        with torch.no_grad():
            objective.model.fc.weight.copy_(objective.model.fc.weight.flip(0, 1))
        objective.begin_epoch(1)
        assert torch.equal(objective.dual.masks["fc.weight"], first)
        objective.begin_epoch(2)
        assert not torch.equal(objective.dual.masks["fc.weight"], first)
        assert len({p for p, _ in objective.named_parameters()}) == len(
            list(objective.model.parameters())
        )
        other = self.objective(sparsity=0.5)
        other.load_state_dict(objective.state_dict())
        batch = batch_of(4)
        torch.testing.assert_close(other(batch), objective(batch))
        with pytest.raises(FastpieError, match="weight"):
            self.objective(weight=-1)

    def test_random_masks_are_drawn_anew_at_each_pruning(self) -> None:
        drawn = []
        for _ in range(2):
            objective = self.objective(method="random", seed=5, exclude=["fc"], every=2)
            drawn.append([objective.dual.masks])
            for epoch in range(4):
                objective.begin_epoch(epoch)
                drawn[-1].append(objective.dual.masks)
        start, first, second, third, fourth = drawn[0]
        assert start == first == second
        assert second != third
        assert third == fourth
        assert drawn[1] == drawn[0]
        assert "fc.weight" not in start


class TestLocalise:
    def test_finds_a_bright_square(self) -> None:
        """A network that averages brightness: its map is the image."""

        class Brightness(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.features = nn.Conv2d(1, 1, 1, bias=False)
                self.fc = nn.Linear(1, 2)
                nn.init.ones_(self.features.weight)
                with torch.no_grad():
                    self.fc.weight.copy_(torch.tensor([[-1.0], [1.0]]))

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.features(functional.avg_pool2d(x, 2)).mean((2, 3)))

        images = torch.zeros(3, 1, 32, 40)
        images[0, 0, 8:16, 20:30] = 1
        images[1, 0, 8:16, 20:30] = 1
        images[1, 0, 28:30, 2:4] = 0.9
        model = Brightness().train()
        for layers in (CamLayers("features", "fc"), "features"):
            found = localise(model, images, layers, torch.tensor([1, 1, 1]), fraction=0.5)
            assert model.training
            assert found.maps.shape == (3, 32, 40)
            assert found.maps.max() == 1
            for n in range(2):
                np.testing.assert_array_equal(found.masks[n], images[0, 0].numpy() > 0)
                assert found.boxes[n].tolist() == [20, 8, 30, 16]
            assert not found.masks[2].any()
            assert np.isnan(found.boxes[2]).all()
            expected = model(images)[:, 1].detach()
            torch.testing.assert_close(torch.from_numpy(found.logits), expected)
        both = localise(model, images, CamLayers("features", "fc"), size=(16, 20), largest=False)
        assert both.boxes.shape == (3, 4)
        assert both.classes.tolist() == model(images).argmax(1).tolist()

    def test_volumes_and_emptiness(self) -> None:
        model = Classifier(dims=3)
        layers = CamLayers("act", "fc")
        found = localise(model, torch.randn(2, 3, 8, 9, 10), layers)
        assert found.maps.shape == (2, 8, 9, 10)
        assert found.boxes.shape == (2, 6)
        none = localise(model, torch.randn(0, 3, 8, 9, 10), layers)
        assert none.boxes.shape == (0, 6)
        with pytest.raises(FastpieError, match="size"):
            localise(model, torch.randn(2, 3, 8, 9, 10), layers, size=(4, 4))
        with pytest.raises(FastpieError, match="classes"):
            localise(model, torch.randn(2, 3, 8, 9, 10), layers, [0])
