"""Features by name: outputs and inputs of modules, in the dual model and in the engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpie
from fastpie import DualModel, FastpieError
from fastpie.dual import stage_features
from fastpie.dual.features import feature_widths, features_of


class Net(nn.Module):
    """What goes into the classifier is no module's output, and is changed in place after it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        features = self.norm(self.conv(x)).relu().mean((2, 3))
        out = self.fc(features)
        features.zero_()
        return out


@pytest.fixture
def net():
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_(0, 0.1)
    return model


def features_by_hand(model, x):
    return model.norm(model.conv(x)).relu().mean((2, 3))


@pytest.mark.parametrize("name", ["penultimate", "fc:input"])
def test_the_input_of_a_module(net, name):
    x = torch.randn(5, 1, 8, 8)
    masks = fastpie.prune(net, [0.3, 0.6])
    dual = DualModel(net, masks, features=name)
    assert dual.feature_module == "fc:input"
    with torch.no_grad():
        out = dual(x)
        torch.testing.assert_close(out.features.dense, features_by_hand(net, x), rtol=0, atol=0)
        pruned = Net().eval()
        pruned.load_state_dict(net.state_dict())
        masks.at(0.6).apply_(pruned)
        torch.testing.assert_close(out.features.pruned[1], features_by_hand(pruned, x))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_engine_gives_them_too(net, backend):
    x = torch.randn(5, 1, 8, 8)
    dual = DualModel(net, fastpie.prune(net, [0.3, 0.6]), features="penultimate")
    engine = dual.compile(x, backend=backend)
    assert engine.backend == backend
    with torch.no_grad():
        expected = dual(x)
    out = engine(x)
    torch.testing.assert_close(out.features.dense, expected.features.dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.features.pruned, expected.features.pruned, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.dense, expected.dense, rtol=1e-4, atol=1e-5)


def test_monais_networks_have_one():
    from monai.networks import nets

    for model in (
        nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=4),
        nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=4),
        nets.EfficientNetBN("efficientnet-b0", in_channels=1, num_classes=4, pretrained=False),
    ):
        model.eval()
        dual = DualModel(model, fastpie.prune(model, 0.5), features="penultimate")
        with torch.no_grad():
            features = dual(torch.randn(2, 1, 32, 32)).features
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        assert features.dense.shape == (2, last.in_features)


def test_a_module_with_a_colon_in_its_name(net):
    net.add_module("odd:input", nn.Identity())
    assert features_of(net, "odd:input") == "odd:input"
    assert features_of(net, "odd:input:input") == "odd:input:input"


def test_a_module_that_is_called_penultimate(net):
    net.add_module("penultimate", nn.Identity())
    assert features_of(net, "penultimate") == "penultimate"


def test_no_such_module(net):
    for name in ("nothing", "nothing:input", ":input:"):
        with pytest.raises(FastpieError, match="has no module"):
            features_of(net, name)


def test_no_linear_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(FastpieError, match="has none: name a module of it"):
        DualModel(model, fastpie.prune(model, 0.5), features="penultimate")


def test_a_module_called_by_keywords_has_no_first_input():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(input=x)

    model = ByKeyword()
    dual = DualModel(model, fastpie.prune(model, 0.5), features="penultimate")
    with pytest.raises(FastpieError, match="keywords alone"):
        dual(torch.randn(3, 4))


def pooled_by_hand(x):
    x = x.flatten(2)
    return torch.cat([x.mean(2), x.std(2, correction=0)], 1)


def test_pooled_and_several(net):
    x = torch.randn(5, 1, 8, 8)
    dual = DualModel(net, fastpie.prune(net, [0.3, 0.6]), features="conv+norm:pooled+fc:input")
    with torch.no_grad():
        out = dual(x)
        conv = net.conv(x)
        parts = [pooled_by_hand(conv), pooled_by_hand(net.norm(conv)), features_by_hand(net, x)]
    torch.testing.assert_close(out.features.dense, torch.cat(parts, 1))
    assert out.features.pruned.shape == (2, 5, 30)
    engine = dual.compile(x)
    assert engine.backend == "cpu"
    torch.testing.assert_close(engine(x).features.pruned, out.features.pruned, rtol=1e-4, atol=1e-5)


def test_one_that_is_pooled(net):
    x = torch.randn(5, 1, 8, 8)
    dual = DualModel(net, fastpie.prune(net, 0.5), features="conv:input:pooled")
    with torch.no_grad():
        torch.testing.assert_close(dual(x).features.dense, pooled_by_hand(x))


def test_tokens_are_pooled_over_their_positions():
    x = torch.randn(3, 7, 4)  # [N, T, C]
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(28, 2))
    dual = DualModel(model, fastpie.prune(model, 0.5), features="0:pooled")
    with torch.no_grad():
        torch.testing.assert_close(
            dual(x).features.dense, pooled_by_hand(model[0](x).transpose(1, 2))
        )


def test_what_cannot_be_pooled():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.inner({"x": x})["x"])

    model = Dict()
    dual = DualModel(model, fastpie.prune(model, 0.5), features="inner:pooled")
    with pytest.raises(FastpieError, match="to be pooled, but got dict"):
        dual(torch.randn(3, 4))


def test_the_stages_of_networks():
    from monai.networks import nets

    x = torch.randn(2, 1, 64, 64)
    resnet = nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=4).train()
    names = "bn1:pooled+layer1:pooled+layer2:pooled+layer3:pooled+layer4:pooled"
    assert stage_features(resnet, x, last=True) == names
    assert stage_features(resnet, x) == names.removesuffix("+layer4:pooled")
    assert resnet.training  # as it was
    assert int(resnet.bn1.num_batches_tracked) == 0
    densenet = nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=4)
    names = stage_features(densenet, x, last=True)
    assert [name.removesuffix(":pooled") for name in names.split("+")] == [
        "features.norm0",
        "features.denseblock1",
        "features.denseblock2",
        "features.denseblock3",
        "features",
    ]
    efficientnet = nets.EfficientNetBN(
        "efficientnet-b0", in_channels=1, num_classes=4, pretrained=False
    )
    assert len(stage_features(efficientnet, x).split("+")) == 4
    vit = nets.ViT(
        1, (32, 32), (8, 8), hidden_size=32, mlp_dim=64, num_layers=6, num_heads=2,
        classification=True, spatial_dims=2, num_classes=3,
    )  # fmt: skip
    assert stage_features(vit, x[..., :32, :32], last=True) == (
        "blocks.1:pooled+blocks.2:pooled+blocks.3:pooled+blocks.5:pooled"
    )
    volume = nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=2)
    assert stage_features(volume, torch.randn(1, 1, 32, 32, 32)).startswith("bn1:pooled+layer1")


def test_the_widths_of_the_parts(net):
    x = torch.randn(5, 1, 8, 8)
    assert feature_widths(net, "conv+norm:pooled+fc:input", (x,)) == [12, 12, 6]
    assert feature_widths(net, "conv", (x,)) == [6 * 6 * 6]


def test_a_network_without_stages():
    with pytest.raises(FastpieError, match="but none does: name a module"):
        stage_features(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4))
