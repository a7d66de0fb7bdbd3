"""Grad-CAM of both models, against a computation by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from fastpie.report.heatmaps import heat_map


class Network(nn.Module):
    """Feature maps under BatchNorm, then something that pools, then a classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 5, 3)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = self.act(self.last(self.norm(self.first(x)).relu()))
        return self.head(self.drop(self.pool(x)).flatten(1))


def network(seed=0):
    torch.manual_seed(seed)
    model = Network()
    model.norm.running_mean.normal_(0, 0.1)
    return model.eval()


IMAGE = torch.randn(1, 12, 10, generator=torch.Generator().manual_seed(1))


def by_hand(model, klass):
    """Grad-CAM after the last activation."""
    features = model.norm(model.first(IMAGE[None])).relu()
    features = model.last(features).relu().detach().requires_grad_()
    logits = model.head(model.pool(features).flatten(1))
    logits[0, klass].backward()
    weights = features.grad.mean((2, 3), keepdim=True)
    cam = (weights * features.detach()).sum(1)[0].relu()
    return (cam / cam.max()).numpy()


def test_equals_a_computation_by_hand_in_both_models():
    model = network()
    masks = fastpie.prune(model, [0.3, 0.6])
    dual = fastpie.DualModel(model, masks)
    for level in (0.3, 0.6):
        pruned = copy.deepcopy(model)
        masks.at(level).apply_(pruned)
        for klass in range(3):
            found = heat_map(dual, IMAGE, klass, sparsity=level)
            assert (found.klass, found.sparsity, found.module) == (klass, level, "act")
            np.testing.assert_allclose(found.dense, by_hand(model, klass), atol=1e-5)
            np.testing.assert_allclose(found.pruned, by_hand(pruned, klass), atol=1e-5)
            low = np.minimum(found.dense, found.pruned).sum()
            high = np.maximum(found.dense, found.pruned).sum()
            assert found.overlap == pytest.approx(low / high)
    assert heat_map(dual, IMAGE).sparsity == 0.6


def test_the_class_is_the_prediction_or_the_surest_of_several():
    model = network()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    logits = model(IMAGE[None])[0]
    assert heat_map(dual, IMAGE).klass == logits.argmax()
    assert heat_map(dual, IMAGE, [0, 2]).klass == (0 if logits[0] > logits[2] else 2)


def test_all_ones_masks_give_the_same_map_twice():
    model = network()
    masks = {"first.weight": torch.ones_like(model.first.weight, dtype=torch.bool)}
    found = heat_map(fastpie.DualModel(model, masks), IMAGE)
    np.testing.assert_array_equal(found.dense, found.pruned)
    assert found.overlap == 1


def test_another_module_can_be_named():
    model = network()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    assert heat_map(dual, IMAGE, module="first").dense.shape == (10, 8)
    assert heat_map(dual, IMAGE, module="pool").dense.shape == (2, 2)


def test_a_large_map_is_averaged():
    model = network()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    found = heat_map(dual, torch.randn(1, 90, 20))
    assert found.dense.shape == (32, 16)
    assert found.dense.max() == 1


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(training):
    model = network().train(training)
    model.drop.eval()
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    before = copy.deepcopy(dual.state_dict())
    modes = [module.training for module in dual.modules()]
    heat_map(dual, IMAGE)
    assert [module.training for module in dual.modules()] == modes
    assert all(parameter.grad is None for parameter in dual.parameters())
    assert [p.requires_grad for p in model.head.parameters()] == [False, False]
    after = dual.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not module._forward_hooks for module in dual.modules())


def test_a_frozen_model_has_maps_and_no_grad_mode_does_not_matter():
    model = network()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    expected = heat_map(dual, IMAGE, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        found = heat_map(dual, IMAGE, 1)
    np.testing.assert_array_equal(found.dense, expected.dense)


def test_an_entry_of_a_dict_output():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return {"logits": self.inner(x), "other": x}

    model = Wrapped().eval()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    found = heat_map(dual, IMAGE, 1, output="logits")
    np.testing.assert_allclose(found.dense, by_hand(model.inner, 1), atol=1e-5)
    with pytest.raises(FastpieError, match="a dict with the keys"):
        heat_map(dual, IMAGE)


def test_what_cannot_be_drawn_is_told():
    model = network()
    dual = fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6]))
    with pytest.raises(FastpieError, match="classes below 3, but got 3"):
        heat_map(dual, IMAGE, 3)
    with pytest.raises(FastpieError, match="one of"):
        heat_map(dual, IMAGE, sparsity=0.5)
    with pytest.raises(FastpieError, match="no module 'nowhere'"):
        heat_map(dual, IMAGE, module="nowhere")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(120, 3))
    with pytest.raises(FastpieError, match="found none"):
        heat_map(fastpie.DualModel(flat, fastpie.prune(flat, 0.5)), IMAGE)
    pictures = nn.Sequential(nn.Conv2d(1, 3, 3))
    with pytest.raises(FastpieError, match=r"logits \[n, C\]"):
        heat_map(fastpie.DualModel(pictures, fastpie.prune(pictures, 0.5)), IMAGE)
