"""Committees: copies with noise on their weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from fastpie.dual.committee import Committee


class Tied(nn.Module):
    """Two layers that share a weight; BatchNorm; a bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.out(self.second(self.first(x).relu()).relu())


@pytest.fixture
def model():
    model = Tied()
    with torch.no_grad():
        model.norm.running_mean.normal_(0, 0.1)
        model.norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def noise_of(committee, model, number, name):
    weight = dict(model.named_parameters())[name]
    if number == 0:
        return dict(committee.model.named_parameters())[name] - weight
    return committee.pruned_state(number - 1)[name] - weight


def test_the_noise_is_what_it_says():
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64, 100))
    with torch.no_grad():
        model[2].weight.mul_(7).add_(3)  # the deviation counts, not the size
    committee = Committee(model, copies=4, noise=0.3)
    noises = []
    for number in range(4):
        for name in ("0.weight", "2.weight"):
            noise = noise_of(committee, model, number, name).detach()
            expected = 0.3 * dict(model.named_parameters())[name].std().item()
            assert noise.std().item() == pytest.approx(expected, rel=0.05)
            assert abs(noise.mean().item()) < 0.1 * expected
            noises.append(noise.flatten()[:6400])
    correlation = torch.corrcoef(torch.stack(noises)) - torch.eye(8)
    assert correlation.abs().max() < 0.08
    assert torch.equal(committee.model[0].bias, model[0].bias)


def test_each_copy_is_the_model_with_its_weights(model):
    committee = Committee(model, copies=3, seed=5)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        got = Committee.outputs(committee(x))
        assert got.shape == (3, 4, 3)
        for number in range(3):
            other = copy.deepcopy(model)
            for name, weight in other.named_parameters():
                if weight.ndim > 1:
                    weight.add_(noise_of(committee, model, number, name))
            assert other.second.weight is other.first.weight
            torch.testing.assert_close(got[number], other(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(got[0], got[1])


def test_one_seed_gives_the_same_copies(model):
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        first = Committee.outputs(Committee(model, seed=3)(x))
        torch.randn(7)  # the state of the global generator plays no part
        state = torch.get_rng_state()
        assert torch.equal(first, Committee.outputs(Committee(model, seed=3)(x)))
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.allclose(first, Committee.outputs(Committee(model, seed=4)(x)))


def test_the_model_is_left_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    committee = Committee(model)
    assert model.training
    assert not committee.training
    with torch.no_grad():
        committee(torch.randn(4, 1, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_engine_gives_what_the_copies_give(model, backend):
    committee = Committee(model, copies=5)
    x = torch.randn(9, 1, 8, 8)
    engine = committee.compile(x, backend=backend)
    assert engine.backend == backend
    with torch.no_grad():
        expected = Committee.outputs(committee(x))
    torch.testing.assert_close(Committee.outputs(engine(x)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        Committee.outputs(engine(x[:2])), expected[:, :2], rtol=1e-4, atol=1e-5
    )


def test_a_larger_network_on_the_engine():
    from monai.networks import nets

    model = nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=4).eval()
    committee = Committee(model, copies=2)
    x = torch.randn(2, 1, 32, 32)
    engine = committee.compile(x)
    assert engine.backend == "cpu"
    with torch.no_grad():
        expected = Committee.outputs(committee(x))
    torch.testing.assert_close(Committee.outputs(engine(x)), expected, rtol=1e-3, atol=1e-4)


def test_recalibration_reaches_every_copy(model):
    committee = Committee(model, copies=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(16, 1, 8, 8) * 3 + 1
    assert committee.recalibrate([x]) is committee
    with torch.no_grad():
        got = Committee.outputs(committee(x))
        for number in range(3):
            other = copy.deepcopy(model)
            for name, weight in other.named_parameters():
                if weight.ndim > 1:
                    weight.add_(noise_of(committee, model, number, name))
            other.norm.momentum = None  # training for one batch: its statistics
            other.norm.reset_running_stats()
            other.train()(x)
            torch.testing.assert_close(got[number], other.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    names = {f"{n}/norm.{what}" for n in range(3) for what in ("running_mean", "running_var")}
    assert names < set(committee.own_statistics())


def test_outputs_of_any_structure():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return {"logits": self.fc(x)}

    with torch.no_grad():
        out = Committee.outputs(Committee(Dict(), copies=3)(torch.randn(5, 4)))
    assert out["logits"].shape == (3, 5, 2)


def test_bad_input(model):
    with pytest.raises(FastpieError, match="at least 2 copies, but got 1"):
        Committee(model, copies=1)
    for noise in (0, -1, float("nan"), float("inf")):
        with pytest.raises(FastpieError, match="`noise` above 0"):
            Committee(model, noise=noise)
    with pytest.raises(FastpieError, match="has none"):
        Committee(nn.Sequential(nn.ReLU()))


def test_it_is_a_dual_model(model):
    assert isinstance(Committee(model), fastpie.DualModel)
