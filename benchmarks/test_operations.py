"""Masked convolutions and linear layers against torch's own, layer by layer (pytest-benchmark).

    python -m pytest benchmarks/test_operations.py --network resnet50 --batch 16 --sparsity 0.9

A group of the table is one layer of the network; "torch" is its dense operator, channels last. Not
part of `make test`. To compare commits: `--benchmark-save`, then `--benchmark-compare`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import networks
from fastpie import ops

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest output


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    layers = networks.layers_of(option("network"))
    if option("short"):
        layers = layers[1::4]
    metafunc.parametrize("layer", layers, ids=str)


class Operands:
    """Input, weight and mask of a layer, and how torch and fastpie call it."""

    def __init__(self, layer: networks.Layer, config: pytest.Config) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if config.getoption("dtype") == "bf16" else torch.float32
        self.layer = layer
        self.x = torch.randn(config.getoption("batch"), *layer.input).to(dtype)
        self.weight = (torch.randn(layer.weight) * 0.05).to(dtype)
        kept = round((1 - config.getoption("sparsity")) * self.weight.numel())
        order = self.weight.abs().flatten().argsort(descending=True)
        self.mask = torch.zeros(self.weight.numel(), dtype=torch.bool)
        self.mask[order[:kept]] = True
        self.mask = self.mask.view(layer.weight)
        self.arguments = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }

    @property
    def kind(self) -> str:
        return "linear" if self.layer.stride is None else f"conv{self.weight.ndim - 2}d"

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kind == "linear":
            return functional.linear(x, weight)
        return getattr(functional, self.kind)(x, weight, **self.arguments)

    def masked(self, x: Tensor) -> Tensor:
        operator = getattr(ops, f"masked_{self.kind}")
        arguments = {} if self.kind == "linear" else self.arguments
        return operator(x, self.weight, self.mask, **arguments)


@pytest.fixture
def operands(layer: networks.Layer, request: pytest.FixtureRequest, benchmark: Any) -> Operands:
    config = request.config
    benchmark.group = str(layer)
    benchmark.extra_info.update(
        {name: config.getoption(name) for name in ("network", "batch", "sparsity", "dtype")},
        layers_like_it=layer.count,
    )
    return Operands(layer, config)


def test_torch(operands: Operands, benchmark: Any) -> None:
    x, weight = operands.x, operands.weight
    if x.ndim in _LAYOUTS:
        x = x.contiguous(memory_format=_LAYOUTS[x.ndim])
        weight = weight.contiguous(memory_format=_LAYOUTS[x.ndim])
    with torch.no_grad():
        benchmark(operands.dense, x, weight)


def test_masked(operands: Operands, benchmark: Any) -> None:
    if not hasattr(ops, f"masked_{operands.kind}"):
        pytest.skip(f"there is no fastpie.ops.masked_{operands.kind}")
    with torch.no_grad():
        got = benchmark(operands.masked, operands.x)
        want = operands.dense(operands.x, operands.weight * operands.mask)
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    assert error <= _TOLERANCE[operands.x.dtype]
