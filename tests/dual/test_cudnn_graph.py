"""Layers as graphs of cuDNN, whose library runs on a GPU only: a stand-in computes the nodes.

It takes the arguments that nvidia-cudnn-frontend 1.10 to 1.32 take, and computes with torch.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastpie
from fake_gpu import FakeDevice
from fastpie import DualModel
from fastpie.dual.gpu import available, cudnn_graph
from fastpie.dual.gpu.kernels import Torch
from networks import Network


class _Node:
    """A tensor of a graph: given, or computed from others."""

    def __init__(self, compute: Callable[[dict[Any, Tensor]], Tensor] | None, dim: Any) -> None:
        self.compute, self.dim, self.stride = compute, dim, None
        self.is_output = False

    def value(self, given: dict[Any, Tensor]) -> Tensor:
        return given[self].float() if self.compute is None else self.compute(given)

    def set_output(self, yes: bool) -> _Node:
        self.is_output = yes
        return self

    def set_data_type(self, dtype: Any) -> _Node:
        self.dtype = dtype
        return self

    def set_dim(self, dim: list[int]) -> None:
        self.dim = dim

    def set_stride(self, stride: list[int]) -> None:
        self.stride = stride


class _Graph:
    def __init__(
        self, *, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any, handle: Any
    ) -> None:
        assert intermediate_data_type == compute_data_type == "FLOAT"
        self.given: list[tuple[_Node, list[int]]] = []
        self.built = False

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: Any) -> _Node:
        node = _Node(None, dim)
        self.given.append((node, stride))
        return node

    def conv_fprop(
        self, *, image: _Node, weight: _Node, pre_padding: Any, post_padding: Any, stride: Any,
        dilation: Any, compute_data_type: Any,
    ) -> _Node:  # fmt: skip
        sides = [p for pair in zip(pre_padding, post_padding, strict=True) for p in pair]
        pad = [p for d in reversed(range(len(stride))) for p in sides[2 * d : 2 * d + 2]]
        groups = image.dim[1] // weight.dim[1]
        convolve = functional.conv2d if len(stride) == 2 else functional.conv3d

        def compute(given: dict[Any, Tensor]) -> Tensor:
            x = functional.pad(image.value(given), pad)
            return convolve(x, weight.value(given), None, stride, 0, dilation, groups)

        return _Node(compute, None)

    def bias(self, *, input: _Node, bias: _Node) -> _Node:
        return _Node(lambda given: input.value(given) + bias.value(given), None)

    def add(self, *, a: _Node, b: _Node) -> _Node:
        return _Node(lambda given: a.value(given) + b.value(given), None)

    def relu(
        self, *, input: _Node, negative_slope: float = 0.0, lower_clip: Any = None,
        upper_clip: float = float("inf"),
    ) -> _Node:  # fmt: skip
        return _Node(
            lambda given: functional.leaky_relu(input.value(given), negative_slope).clamp(
                max=upper_clip
            ),
            None,
        )

    def swish(self, *, input: _Node) -> _Node:
        return _Node(lambda given: functional.silu(input.value(given)), None)

    def gelu(self, *, input: _Node) -> _Node:
        return _Node(lambda given: functional.gelu(input.value(given)), None)

    def gelu_approx_tanh(self, *, input: _Node) -> _Node:
        return _Node(lambda given: functional.gelu(input.value(given), approximate="tanh"), None)

    def build(self, heuristics: list[str]) -> None:
        assert heuristics == ["A", "FALLBACK"]
        self.built = True

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, tensors: dict[_Node, Tensor], workspace: Tensor, *, handle: Any) -> None:
        assert self.built
        assert handle == "handle"
        for node, stride in self.given:
            x = tensors[node]
            assert list(x.shape) == node.dim
            assert [s for s, n in zip(x.stride(), node.dim, strict=True) if n > 1] == [
                s for s, n in zip(stride, node.dim, strict=True) if n > 1
            ]
        (output,) = (node for node in tensors if node.is_output)
        assert list(tensors[output].shape) == output.dim
        tensors[output].copy_(output.value(tensors))


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("cudnn")
    names = {"BFLOAT16": "BFLOAT16", "HALF": "HALF", "FLOAT": "FLOAT"}
    module.data_type = types.SimpleNamespace(**names)  # type: ignore[attr-defined]
    module.heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")  # type: ignore[attr-defined]
    module.pygraph = _Graph  # type: ignore[attr-defined]
    module.create_handle = lambda: "handle"  # type: ignore[attr-defined]
    module.set_stream = lambda *, handle, stream: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cudnn", module)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(available, "device_of", lambda _: FakeDevice())
    monkeypatch.setattr(available, "unusable_reason", lambda *_: None)
    monkeypatch.setattr(available, "families_of", lambda _: [Torch(), cudnn_graph.CudnnGraph()])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=2)
        self.even = nn.Conv2d(8, 8, 4, padding="same", groups=2)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.slope = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(x))
        y = functional.silu(self.even(x))
        z = functional.relu(self.norm(self.wide(y)) + x)
        z = functional.gelu(self.even(z))
        z = functional.gelu(self.even(z), approximate="tanh")
        z = functional.hardswish(self.even(z))  # not among cuDNN's nodes
        return self.slope(self.even(z)).mean((2, 3))


def _volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())


@pytest.mark.usefixtures("cudnn", "captured_once")
@pytest.mark.parametrize(
    ("network", "kernels"),
    [(Network("layers", Layers, ((3, 20, 18),)), 6), (Network("3d", _volumes, ((2, 5, 6, 7),)), 1)],
    ids=["2d", "3d"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_layers(
    network: Network, kernels: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(self: Any, key: Any, work: Any) -> float:
        work()()  # checked against torch here
        return 1.0 if key[-1] == "torch" else 1e-3

    monkeypatch.setattr("fastpie.dual.tuning.Tuner.seconds", seconds)
    model, (x,) = network.build().eval(), network.inputs(4)
    dual = DualModel(model, fastpie.prune(model, 0.5)).eval()
    engine = dual.compile(x, backend="cuda", precision=precision)
    chosen = [kernel for groups in engine.plan["steps"].values() for _, kernel in groups]
    assert chosen.count("cudnn graph") == 2 * kernels
    out, want = engine(x), dual(x)
    within = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}[precision]
    torch.testing.assert_close(out.pruned, want.pruned.detach(), rtol=within, atol=within)


def test_the_reason_is_said() -> None:
    reason = cudnn_graph.unusable_reason()
    assert reason is None or "nvidia-cudnn-frontend" in reason or "no CUDA device" in reason
