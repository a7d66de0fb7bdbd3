"""masked_conv inside torch: its operator samples, autograd, compile, export, autocast, transforms."""

from __future__ import annotations

import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from fastpie import ops
from fastpie.ops import masked_conv_sparse

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "nn.functional.conv1d": ops.masked_conv1d,
    "nn.functional.conv2d": ops.masked_conv2d,
    "nn.functional.conv3d": ops.masked_conv3d,
    "nn.functional.linear": ops.masked_linear,
}


@pytest.fixture(params=[True, False], ids=["kernels", "as_chosen"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both paths: the sparse kernels wherever they can compute, and what the rule chooses."""
    if request.param:
        monkeypatch.setattr(masked_conv_sparse, "is_worth", lambda *args, **kwargs: True)
    return bool(request.param)


def operator_info(name: str) -> Any:
    """Torch's description of one of its operators, with samples and errors."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:  # of which torch only derives its test class
            stub = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase
            sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db

    return next(info for info in op_db if info.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore")  # torch's own, of its internals and of "same" padding
def test_samples_of_torch(name: str, dtype: torch.dtype, path: bool) -> None:
    info, ours = operator_info(name), OPERATORS[name]
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        weight, *rest = sample.args
        for mask in (torch.ones(weight.shape, dtype=torch.bool), torch.rand(weight.shape) < 0.5):
            expected = info.op(sample.input, weight * mask, *rest, **sample.kwargs)
            found = ours(sample.input, weight, mask, *rest, **sample.kwargs)
            assert found.dtype is expected.dtype
            assert found.shape == expected.shape
            if mask.all() and not path:
                assert torch.equal(found, expected)
            tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype is torch.bfloat16 else {}
            torch.testing.assert_close(found, expected, **tolerance)
            if not expected.numel():
                continue
            tensors = [t for t in (sample.input, weight, *rest) if isinstance(t, Tensor)]
            gradient = torch.randn_like(expected)
            for a, b in zip(
                torch.autograd.grad(found, tensors, gradient),
                torch.autograd.grad(expected, tensors, gradient),
                strict=True,
            ):
                if dtype is torch.bfloat16:  # torch sums some of them in bf16
                    assert (a - b).abs().max() <= 0.05 * b.abs().max().clamp(min=1)
                else:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
            count += 1
    assert count > 10


@pytest.mark.parametrize("name", OPERATORS)
def test_errors_of_torch(name: str, path: bool) -> None:
    info = operator_info(name)
    if info.error_inputs_func is None:
        pytest.skip("torch lists none")
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        weight, *rest = sample.args
        mask = torch.ones(weight.shape, dtype=torch.bool)
        with pytest.raises(error.error_type, match=error.error_regex):
            OPERATORS[name](sample.input, weight, mask, *rest, **sample.kwargs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 0},
        {"stride": (1, 1, 1)},
        {"stride": 1.0},
        {"stride": "same"},
        {"padding": "full"},
        {"padding": -1},
        {"padding": "same", "stride": 2},
        {"padding": (1, 2, 3)},
        {"dilation": 0},
        {"dilation": 9},
        {"groups": 0},
        {"groups": 2},
        {"groups": 1.5},
        {"bias": torch.zeros(3)},
        {"bias": torch.zeros(4, dtype=torch.float64)},
        {"input": torch.zeros(2, 4, 6, 6)},
        {"input": torch.zeros(6, 6)},
        {"input": torch.zeros(1, 2, 3, 6, 6)},
        {"input": torch.zeros(2, 3, 2, 2)},
        {"input": torch.zeros(2, 3, 6, 6, dtype=torch.float64)},
        {"input": torch.zeros(2, 3, 6, 6, dtype=torch.bfloat16)},
        {"input": None},
    ],
    ids=lambda arguments: "_".join(f"{k}" for k in arguments),
)
def test_what_torch_refuses_is_refused_in_its_words(arguments: dict[str, Any], path: bool) -> None:
    weight = torch.randn(4, 3, 3, 3)
    kwargs = {"input": torch.randn(2, 3, 6, 6), "weight": weight, **arguments}
    with pytest.raises((RuntimeError, TypeError, ValueError)) as torchs:
        F.conv2d(**kwargs)
    with pytest.raises(torchs.type) as ours:
        ops.masked_conv2d(mask=torch.ones(4, 3, 3, 3, dtype=torch.bool), **kwargs)
    if torchs.type is RuntimeError:  # a TypeError lists how the arguments were passed
        assert str(ours.value) == str(torchs.value)


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(2, 4, 5, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 2, 3, 2, dtype=dtype, requires_grad=True)
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    return x, weight, torch.rand(weight.shape) < 0.5, bias


GEOMETRY = ([2, 1], [1, 0], [1, 2], 2)  # stride, padding, dilation, groups


def test_derivatives_in_float64() -> None:
    x, weight, mask, bias = leaves()

    def public(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, mask, bias, *GEOMETRY)

    def operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fastpie.masked_conv(x, weight, mask, bias, *GEOMETRY)

    for function in (public, operator):
        assert torch.autograd.gradcheck(function, (x, weight, bias))
        assert torch.autograd.gradgradcheck(function, (x, weight, bias))

    rows = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    kept = torch.rand(4, 5) < 0.5

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.fastpie.masked_conv(x, weight, kept, None, [], [], [], 1)

    assert torch.autograd.gradcheck(linear, (rows, matrix))
    assert torch.autograd.gradgradcheck(linear, (rows, matrix))


def test_second_derivatives_of_the_kernels(path: bool) -> None:
    x, weight, mask, bias = leaves(torch.float32)

    def penalty(x: Tensor, weight: Tensor, bias: Tensor, convolve: Callable[..., Tensor]) -> Any:
        y = convolve(x, weight, bias)
        first = torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))

    ours = penalty(x, weight, bias, lambda x, w, b: ops.masked_conv2d(x, w, mask, b, *GEOMETRY))
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    right = penalty(*exact, lambda x, w, b: F.conv2d(x, w * mask, b, *GEOMETRY))
    for a, b in zip(ours, right, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_operators_pass_opcheck(path: bool) -> None:
    x, weight, mask, bias = leaves(torch.float32)
    output = ops.masked_conv2d(x, weight, mask, bias, *GEOMETRY)
    gradient = torch.randn_like(output, requires_grad=True)
    fastpie = torch.ops.fastpie
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for input in (x, last):
        torch.library.opcheck(fastpie.masked_conv.default, (input, weight, mask, bias, *GEOMETRY))
    size = list(x.shape)
    torch.library.opcheck(
        fastpie.masked_conv_input_gradient.default, (gradient, weight, mask, size, *GEOMETRY)
    )
    torch.library.opcheck(
        fastpie.masked_conv_weight_gradient.default, (gradient, x, mask, *GEOMETRY)
    )
    rows, matrix = torch.randn(3, 2, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    kept = torch.rand(4, 5) < 0.5
    torch.library.opcheck(fastpie.masked_conv.default, (rows, matrix, kept, None, [], [], [], 1))


def test_compiles_into_one_graph_with_any_batch(path: bool) -> None:
    def function(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        y = ops.masked_conv2d(x * 2, weight, mask, bias, 1, "same").relu()
        return ops.masked_linear(y.flatten(2), line, line_mask).sum((1, 2))

    line = torch.randn(3, 20, requires_grad=True)
    line_mask = torch.rand(3, 20) < 0.5
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    _, weight, mask, bias = leaves(torch.float32)
    weight = weight.detach().repeat(1, 2, 1, 1).requires_grad_()
    mask = torch.rand(weight.shape) < 0.5
    for images in (2, 3, 7):
        x = torch.randn(images, 4, 5, 4, requires_grad=True)
        tensors = (x, weight, bias, line)
        found, right = (f(x, weight, mask, bias) for f in (compiled, function))
        torch.testing.assert_close(found, right)
        for a, b in zip(
            torch.autograd.grad(found.sum(), tensors),
            torch.autograd.grad(right.sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [True, False])
def test_exports_as_one_operator(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
            return ops.masked_conv2d(x, weight, mask)

    x, weight, mask = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.rand(4, 3, 3, 3) < 0.5
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        Model(), (x, weight, mask), dynamic_shapes=(batch, None, None), strict=strict
    )
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.fastpie.masked_conv.default in targets
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(program.module()(x, weight, mask), F.conv2d(x, weight * mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_conv2d(dtype: torch.dtype, path: bool) -> None:
    x, weight, mask, bias = leaves(torch.float32)
    with torch.autocast("cpu", dtype):
        for input in (x, x.to(torch.bfloat16)):
            ours = ops.masked_conv2d(input, weight, mask, bias, *GEOMETRY)
            torchs = F.conv2d(input, weight * mask, bias, *GEOMETRY)
            assert ours.dtype is torchs.dtype is dtype
            torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=5e-2)
        of_weight = torch.autograd.grad(ours.float().sum(), weight)[0]
        assert of_weight.dtype is torch.float32
        double = ops.masked_conv2d(x.double(), weight.double(), mask, bias.double(), *GEOMETRY)
        assert double.dtype is torch.float64


def test_transforms_of_torch_func_are_torchs() -> None:
    x, weight, mask, bias = (t.detach() for t in leaves(torch.float32))

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, mask, bias, *GEOMETRY)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight * mask, bias, *GEOMETRY)

    many, tangent = torch.randn(3, *x.shape), torch.randn_like(x)
    for transform in (
        lambda f: torch.func.vmap(f, (0, None))(many, weight),
        lambda f: torch.func.grad(lambda w: f(x, w).square().sum())(weight),
        lambda f: torch.func.vmap(torch.func.grad(lambda a: f(a, weight).sum()))(many),
        lambda f: torch.func.jvp(lambda a: f(a, weight), (x,), (tangent,))[1],
    ):
        torch.testing.assert_close(transform(ours), transform(torchs))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found, right = (forward_ad.unpack_dual(f(dual, weight)).tangent for f in (ours, torchs))
    torch.testing.assert_close(found, right)


def test_batched_gradients(path: bool) -> None:
    x, weight, mask, bias = leaves(torch.float32)
    ours = ops.masked_conv2d(x, weight, mask, bias, *GEOMETRY)
    torchs = F.conv2d(x, weight * mask, bias, *GEOMETRY)
    gradients = torch.randn(3, *ours.shape)
    tensors = (x, weight, bias)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, gradients, is_grads_batched=True),
        torch.autograd.grad(torchs, tensors, gradients, is_grads_batched=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_inference_tensors(path: bool) -> None:
    with torch.inference_mode():
        x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
        mask = torch.rand(weight.shape) < 0.5
        for _ in range(2):
            torch.testing.assert_close(
                ops.masked_conv2d(x, weight, mask), F.conv2d(x, weight * mask)
            )
            weight.add_(1)
            mask[0] = ~mask[0]
