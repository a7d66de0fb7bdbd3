"""`fastpie.DualModel` in train mode, under autocast, and when it is stored or copied."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastpie
from fastpie import DualModel, FastpieError
from networks import SMALL, Network, ResidualCNN, masked_copy

LADDER = [0.2, 0.5, 0.9]
small = pytest.mark.parametrize("network", SMALL, ids=lambda n: n.name)


def by_name(name: str) -> Network:
    return next(n for n in SMALL if n.name == name)


def equal(a: object, b: object) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(x is y or torch.equal(x, y) for x, y in pairs)


@small
def test_all_ones_masks_give_the_same_bits_in_training_too(network: Network) -> None:
    model, x = network.build().train(), network.inputs()
    dual = DualModel(model, fastpie.prune(model, 0.0))
    for _ in range(3):
        out = dual(*x)
        assert equal(out.dense, out.pruned)
    for name, own in dual.statistics(0).items():
        assert torch.equal(own, model.get_buffer(name)), name


@small
def test_training_pass_is_that_of_both_models_alone_from_one_random_state(network: Network) -> None:
    model, x = network.build().train(), network.inputs()
    masks = fastpie.prune(model, 0.5)
    dense, pruned = copy.deepcopy(model), masked_copy(model, masks)
    dual = DualModel(model, masks)
    state = torch.get_rng_state()
    wanted = []
    for single in (dense, pruned):
        torch.set_rng_state(state)
        wanted.append(single(*x))
    after_one_pass = torch.get_rng_state()
    torch.set_rng_state(state)
    out = dual(*x)
    for got, want in zip(out[:2], wanted, strict=True):
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # A dual forward draws from the generator as one forward does.
    assert torch.equal(torch.get_rng_state(), after_one_pass)
    for name, buffer in dense.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
        torch.testing.assert_close(dual.statistics(0)[name], pruned.get_buffer(name))


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_each_level_keeps_its_own_batch_statistics(momentum: float | None) -> None:
    torch.manual_seed(1)
    model = ResidualCNN(momentum).train()
    masks = fastpie.prune(model, LADDER)
    singles = [copy.deepcopy(model)] + [masked_copy(model, masks.at(s)) for s in LADDER]
    dual = DualModel(model, masks)
    for _ in range(3):
        x = torch.randn(6, 3, 8, 8)
        dual(x)
        for single in singles:
            single(x)
    for name in dual.statistics(0):
        torch.testing.assert_close(model.get_buffer(name), singles[0].get_buffer(name))
        for level, single in enumerate(singles[1:]):
            torch.testing.assert_close(dual.statistics(level)[name], single.get_buffer(name))
    dual.eval()
    out = dual(x)
    for level, single in enumerate(singles[1:]):
        torch.testing.assert_close(out.pruned[level], single.eval()(x), rtol=1e-5, atol=1e-5)


def test_dropout_removes_the_same_units_in_both_models() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False)).train()
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    dual = DualModel(model, fastpie.prune(model, [0.0, 0.2]), features="0")
    out = dual(torch.ones(8, 50))
    for level in range(2):
        assert torch.equal(out.features.dense, out.features.pruned[level])
    assert not torch.equal(dual(torch.ones(8, 50)).dense, out.dense)


def test_construction_keeps_the_mode_of_every_module() -> None:
    model = ResidualCNN().train()
    model.bn0.eval()
    before = {name: module.training for name, module in model.named_modules()}
    dual = DualModel(model, fastpie.prune(model, 0.5))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert dual.training
    dual.eval()
    assert not any(module.training for module in model.modules())


def test_frozen_batch_norm_keeps_its_statistics_in_both_models() -> None:
    model = ResidualCNN().train()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    model.bn0.eval()
    before = model.bn0.running_mean.clone()
    dual(torch.randn(4, 3, 8, 8) + 3)
    assert torch.equal(model.bn0.running_mean, before)
    assert torch.equal(dual.statistics(0)["bn0.running_mean"], before)
    assert not torch.equal(dual.statistics(0)["bn1.running_mean"], model.bn1.running_mean)


class Counter(nn.Module):
    """Counts its calls in a buffer, as quantisation observers and spectral norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def test_the_pruned_pass_does_not_write_to_other_buffers_of_the_model() -> None:
    model = Counter().train()
    dual = DualModel(model, fastpie.prune(model, LADDER))
    for expected in (1, 2):
        dual(torch.randn(2, 3))
        assert model.calls.item() == expected


def test_training_moves_the_kept_weights_by_both_gradients_and_the_removed_by_the_dense() -> None:
    network = by_name("residual")
    model = network.build().train()
    masks = fastpie.prune(model, 0.5)
    dual = DualModel(model, masks)
    optimizer = torch.optim.SGD(dual.parameters(), lr=0.1)
    before = model.conv1.weight.detach().clone()
    dual(*network.inputs()).pruned.square().sum().backward()
    optimizer.step()
    moved = model.conv1.weight.detach() != before
    assert not moved[~masks["conv1.weight"]].any()
    assert moved[masks["conv1.weight"]].any()


@small
def test_autocast_runs_both_models_in_bf16(network: Network) -> None:
    model, x = network.build(), network.inputs()
    masks = fastpie.prune(model, 0.5)
    dual = DualModel(model, masks)
    with torch.autocast("cpu", torch.bfloat16):
        out = dual(*x)
        wanted = model(*x), masked_copy(model, masks)(*x)
        ones = DualModel(model, fastpie.prune(model, 0.0))(*x)
    for got, want in zip(out[:2], wanted, strict=True):
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert equal(ones.dense, ones.pruned)


# ---------------------------------------------------------------------------- stored and copied


def trained_dual(sparsity: object = LADDER) -> DualModel:
    """Dual model whose pruned statistics differ from the dense ones."""
    model = ResidualCNN().train()
    dual = DualModel(model, fastpie.prune(model, sparsity))
    dual(torch.randn(6, 3, 8, 8) * 2 + 1)
    return dual.eval()


def test_state_dict_round_trip_restores_weights_masks_and_statistics(tmp_path: Path) -> None:
    dual, x = trained_dual(), torch.randn(2, 3, 8, 8)
    torch.save(dual.state_dict(), tmp_path / "dual.pt")
    model = ResidualCNN()
    other = DualModel(model, fastpie.prune(model, LADDER)).eval()
    assert not equal(other(x), dual(x))
    other.load_state_dict(torch.load(tmp_path / "dual.pt", weights_only=True))
    assert equal(other(x), dual(x))
    assert other.masks == dual.masks


def test_state_dict_of_the_model_is_part_of_that_of_the_dual_model() -> None:
    dual = trained_dual()
    state = dual.state_dict()
    for name, value in dual.model.state_dict().items():
        assert torch.equal(state[f"model.{name}"], value)


def test_state_dict_of_other_levels_is_refused_or_brings_its_levels_along() -> None:
    dual = trained_dual(0.9)
    model = ResidualCNN()
    other = DualModel(model, fastpie.prune(model, 0.5))
    try:
        other.load_state_dict(dual.state_dict())
    except (FastpieError, RuntimeError):
        assert other.sparsities == [0.5]
        return
    assert other.sparsities == [0.9]
    assert other.masks == dual.masks


def test_a_deep_copy_is_independent_and_gives_the_same_outputs() -> None:
    dual, x = trained_dual(), torch.randn(2, 3, 8, 8)
    want = dual(x)
    other = copy.deepcopy(dual)
    assert equal(other(x), want)
    assert not {p.data_ptr() for p in other.parameters()} & {
        p.data_ptr() for p in dual.parameters()
    }
    with torch.no_grad():
        other.model.fc.weight.zero_()
    other.train()(x)
    assert equal(dual(x), want)


def test_moving_the_dual_model_moves_masks_and_statistics_and_keeps_them() -> None:
    dual = trained_dual()
    masks = dual.masks
    dual.double()
    out = dual(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert out.pruned.dtype is torch.float64
    assert dual.masks == masks
    assert dual.to("meta").statistics(0)["bn0.running_mean"].is_meta


def test_python_and_numpy_generators_are_not_drawn_from() -> None:
    dual = trained_dual()
    random.seed(1)
    state = random.getstate()
    dual(torch.randn(2, 3, 8, 8))
    assert random.getstate() == state
