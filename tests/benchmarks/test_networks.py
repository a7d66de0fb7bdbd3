"""The networks of the benchmarks are the standard ones, and their masks what they say."""

import pytest
import torch

import fastpie
from benchmarks import networks

# Multiply-adds of convolutions and linear layers: those of the 2D classifiers are torchvision's.
MULTIPLY_ADDS = {
    "resnet18": 1_814_073_344,
    "resnet50": 4_089_184_256,
    "densenet121": 2_834_161_664,
    "efficientnet_b0": 385_814_752,
    "mobilenet_v2": 300_774_272,
    "resnet18_3d": 13_249_807_360,
    "unet": 4_947_181_568,
}


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_those_of_the_standard_architecture(name):
    assert networks.multiply_adds(name) == MULTIPLY_ADDS[name]


@pytest.mark.parametrize("name", ["mobilenet_v2", "tiny"])
def test_activations_neither_explode_nor_vanish(name):
    model, size = networks.build(name)
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, args, out: seen.append(out.std().item()))
    with torch.no_grad():
        model(torch.randn(2, *size))
    assert min(seen) > 1e-2
    assert max(seen) < 1e2


def test_a_network_is_the_same_bits_each_time_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first, _ = networks.build("tiny")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second, _ = networks.build("tiny")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not first.training
    with pytest.raises(ValueError, match="resnet50"):
        networks.build("resnet51")


def test_layers_of_resnet50():
    layers = networks.layers_of("resnet50")
    assert sum(layer.count for layer in layers) == 54
    assert str(layers[0]) == "7x7-3to64-s2-at-224x224"
    assert str(layers[-1]) == "linear-2048to1000"
    assert len({str(layer) for layer in layers}) == len(layers) == 24


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", ["magnitude", "random", "trained-like"])
def test_masks(scope, kind):
    model, _ = networks.build("mobilenet_v2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = networks.masks_for(model, 0.9, scope, kind)
    assert masks == networks.masks_for(model, 0.9, scope, kind)
    removed = sum(masks.removed()[0].values()) / masks.total
    assert removed == pytest.approx(0.9, abs=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wide = [masks[name].flatten(1).float().mean(1) for name in masks if masks[name][0].numel() > 99]
    if scope == "global":
        assert min(densities.mean() for densities in wide) > 0.02  # no layer is emptied
    spread = torch.cat([densities / densities.mean() for densities in wide]).std()
    assert (spread > 0.6) == (kind == "trained-like")  # measured: 1.0, the others 0.2


def test_masks_of_a_ladder_and_of_no_known_kind():
    model, _ = networks.build("tiny")
    assert isinstance(networks.masks_for(model, [0.5, 0.9]), fastpie.Masks)
    assert networks.masks_for(model, [0.5, 0.9]).is_ladder
    with pytest.raises(ValueError, match="trained-like"):
        networks.masks_for(model, 0.5, kind="learned")
