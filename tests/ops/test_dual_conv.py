"""dual_conv1d, dual_conv2d, dual_conv3d and dual_linear against torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastpie import ops
from fastpie.errors import FastpieError
from tile_check import check_config

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
DUAL = {1: ops.dual_conv1d, 2: ops.dual_conv2d, 3: ops.dual_conv3d}


def _operands(
    rank: int, channels: int = 6, filters: int = 8, groups: int = 2, dtype: Any = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size, kernel = (7, 6, 5)[:rank], (3, 2, 3)[:rank]
    dense, pruned = (torch.randn(2, channels, *size, dtype=dtype) for _ in range(2))
    weight = torch.randn(filters, channels // groups, *kernel, dtype=dtype)
    return dense, pruned, weight, torch.rand(weight.shape) < 0.4, torch.randn(filters, dtype=dtype)


def _torch(
    rank: int, dense: Tensor, pruned: Tensor, weight: Tensor, mask: Tensor, *rest: Any
) -> Any:
    convolve = CONVOLUTIONS[rank]
    return convolve(dense, weight, *rest), convolve(pruned, weight * mask, *rest)


# ---------------------------------------------------------------------------- on the CPU


@pytest.mark.parametrize("padding", [0, 1, "valid", "same"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_is_two_convolutions(rank: int, padding: int | str) -> None:
    *tensors, bias = _operands(rank)
    rest = (bias, 1, padding, 2, 2)
    for actual, expected in zip(
        DUAL[rank](*tensors, *rest), _torch(rank, *tensors, *rest), strict=True
    ):
        assert torch.equal(actual, expected)


def test_is_two_linear_layers() -> None:
    dense, pruned = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    weight, bias = torch.randn(6, 5), torch.randn(6)
    mask = torch.rand(weight.shape) < 0.5
    actual = ops.dual_linear(dense, pruned, weight, mask, bias)
    assert torch.equal(actual[0], functional.linear(dense, weight, bias))
    assert torch.equal(actual[1], functional.linear(pruned, weight * mask, bias))


def test_takes_an_image_without_a_batch() -> None:
    dense, pruned, weight, mask, bias = _operands(2)
    actual = ops.dual_conv2d(dense[0], pruned[0], weight, mask, bias, groups=2)
    expected = _torch(2, dense[0], pruned[0], weight, mask, bias, 1, 0, 1, 2)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_is_that_of_conv2d(dtype: torch.dtype) -> None:
    *tensors, bias = _operands(2)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        actual = ops.dual_conv2d(*tensors, bias, groups=2)
        expected = _torch(2, *tensors, bias, 1, 0, 1, 2)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype is b.dtype is dtype
        assert torch.equal(a, b)


def test_gradients_reach_both_inputs_weight_and_bias() -> None:
    dense, pruned, weight, mask, bias = _operands(2, 2, 2, 1, torch.float64)
    leaves = [t[:1, :, :4, :4].requires_grad_() for t in (dense, pruned)]
    leaves += [weight.requires_grad_(), bias.requires_grad_()]

    def function(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Any:
        return ops.dual_conv2d(x, y, w, mask, b)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_a_functorch_transform_goes_through() -> None:
    dense, pruned, weight, mask, bias = _operands(2)
    batched = torch.func.vmap(lambda x, y: ops.dual_conv2d(x, y, weight, mask, bias, groups=2))(
        dense.unsqueeze(1), pruned.unsqueeze(1)
    )
    expected = _torch(2, dense, pruned, weight, mask, bias, 1, 0, 1, 2)
    for a, b in zip(batched, expected, strict=True):
        torch.testing.assert_close(a.squeeze(1), b)


def test_compiles_into_one_graph() -> None:
    *tensors, bias = _operands(2)
    compiled = torch.compile(
        lambda *t: ops.dual_conv2d(*t, bias, groups=2), backend="aot_eager", fullgraph=True
    )
    for a, b in zip(compiled(*tensors), _torch(2, *tensors, bias, 1, 0, 1, 2), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, w, m: (x, w, m.float()),
        lambda x, w, m: (x, w, m[:1]),
        lambda x, w, m: (x, w, None),
    ],
)
def test_refuses_what_is_no_mask(spoil: Callable[..., Any]) -> None:
    dense, pruned, weight, mask, _ = _operands(2)
    _, weight, mask = spoil(dense, weight, mask)
    with pytest.raises(FastpieError, match="mask"):
        ops.dual_conv2d(dense, pruned, weight, mask, groups=2)


def test_torch_refuses_the_rest() -> None:
    dense, pruned, weight, mask, _ = _operands(2)
    with pytest.raises(RuntimeError):
        ops.dual_conv2d(dense, pruned, weight, mask)  # groups do not fit


# ---------------------------------------------------------------------------- the operators


@pytest.fixture
def operators() -> Any:
    pytest.importorskip("triton", reason="the package triton is not installed")
    return importlib.import_module("fastpie.ops.dual_conv_kernels")


WINDOW = ([2, 1], [1, 0], [1, 2], 2)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    """On the CPU they compute with torch, under the schemas and derivatives that a GPU uses."""
    dense, pruned, weight, mask, bias = _operands(2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (dense, pruned, weight, bias)]
    other = None if shared else leaves[1]
    operands = (leaves[0], other, leaves[2], mask, leaves[3], *WINDOW)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not shared:  # slow, and the same for both
        tests += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(torch.ops.fastpie.dual_conv.default, operands, test_utils=tests)
    given = [torch.randn_like(y) for y in torch.ops.fastpie.dual_conv(*operands)]
    given = [g.detach().requires_grad_() for g in given]
    torch.library.opcheck(
        torch.ops.fastpie.dual_conv_input_gradient.default,
        (*given, leaves[2], mask, list(dense.shape), *WINDOW),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.fastpie.dual_conv_weight_gradient.default,
        (*given, leaves[0], other, mask, *WINDOW),
        test_utils=tests,
    )


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_derivatives_of_the_operators(shared: bool, linear: bool) -> None:
    if linear:
        leaves = [torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)]
        window: tuple[Any, ...] = ([], [], [], 1)
    else:
        dense, pruned, weight, _, bias = _operands(2, 2, 2, 2)
        leaves = [dense[:1, :, :4, :4], pruned[:1, :, :4, :4], weight, bias]
        window = WINDOW
    leaves = [t.double().requires_grad_() for t in leaves]
    mask = torch.rand(leaves[2].shape) < 0.5

    def function(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Any:
        return torch.ops.fastpie.dual_conv(x, None if shared else y, w, mask, b, *window)

    if shared:
        used = [leaves[0], *leaves[2:]]
        closed: Callable[..., Any] = lambda x, w, b: function(x, leaves[1], w, b)
    else:
        used, closed = leaves, function
    assert torch.autograd.gradcheck(closed, used, fast_mode=True)
    assert torch.autograd.gradgradcheck(closed, used, fast_mode=True)


# ---------------------------------------------------------------------------- on a GPU

on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limit = 2.0**-6 if dtype is torch.bfloat16 else 2.0**-8
    error = (actual.double() - expected).abs() / expected.abs().max()
    assert error.isfinite().all()
    assert error.max() <= limit


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize(
        ("rank", "channels", "filters", "stride", "groups"),
        [
            (2, 64, 64, 1, 1),
            (2, 130, 70, 2, 1),
            (2, 96, 64, 2, 2),
            (2, 3, 40, 2, 1),
            (2, 48, 48, 1, 48),
            (1, 40, 200, 1, 1),
            (3, 32, 48, 2, 1),
            (0, 200, 100, 1, 1),
        ],
    )
    def test_kernels_against_torch(
        self,
        operators: Any,
        rank: int,
        channels: int,
        filters: int,
        stride: int,
        groups: int,
        shared: bool,
        dtype: torch.dtype,
    ) -> None:
        size, kernel = (17, 12, 9)[:rank], (3, 3, 2)[:rank]
        x, y = (torch.randn(5, channels, *size, device="cuda", dtype=dtype) for _ in range(2))
        weight = torch.randn(filters, channels // groups, *kernel, device="cuda", dtype=dtype)
        weight = weight / weight[0].numel() ** 0.5
        bias = torch.randn(filters, device="cuda", dtype=dtype)
        mask = torch.rand(weight.shape, device="cuda") < 0.3
        assert operators.is_served(x, weight)

        def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, y, weight, bias)]
            outputs = function(*leaves)
            generator = torch.Generator("cuda").manual_seed(1)
            given = [
                torch.randn(o.shape, generator=generator, device="cuda").to(weight.dtype).to(dtype)
                for o in outputs
            ]
            used = [leaves[0], *leaves[2:]] if shared else leaves
            return [*outputs, *torch.autograd.grad(outputs, used, given)]

        def ours(a: Tensor, b: Tensor, w: Tensor, c: Tensor) -> Any:
            b = a if shared else b
            if rank == 0:
                return ops.dual_linear(a, b, w, mask, c)
            return DUAL[rank](a, b, w, mask, c, stride, 1, 1, groups)

        def theirs(a: Tensor, b: Tensor, w: Tensor, c: Tensor) -> Any:
            b = a if shared else b
            if rank == 0:
                return functional.linear(a, w, c), functional.linear(b, w * mask, c)
            return _torch(rank, a, b, w, mask, c, stride, 1, 1, groups)

        actual, again = run(ours, dtype), run(ours, dtype)
        for a, expected in zip(actual, run(theirs, torch.float64), strict=True):
            _close(a, expected, dtype)
        for a, b in zip(actual[:2], again[:2], strict=True):
            assert torch.equal(a, b)

    def test_every_configuration_is_right(self, operators: Any) -> None:
        kernels = operators.triton_kernels
        for channels, filters, size, kernel, groups in [
            (64, 64, 14, 3, 1),
            (256, 200, 9, 1, 1),
            (24, 40, 9, 3, 1),
            (3, 64, 31, 7, 1),
            (1, 96, 15, 3, 96),
            (40, 64, 9, 3, 2),
        ]:
            x = torch.randn(3, size, size, channels * groups, device="cuda").bfloat16()
            images = x.movedim(-1, 1)
            y = torch.empty(3, size, size, filters, device="cuda", dtype=x.dtype).movedim(-1, 1)
            weight = torch.randn(filters, kernel, kernel, channels, device="cuda").bfloat16()
            words = torch.zeros(
                filters, kernel * kernel, -(-channels // 32), dtype=torch.int32, device="cuda"
            )
            of_filters = torch.randn(filters, device="cuda")
            for models in (1, 2):
                pair = [of_filters] * models
                operands = (
                    [images] * models,
                    weight,
                    [None] * (models - 1) + [words],
                    pair,
                    pair,
                    [y] * models,
                    [y] * models,
                    [1, 1],
                    [kernel // 2] * 2,
                    [1, 1],
                    groups,
                    ("relu", 0.0),
                )
                for config in kernels.masked_conv_configs(channels, filters, groups, models=models):
                    assert check_config(config, *operands) is None

    def test_an_all_ones_mask_gives_equal_bits(self, operators: Any) -> None:
        x = torch.randn(4, 64, 14, 14, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(96, 64, 3, 3, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones_like(weight, dtype=torch.bool)
        for other in (x, x.clone()):
            dense, pruned = ops.dual_conv2d(x, other, weight, mask, padding=1)
            assert torch.equal(dense, pruned)

    def test_autocast_takes_the_kernels(self, operators: Any) -> None:
        x = torch.randn(2, 32, 9, 9, device="cuda")
        weight = torch.randn(48, 32, 3, 3, device="cuda", requires_grad=True)
        mask = torch.rand(weight.shape, device="cuda") < 0.5
        with torch.autocast("cuda", torch.bfloat16):
            dense, _ = ops.dual_conv2d(x, x, weight, mask)
        assert dense.dtype is torch.bfloat16
        dense.sum().backward()
        assert weight.grad is not None
        assert weight.grad.dtype is torch.float32

    # A kernel that torch.compile launches cannot say whether it wants contraction.
    @pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
    def test_torch_compile_sees_through(self, operators: Any) -> None:
        x, y = (torch.randn(2, 32, 9, 9, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight = torch.randn(48, 32, 3, 3, device="cuda", dtype=torch.bfloat16)
        mask = torch.rand(weight.shape, device="cuda") < 0.5

        def layer(x: Tensor, y: Tensor, weight: Tensor) -> Any:
            dense, pruned = ops.dual_conv2d(x, y, weight, mask, padding=1)
            return dense.relu(), pruned.relu()

        leaves = [t.requires_grad_() for t in (x, y, weight)]
        compiled = torch.compile(layer, fullgraph=True)
        for a, b in zip(compiled(*leaves), layer(*leaves), strict=True):
            _close(a, b.double(), torch.bfloat16)
        gradients = [
            torch.autograd.grad(sum(o.float().sum() for o in f(*leaves)), leaves)
            for f in (compiled, layer)
        ]
        for a, b in zip(*gradients, strict=True):
            _close(a, b.double(), torch.bfloat16)

    def test_a_cuda_graph_holds_the_kernels(self, operators: Any) -> None:
        x = torch.randn(2, 32, 9, 9, device="cuda", dtype=torch.float16)
        weight = torch.randn(48, 32, 3, 3, device="cuda", dtype=torch.float16)
        mask = torch.rand(weight.shape, device="cuda") < 0.5
        expected = ops.dual_conv2d(x, x, weight, mask)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = ops.dual_conv2d(x, x, weight, mask)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
