"""`fastpie.nn.apply_masks`: the layers of a model become masked ones in place, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpie
from fastpie import FastpieError
from fastpie.nn import MaskedConv2d, MaskedLinear, apply_masks, remove_masks
from networks import SMALL, Network, PlainCNN, ReusedModule, TiedWeights, masked_copy


@pytest.mark.parametrize("network", SMALL, ids=lambda n: n.name)
def test_outputs_are_those_of_weights_set_to_zero(network: Network) -> None:
    model = network.build().eval()
    masks = fastpie.prune(model, 0.6)
    expected = masked_copy(model, masks)
    apply_masks(model, masks)
    inputs = network.inputs()
    with torch.no_grad():
        want, got = expected(*inputs), model(*inputs)
    torch.testing.assert_close(got, want)


def test_layers_stay_the_objects_they_are_and_checkpoints_do_not_change() -> None:
    model = PlainCNN()
    layers, parameters = list(model.modules()), dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    masks = fastpie.prune(model, 0.5)
    assert apply_masks(model, masks) == ["conv1", "conv2", "fc"]
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert isinstance(model.conv1, MaskedConv2d)
    assert isinstance(model.fc, MaskedLinear)
    assert "sparsity=" in repr(model.fc)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), state[name] * mask)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    for name, mask in masks.items():
        assert not model.get_parameter(name).grad[~mask].any()
        assert model.get_parameter(name).grad[mask].any()
    assert remove_masks(model) == ["conv1", "conv2", "fc"]
    assert [type(m) for m in model.modules()] == [type(m) for m in PlainCNN().modules()]
    assert not list(model.buffers())
    model.load_state_dict(state)
    assert remove_masks(model) == []


def test_masks_can_be_changed_and_the_mask_of_a_users_layer_too() -> None:
    model = nn.Sequential(nn.Linear(6, 8), MaskedLinear(8, 4))
    x = torch.randn(3, 6)
    for sparsity in (0.3, 0.7):
        masks = fastpie.prune(model, sparsity)
        expected = masked_copy(model, masks)
        apply_masks(model, masks)
        torch.testing.assert_close(model(x), expected(x))
        assert torch.equal(model[0].mask, masks["0.weight"])
        assert torch.equal(model[1].mask, masks["1.weight"])
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.mask"]


def test_tied_and_reused_layers_all_get_the_mask() -> None:
    model = TiedWeights()
    masks = fastpie.prune(model, 0.5)
    assert apply_masks(model, masks) == ["first", "second", "head"]
    assert torch.equal(model.second.mask, masks["first.weight"])
    reused = ReusedModule()
    apply_masks(reused, fastpie.prune(reused, 0.5))
    assert reused.alias is reused.conv
    assert isinstance(reused.conv, MaskedConv2d)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def test_what_reads_weights_itself_is_masked_by_their_zeros() -> None:
    model = Attention().eval()
    masks = fastpie.prune(model, 0.6)
    assert "encoder.self_attn.out_proj.weight" in masks
    expected = masked_copy(model, masks)
    names = apply_masks(model, masks)
    assert names == ["encoder.linear1", "encoder.linear2"]
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), expected(x))
    with torch.inference_mode():  # torch's fast path, which calls no layer
        torch.testing.assert_close(model(x), expected(x))


def test_a_density_leaves_dense_layers_plain() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    keep = {"0.weight": torch.rand(10, 10) < 0.2, "1.weight": torch.rand(10, 10) < 0.8}
    masks = fastpie.Masks.from_tensors(keep, model)
    assert apply_masks(model, masks, density=0.5) == ["0"]
    assert not model[1].weight[~keep["1.weight"]].any()
    full = fastpie.prune(model, 0.0, exclude="0")
    assert apply_masks(model, full) == []
    with pytest.raises(FastpieError, match="density"):
        apply_masks(model, masks, density=float("nan"))


def test_hooks_copies_and_compiled_models_go_on() -> None:
    model = PlainCNN()
    calls: list[Any] = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    masks = fastpie.prune(model, 0.5)
    expected = masked_copy(model, masks)
    apply_masks(model, masks)
    calls.clear()
    torch.testing.assert_close(compiled(x), expected(x))
    assert calls
    copied = copy.deepcopy(model)
    assert isinstance(copied.conv1, MaskedConv2d)
    remove_masks(copied)
    assert isinstance(model.conv1, MaskedConv2d)
    torch.testing.assert_close(copied(x), expected(x))


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(FastpieError, match="made for"):
        apply_masks(TiedWeights(), fastpie.prune(PlainCNN(), 0.5))
