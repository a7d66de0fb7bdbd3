"""`fastpie.DualModel` on the networks that users have."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fastpie
from fastpie import DualModel
from networks import MONAI, Network, masked_copy

pytest.importorskip("monai", reason="MONAI is an extra of the tests")

networks = pytest.mark.parametrize("network", MONAI, ids=lambda n: n.name)


def assert_close(got: object, want: object, tolerance: float = 1e-5) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@networks
def test_dense_and_pruned_are_those_of_separate_models(network: Network) -> None:
    model, x = network.build(), network.inputs(2)
    masks = fastpie.prune(model, [0.3, 0.8])
    with torch.no_grad():
        out = DualModel(model, masks)(*x)
        assert_close(out.dense, model(*x))
        for index, sparsity in enumerate((0.3, 0.8)):
            want = masked_copy(model, masks.at(sparsity))(*x)
            assert_close(pytree.tree_map(lambda t, i=index: t[i], out.pruned), want)


@networks
def test_all_ones_masks_give_zero_disagreement_bit_for_bit(network: Network) -> None:
    model, x = network.build(), network.inputs(2)
    dual = DualModel(model, fastpie.prune(model, 0.0))
    with torch.no_grad():
        for mode in (False, True):
            out = dual.train(mode)(*x)
            assert_close(out.pruned, out.dense, tolerance=0)
    dense, pruned = (pytree.tree_leaves(o)[0] for o in out[:2])
    task = "multiclass" if dense.ndim == 2 else "segmentation"
    scores = fastpie.disagreement(dense, pruned, task=task)
    worst = scores["js"].max() if task == "multiclass" else (1 - scores["iou_soft"]).max()
    assert worst == 0


@networks
def test_gradients_are_those_of_both_models(network: Network) -> None:
    model, x = network.build(), network.inputs(2)
    masks = fastpie.prune(model, 0.5)
    dense, pruned = copy.deepcopy(model), masked_copy(model, masks)
    out = DualModel(model, masks)(*x)
    for outputs in (out[:2], [dense(*x)], [pruned(*x)]):
        sum(pytree.tree_leaves(o)[0].square().mean() for o in outputs).backward()
    of_pruned = dict(pruned.named_parameters())
    reached = 0
    for name, parameter in dense.named_parameters():
        got = model.get_parameter(name).grad
        assert (got is None) == (parameter.grad is None), name
        if got is None:
            continue
        reached += 1
        gradient = of_pruned[name].grad
        want = parameter.grad + (gradient * masks[name] if name in masks else gradient)
        scale = want.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(got / scale, want / scale, rtol=1e-3, atol=1e-4)
    assert reached


@networks
def test_recalibration_replaces_statistics_and_keeps_the_model(network: Network) -> None:
    model = network.build().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dual = DualModel(model, fastpie.prune(model, 0.5))
    dual.recalibrate(network.inputs(4)[0] for _ in range(1))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(module.training for module in model.modules())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    changed = [
        not torch.equal(own, model.get_buffer(name))
        for name, own in dual.statistics(0).items()
        if name.endswith("running_var")
    ]
    assert len(changed) == len(norms)
    assert all(changed)
    with torch.no_grad():
        out = dual.eval()(*network.inputs(2))
    assert all(t.isfinite().all() for t in pytree.tree_leaves(out.pruned))
