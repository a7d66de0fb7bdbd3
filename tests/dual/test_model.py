"""`fastpie.DualModel` in eval mode: the truth that every engine is held to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastpie
from fastpie import DualModel, FastpieError
from networks import SMALL, Network, ResidualCNN, TiedWeights, masked_copy, random_masks

LADDER = [0.2, 0.5, 0.9]
small = pytest.mark.parametrize("network", SMALL, ids=lambda n: n.name)


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """The same structure and the same tensors."""
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_equal(got: Any, want: Any) -> None:
    assert_close(got, want, 0)


def level_of(outputs: Any, level: int) -> Any:
    return pytree.tree_map(lambda t: t[level], outputs)


def by_name(name: str) -> Network:
    return next(n for n in SMALL if n.name == name)


@small
@pytest.mark.parametrize("gradients", [True, False])
def test_dense_is_the_model_and_pruned_is_a_copy_with_masked_weights(
    network: Network, gradients: bool
) -> None:
    model, x = network.build(), network.inputs()
    masks = fastpie.prune(model, 0.5)
    dual = DualModel(model, masks)
    with torch.set_grad_enabled(gradients):
        out = dual(*x)
        assert_equal(out.dense, model(*x))
        assert_close(out.pruned, masked_copy(model, masks)(*x))
    assert out.features is None


@small
def test_ladder_stacks_the_levels_that_single_masks_give(network: Network) -> None:
    model, x = network.build(), network.inputs()
    masks = fastpie.prune(model, LADDER)
    out = DualModel(model, masks)(*x)
    assert_equal(out.dense, model(*x))
    for index, sparsity in enumerate(LADDER):
        single = DualModel(model, masks.at(sparsity))(*x)
        assert_equal(level_of(out.pruned, index), single.pruned)


def test_ladder_of_one_level_has_a_level_dimension_and_a_number_has_none() -> None:
    network = by_name("plain")
    model, x = network.build(), network.inputs(2)
    assert DualModel(model, fastpie.prune(model, [0.5]))(*x).pruned.shape == (1, 2, 5)
    assert DualModel(model, fastpie.prune(model, 0.5))(*x).pruned.shape == (2, 5)


@small
@pytest.mark.parametrize("gradients", [True, False])
def test_all_ones_masks_give_the_same_bits(network: Network, gradients: bool) -> None:
    model, x = network.build(), network.inputs()
    given = {k: torch.ones_like(m) for k, m in random_masks(model).items()}
    with torch.set_grad_enabled(gradients):
        for masks in (fastpie.prune(model, 0.0), given):
            out = DualModel(model, masks)(*x)
            assert_equal(out.pruned, out.dense)


def test_all_ones_masks_give_the_same_bits_in_channels_last_and_bf16() -> None:
    model, x = ResidualCNN().eval(), torch.randn(2, 3, 8, 8)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    out = DualModel(last, fastpie.prune(last, 0.0))(x.to(memory_format=torch.channels_last))
    assert_equal(out.pruned, out.dense)
    half = copy.deepcopy(model).bfloat16()
    out = DualModel(half, fastpie.prune(half, 0.0))(x.bfloat16())
    assert out.dense.dtype is torch.bfloat16
    assert_equal(out.pruned, out.dense)


@small
def test_gradients_are_those_of_both_models(network: Network) -> None:
    model, x = network.build(), network.inputs()
    masks = fastpie.prune(model, 0.5)
    dual, pruned = DualModel(model, masks), masked_copy(model, masks)
    reference = copy.deepcopy(model)

    def loss(outputs: Any, weight: float) -> Tensor:
        return weight * sum(t.square().sum() for t in pytree.tree_leaves(outputs))

    out = dual(*x)
    (loss(out.dense, 1.0) + loss(out.pruned, 0.7)).backward()
    (loss(reference(*x), 1.0)).backward()
    (loss(pruned(*x), 0.7)).backward()
    of_pruned = dict(pruned.named_parameters())
    for name, of_dense in reference.named_parameters():
        got = model.get_parameter(name).grad
        mask = masks[name] if name in masks else torch.ones_like(of_dense, dtype=torch.bool)
        want = [
            p.grad if p.grad is not None else torch.zeros_like(p)
            for p in (of_dense, of_pruned[name])
        ]
        got = torch.zeros_like(of_dense) if got is None else got
        torch.testing.assert_close(got, want[0] + want[1] * mask, rtol=1e-4, atol=1e-5)


@small
def test_construction_and_calls_leave_the_model_as_it_was(network: Network) -> None:
    model, x = network.build(), network.inputs()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    addresses = {k: p.data_ptr() for k, p in model.named_parameters()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    requires_grad = [p.requires_grad for p in model.parameters()]
    masks = fastpie.prune(model, LADDER)
    feature = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    feature = feature if network.name not in ("control_flow",) else None
    dual = DualModel(model, masks, features=feature)
    state = torch.get_rng_state()
    dual(*x)
    assert torch.equal(torch.get_rng_state(), state)
    assert dual.model is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == addresses
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(module.training for module in model.modules())


def test_a_failing_forward_leaves_no_hook_behind() -> None:
    model = by_name("plain").build()
    dual = DualModel(model, fastpie.prune(model, 0.5), features="conv1")
    with pytest.raises(RuntimeError):
        dual(torch.randn(2, 4, 9, 9))
    assert not any(m._forward_hooks for m in model.modules())


def test_no_parameter_is_copied_and_those_of_the_model_are_the_only_ones() -> None:
    model = TiedWeights()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    assert {p.data_ptr() for p in dual.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert len(list(dual.parameters())) == len(list(model.parameters()))


def test_changes_of_the_weights_show_in_the_next_call() -> None:
    network = by_name("residual")
    model, x = network.build(), network.inputs()
    masks = fastpie.prune(model, 0.5)
    dual = DualModel(model, masks)
    dual(*x)
    with torch.no_grad():
        model.conv1.weight.add_(0.1)
    model.fc = nn.Linear(6, 4)
    out = dual(*x)
    assert_equal(out.dense, model(*x))
    assert_close(out.pruned, masked_copy(model, masks)(*x))


def test_masks_put_in_force_later_show_in_the_next_call() -> None:
    network = by_name("plain")
    model, x = network.build(), network.inputs()
    dual = DualModel(model, fastpie.prune(model, LADDER))
    other = fastpie.prune(model, LADDER, method="random", seed=1)
    dual.masks = other
    assert dual.masks == other
    assert_equal(dual(*x), DualModel(model, other)(*x))
    with pytest.raises(FastpieError, match="levels"):
        dual.masks = fastpie.prune(model, 0.5)
    with pytest.raises(FastpieError, match="same parameters"):
        dual.masks = fastpie.prune(model, LADDER, exclude=["fc"])
    with pytest.raises(FastpieError, match="made for"):
        dual.masks = fastpie.prune(TiedWeights(), LADDER)
    assert dual.masks == other


def test_masks_put_in_force_leave_those_given_and_read_before_as_they_were() -> None:
    model = ResidualCNN()
    given = fastpie.prune(model, 0.5)
    dual = DualModel(model, given)
    read, want = dual.masks, fastpie.prune(model, 0.5)
    dual.masks = fastpie.prune(model, 0.5, method="random", seed=1)
    assert given == want
    assert read == want
    assert dual.masks != want


@small
def test_masks_given_as_a_dict_of_bools_are_taken(network: Network) -> None:
    model, x = network.build(), network.inputs()
    given = random_masks(model)
    out = DualModel(model, given)(*x)
    assert_close(out.pruned, masked_copy(model, given)(*x))


def test_masks_of_one_parameter_are_enough() -> None:
    network = by_name("plain")
    model, x = network.build(), network.inputs()
    given = {"conv2.weight": torch.rand(8, 3, 3, 3) > 0.5}
    out = DualModel(model, given)(*x)
    assert_close(out.pruned, masked_copy(model, given)(*x))


REFUSED = {
    "masks_of_another_model": (lambda m: fastpie.prune(TiedWeights(), 0.5), None, "made for"),
    "unknown_parameter": (lambda m: {"nothing": torch.ones(1, dtype=torch.bool)}, None, "nothing"),
    "wrong_shape": (lambda m: {"fc.weight": torch.ones(2, dtype=torch.bool)}, None, "fc.weight"),
    "no_masks": (lambda m: {}, None, "mask"),
    "unknown_feature": (lambda m: fastpie.prune(m, 0.5), "layer9", "layer9"),
}


@pytest.mark.parametrize(("masks", "features", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_belong_to_the_model_is_refused(masks, features, message) -> None:
    model = by_name("plain").build()
    with pytest.raises(FastpieError, match=message):
        DualModel(model, masks(model), features=features)


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(FastpieError, match=r"nn\.Module"):
        DualModel(torch.zeros, {})


# ---------------------------------------------------------------------------- features


@pytest.mark.parametrize("name", ["bn0", "conv1", "fc", ""])
def test_features_are_the_outputs_of_the_module_named(name: str) -> None:
    network = by_name("residual")
    model, x = network.build(), network.inputs()
    masks = fastpie.prune(model, LADDER)
    out = DualModel(model, masks, features=name)(*x)
    assert out.features.pruned.shape[0] == len(LADDER)
    for index, sparsity in enumerate([None, *LADDER]):
        single = model if sparsity is None else masked_copy(model, masks.at(sparsity))
        seen = []
        single.get_submodule(name).register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        copy.deepcopy(single)(*x) if sparsity is None else single(*x)
        got = out.features.dense if sparsity is None else out.features.pruned[index - 1]
        assert_close(got, seen[0])


def test_features_keep_the_structure_that_the_module_returns() -> None:
    network = by_name("attention")
    model, x = network.build(), network.inputs()
    out = DualModel(model, fastpie.prune(model, 0.5), features="attention")(*x)
    assert isinstance(out.features.dense, tuple)
    assert out.features.dense[0].shape == out.features.pruned[0].shape == (4, 7, 8)


def test_features_are_not_what_a_later_operation_in_place_makes_of_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten()).eval()
    masks, x = fastpie.prune(model, 0.5), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        out = DualModel(model, masks, features="0")(x)
        assert_equal(out.features.dense, model[0](x))
        assert_close(out.features.pruned, masked_copy(model, masks)[0](x))


@pytest.mark.parametrize("sparsity", [0.5, LADDER])
def test_a_feature_module_called_twice_is_refused(sparsity: Any) -> None:
    network = by_name("reused")
    model = network.build()
    dual = DualModel(model, fastpie.prune(model, sparsity), features="bn")
    with pytest.raises(FastpieError, match=r"bn.*once"):
        dual(*network.inputs())


def test_a_feature_module_that_is_never_called_is_refused() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    model.forward = model["used"].forward
    dual = DualModel(model, fastpie.prune(model, 0.5), features="unused")
    with pytest.raises(FastpieError, match="unused"):
        dual(torch.randn(1, 3))


# ---------------------------------------------------------------------------- inputs


def test_keyword_inputs_reach_both_models() -> None:
    network = by_name("several_inputs")
    model, (image, table) = network.build(), network.inputs()
    masks = fastpie.prune(model, 0.5)
    out = DualModel(model, masks)(image, table=table, scale=3.0)
    assert_equal(out.dense, model(image, table, 3.0))
    assert_close(out.pruned, masked_copy(model, masks)(image, table, 3.0))


@small
def test_pair_gives_each_model_its_own_input(network: Network) -> None:
    model, a, b = network.build(), network.inputs(), network.inputs()
    dual = DualModel(model, fastpie.prune(model, LADDER))
    one = [x if len(x) > 1 else x[0] for x in (a, b)]
    out = dual.pair(*one)
    assert_equal(out.dense, dual(*a).dense)
    assert_equal(out.pruned, dual(*b).pruned)


def test_pair_is_one_graph() -> None:
    network = by_name("plain")
    model = network.build()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    a, b = (network.inputs()[0].requires_grad_() for _ in range(2))
    out = dual.pair(a, b)
    (out.dense * out.pruned).sum().backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name", ["plain", "residual", "attention", "several_inputs", "dict_output"]
)
def test_empty_batch_gives_empty_outputs(name: str) -> None:
    network = by_name(name)
    model, x = network.build(), network.inputs(0)
    out = DualModel(model, fastpie.prune(model, LADDER))(*x)
    for a, b in zip(pytree.tree_leaves(out.dense), pytree.tree_leaves(out.pruned), strict=True):
        assert b.shape == (3, *a.shape)
        assert a.shape[0] == 0


def test_the_fused_path_of_a_transformer_layer_runs_and_agrees() -> None:
    network = by_name("transformer")
    model, x = network.build(), network.inputs()
    masks = fastpie.prune(model, 0.5)
    dual = DualModel(model, masks)
    with_gradients = dual(*x)
    with torch.no_grad():
        without = dual(*x)
        fused = masked_copy(model, masks)(*x)
    assert_close(without.pruned, fused)
    assert_close(without.pruned, with_gradients.pruned.detach())
    assert_close(without.dense, with_gradients.dense.detach())
    assert not torch.allclose(without.dense, without.pruned)
