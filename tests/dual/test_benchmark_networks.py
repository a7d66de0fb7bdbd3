"""The engine on the networks of the benchmarks, at odd sizes and with odd masks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpie
from benchmarks import networks as benchmark_networks
from fastpie import DualModel

# Sizes that each network takes: 31 x 45 pixels unless it must be divisible.
SIZES: dict[str, tuple[int, ...]] = {
    "efficientnet_b0": (64, 90),
    "unet": (32, 48),
    "resnet18_3d": (31, 33, 45),
}
pytestmark = pytest.mark.usefixtures("captured_once", "mixed_form")
every = pytest.mark.parametrize("name", sorted(benchmark_networks.NETWORKS))


@functools.cache
def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    model, size = benchmark_networks.build(name)
    return model, (size[0], *SIZES.get(name, (31, 45)))


def worst(engine: Any, dual: DualModel, x: Tensor) -> float:
    got, want = engine(x), dual(x)
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()
        for a, b in ((got.dense, want.dense), (got.pruned, want.pruned))
    )


@every
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_odd_sizes_and_batches(name: str, precision: str) -> None:
    model, size = network(name)
    masks = benchmark_networks.masks_for(model, 0.9, scope="layer")
    dual = DualModel(model, masks).eval()
    example = torch.randn(17, *size)
    engine = dual.compile(example, backend="cpu", precision=precision)
    assert engine.backend == "cpu"
    plain = dual.compile(example, backend="reference", precision=precision)
    for batch in (17, 1, 3):
        x = torch.randn(batch, *size)
        rounding = 2 * worst(plain, dual, x)  # of PyTorch's own passes in this precision
        assert worst(engine, dual, x) < max(rounding, 1e-4)


@every
@pytest.mark.parametrize("kept", ["all", "none", "one"])
def test_all_ones_all_zeros_and_one_kept_weight(name: str, kept: str) -> None:
    model, size = network(name)
    masks = {}
    for parameter, mask in fastpie.prune(model, 0.5).items():
        masks[parameter] = torch.full_like(mask, kept == "all")
        if kept == "one":
            masks[parameter].view(-1)[mask.numel() // 3] = True
    dual = DualModel(model, masks).eval()
    x = torch.randn(3, *size)
    engine = dual.compile(x, backend="cpu")
    assert worst(engine, dual, x) < 1e-4
    if kept == "all":
        out = engine(x)
        assert torch.equal(out.dense, out.pruned)
