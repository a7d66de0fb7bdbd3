from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastpie.dual.grad_cam import feature_maps_of, grad_cam
from fastpie.errors import FastpieError


def test_grad_cam_of_a_linear_head_is_its_weights_times_the_maps() -> None:
    maps = torch.randn(3, 4, 5, 6, requires_grad=True)
    weight = torch.randn(4)
    score = (maps.mean((2, 3)) @ weight).sum()
    wanted = torch.einsum("k,nkhw->nhw", weight, maps) / 30
    torch.testing.assert_close(grad_cam(score, maps), wanted)
    with pytest.raises(FastpieError, match="depend"):
        grad_cam(weight.clone().requires_grad_().sum(), maps)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_slopes(dims: int) -> None:
    """Through the maps alone the weights are constants; with create_graph everything counts."""
    maps = torch.randn(2, 3, *[3] * dims, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(3, 2, dtype=torch.float64)

    def score(maps: Tensor) -> Tensor:
        return (maps.flatten(2).mean(2) @ mix).tanh().sum()

    assert torch.autograd.gradcheck(
        lambda maps: grad_cam(score(maps), maps, create_graph=True), maps
    )
    (slope,) = torch.autograd.grad(score(maps), maps)
    weights = slope.flatten(2).mean(2).view(2, 3, *[1] * dims)
    cam = grad_cam(score(maps), maps, retain_graph=True)
    torch.testing.assert_close(cam, (weights * maps).sum(1))
    (found,) = torch.autograd.grad(cam.sum(), maps)
    torch.testing.assert_close(found, weights.expand_as(maps))


def test_half_precision_is_summed_in_fp32() -> None:
    maps = torch.randn(2, 4, 5, 6, dtype=torch.float16, requires_grad=True)
    assert grad_cam(maps.float().square().mean(), maps).dtype is torch.float32


def test_maps_of_a_module() -> None:
    frozen = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()).requires_grad_(False)
    with feature_maps_of(frozen, "0") as seen:
        out = frozen(torch.randn(2, 1, 4, 4))
    assert grad_cam(out.sum(), seen[0]).shape == (2, 2, 2)
    with feature_maps_of(frozen, "2"), pytest.raises(FastpieError, match="maps"):
        frozen(torch.randn(2, 1, 4, 4))
    assert not any(module._forward_hooks for module in frozen)
    frozen[1] = nn.ReLU(inplace=True)
    x = torch.randn(2, 1, 4, 4)
    with feature_maps_of(frozen, "0") as seen:
        out = frozen(x)
    assert torch.equal(seen[0], frozen[0](x).relu())
    (slope,) = torch.autograd.grad(out.square().sum(), seen[0])
    torch.testing.assert_close(slope, 2 * seen[0])
    with pytest.raises(FastpieError, match="'neck'"), feature_maps_of(frozen, "neck"):
        pass
