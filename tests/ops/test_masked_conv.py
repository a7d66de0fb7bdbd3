"""The operators masked_conv1d, 2d, 3d and masked_linear: values, gradients, layouts, kernels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpie import _C, FastpieError, ops
from fastpie.ops import masked_conv_sparse, reference

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MASKED = {1: ops.masked_conv1d, 2: ops.masked_conv2d, 3: ops.masked_conv3d}


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that the kernels can compute goes to them; gives the list of those calls."""
    calls: list[str] = []
    monkeypatch.setattr(masked_conv_sparse, "is_worth", lambda *args, **kwargs: True)
    for name in ("forward", "input_gradient", "weight_gradient"):
        original = getattr(masked_conv_sparse, name)

        def counted(*args: Any, _name: str = name, _original: Callable = original) -> Any:
            calls.append(_name)
            return _original(*args)

        monkeypatch.setattr(masked_conv_sparse, name, counted)
    return calls


@dataclass
class Case:
    rank: int
    input: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...]  # stride, padding, dilation, groups


def random_case(generator: random.Random) -> Case:
    """Odd sizes, strides, dilations, groups, layouts and densities."""
    pick = generator.choice
    while True:
        rank = pick([1, 2, 2, 3])
        images, groups = pick([1, 2, 3, 17]), pick([1, 1, 2, 4])
        channels, out_channels = groups * pick([1, 2, 5, 16]), groups * pick([1, 3, 20])
        size = [pick([1, 4, 7, 9, 23]) for _ in range(rank)]
        kernel = [pick([1, 2, 3, 5]) for _ in range(rank)]
        stride = tuple(pick([1, 1, 2, 3]) for _ in range(rank))
        padding = tuple(pick([0, 1, 2, 6]) for _ in range(rank))
        dilation = tuple(pick([1, 1, 2]) for _ in range(rank))
        axes = zip(size, padding, dilation, kernel, strict=True)
        if all(n + 2 * p > d * (k - 1) for n, p, d, k in axes):
            break
    x = torch.randn(images, channels, *size)
    layout = pick(["contiguous", "channels_last", "transposed", "every_second", "expanded"])
    if layout == "channels_last" and rank > 1:
        x = x.to(memory_format=[torch.channels_last, torch.channels_last_3d][rank - 2])
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "every_second":
        x = torch.randn(images, channels, *size[:-1], 2 * size[-1])[..., ::2]
    elif layout == "expanded":
        x = x[:1].expand_as(x)
    weight = torch.randn(out_channels, channels // groups, *kernel)
    if pick([True, False]):
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    mask = torch.rand(weight.shape) < pick([0, 0.1, 0.5, 1])
    bias = torch.randn(out_channels) if pick([True, False]) else None
    return Case(rank, x, weight, mask, bias, (stride, padding, dilation, groups))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    scale = max(1.0, expected.abs().max().item())
    return ((actual.double() - expected).abs().max() / scale).item()


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_those_of_a_float64_convolution(
    dtype: torch.dtype, capability: str, sparse: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    generator = random.Random(capability)
    tolerance = 3e-6 if dtype is torch.float32 else 2e-2
    for _ in range(40):
        case = random_case(generator)
        leaves = [t for t in (case.input, case.weight, case.bias) if t is not None]
        ours = [t.to(dtype).detach().requires_grad_() for t in leaves]
        exact = [t.detach().double().requires_grad_() for t in ours]
        bias = ours[2] if len(ours) == 3 else None
        output = MASKED[case.rank](ours[0], ours[1], case.mask, bias, *case.geometry)
        bias = exact[2] if len(exact) == 3 else None
        expected = CONV[case.rank](exact[0], exact[1] * case.mask, bias, *case.geometry)
        assert output.dtype is dtype
        assert relative_error(output, expected) < tolerance, case
        gradient = torch.randn_like(output)
        found = torch.autograd.grad(output, ours, gradient)
        right = torch.autograd.grad(expected, exact, gradient.double())
        for name, a, b in zip(["input", "weight", "bias"], found, right, strict=False):
            assert a.dtype is dtype
            assert relative_error(a, b) < tolerance, (name, case)
        assert not found[1][~case.mask].any()
    assert sparse.count("forward") == 40
    assert sparse.count("input_gradient") == sparse.count("weight_gradient") == 40


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("shape", [(5,), (1, 5), (40, 5), (300, 64), (2, 3, 64)])
def test_linear_equals_a_float64_product(
    shape: tuple[int, ...], capability: str, sparse: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    leaves = [torch.randn(shape), torch.randn(7, shape[-1]), torch.randn(7)]
    mask = torch.rand(7, shape[-1]) < 0.4
    ours = [t.requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    output = ops.masked_linear(ours[0], ours[1], mask, ours[2])
    expected = F.linear(exact[0], exact[1] * mask, exact[2])
    assert relative_error(output, expected) < 3e-6
    gradient = torch.randn_like(output)
    found = torch.autograd.grad(output, ours, gradient)
    right = torch.autograd.grad(expected, exact, gradient.double())
    for a, b in zip(found, right, strict=True):
        assert relative_error(a, b) < 1e-5
    assert len(sparse) == 3


def test_twin_equals_torch() -> None:
    generator = random.Random(7)
    for _ in range(10):
        case = random_case(generator)
        case.mask &= torch.rand(case.mask.shape) < 0.1
        x, weight = case.input.double(), case.weight.double()
        bias = None if case.bias is None else case.bias.double()
        expected = CONV[case.rank](x, weight * case.mask, bias, *case.geometry)
        found = reference.masked_conv(x, weight, case.mask, bias, *case.geometry)
        torch.testing.assert_close(found, expected)
    x, weight, mask = torch.randn(2, 3, 5), torch.randn(4, 5), torch.rand(4, 5) < 0.5
    found = reference.masked_linear(x, weight, mask, torch.ones(4))
    torch.testing.assert_close(found, F.linear(x, weight * mask, torch.ones(4)))


def test_all_ones_mask_is_torch_bit_for_bit() -> None:
    x, weight, bias = torch.randn(8, 64, 28, 28), torch.randn(64, 64, 3, 3), torch.randn(64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    mask = torch.ones_like(weight, dtype=torch.bool)
    ours = ops.masked_conv2d(x, weight, mask, bias, 1, 1)
    torchs = F.conv2d(x, weight, bias, 1, 1)
    assert torch.equal(ours, torchs)
    gradient = torch.randn_like(ours)
    found, right = (torch.autograd.grad(y, leaves, gradient) for y in (ours, torchs))
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])
    torch.testing.assert_close(found[2], right[2], rtol=1e-4, atol=1e-3)  # another order of sums
    x, weight = torch.randn(5, 7, 300), torch.randn(200, 300)
    mask = torch.ones_like(weight, dtype=torch.bool)
    assert torch.equal(ops.masked_linear(x, weight, mask), F.linear(x, weight))


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_strides_of_the_output_are_those_of_torch(
    rank: int, forced: bool, request: pytest.FixtureRequest
) -> None:
    if forced:
        request.getfixturevalue("sparse")
    last = [torch.contiguous_format, torch.channels_last, torch.channels_last_3d][rank - 1]
    for images, channels, out_channels in ((2, 8, 8), (1, 1, 3), (3, 4, 1)):
        for size, kernel in ((6, 3), (3, 3), (5, 1)):
            if rank == 3:
                images = 16  # torch's kernel for small 3D inputs forgets the memory format
            x = torch.randn(images, channels, *[size] * rank)
            weight = torch.randn(out_channels, channels, *[kernel] * rank)
            mask = torch.rand(weight.shape) < 0.5
            views = [x, x.movedim(1, -1).contiguous().movedim(-1, 1), *([x[0]] if rank < 3 else [])]
            weights = [weight, weight.to(memory_format=last)]
            for a in views:
                for w in weights:
                    ours = MASKED[rank](a, w, mask)
                    torchs = CONV[rank](a, torch.empty_like(w).copy_(w * mask))
                    torch.testing.assert_close(ours, torchs)
                    same = [
                        s == t
                        for n, s, t in zip(ours.shape, ours.stride(), torchs.stride(), strict=True)
                        if n > 1
                    ]
                    assert all(same), (a.shape, a.stride(), ours.stride(), torchs.stride())


@pytest.mark.parametrize("padding", ["same", "valid", 1, (1, 2), (1,)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (4, 1)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_paddings(padding: Any, kernel: tuple[int, int], sparse: list[str]) -> None:
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(4, 3, *kernel)
    mask = torch.rand(weight.shape) < 0.5
    for dilation in (1, (2, 1)):
        ours = ops.masked_conv2d(x, weight, mask, None, 1, padding, dilation)
        torch.testing.assert_close(ours, F.conv2d(x, weight * mask, None, 1, padding, dilation))
    assert len(sparse) == 2


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.complex64, torch.int64, torch.bool]
)
def test_other_dtypes_are_torch_or_refused_by_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 6, 6).to(dtype), torch.randn(4, 3, 3, 3).to(dtype)
    mask = torch.rand(weight.shape) < 0.5
    try:
        expected = F.conv2d(x, weight * mask)
    except RuntimeError as error:
        refusal = str(error)
    else:
        assert torch.equal(ops.masked_conv2d(x, weight, mask), expected)
        return
    with pytest.raises(RuntimeError) as ours:
        ops.masked_conv2d(x, weight, mask)
    assert str(ours.value) == refusal


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (2, 0, 6, 6)])
def test_empty_batch_and_no_channels(shape: tuple[int, ...], sparse: list[str]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(4, shape[1], 3, 3, requires_grad=True)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    bias = torch.randn(4)
    try:
        expected = F.conv2d(x, weight, bias)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            ops.masked_conv2d(x, weight, mask, bias)
        return
    output = ops.masked_conv2d(x, weight, mask, bias)
    assert torch.equal(output, expected)
    for a, b in zip(
        torch.autograd.grad(output.sum(), (x, weight)),
        torch.autograd.grad(expected.sum(), (x, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_masks_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    for bad in (mask.float(), mask[:3], mask[:, :, :1], mask.to("meta"), None, 1):
        with pytest.raises(FastpieError, match="mask"):
            ops.masked_conv2d(x, weight, bad)
    with pytest.raises(FastpieError, match="weight"):
        ops.masked_conv2d(x, None, mask)
    with pytest.raises(FastpieError, match=r"\[4, 3\]"):
        ops.masked_linear(torch.randn(2, 3), torch.randn(4, 3), mask)


def test_what_meets_masked_places_alone_leaves_no_trace(sparse: list[str]) -> None:
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    mask = torch.rand(weight.shape) < 0.5
    mask[:, 1] = False
    expected = ops.masked_conv2d(x, weight, mask)
    x[:, 1] = torch.nan
    weight[~mask] = torch.inf
    assert torch.equal(ops.masked_conv2d(x, weight, mask), expected)


def test_shapes_and_density_alone_choose_the_path() -> None:
    geometry = masked_conv_sparse.Geometry(
        (1, 56, 56), (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1
    )
    worth = masked_conv_sparse.is_worth
    highest = masked_conv_sparse.FORWARD_DENSITY
    assert worth(geometry, 8, 64, 64, 0.1, highest)
    assert not worth(geometry, 8, 64, 64, highest, highest)
    small = masked_conv_sparse.Geometry((1, 8, 8), *[(1, 1, 1)] * 2, (0, 0, 0), (1, 1, 1), 1)
    assert not worth(small, 1, 16, 16, 0.0, highest)


def test_thread_count_does_not_change_a_bit(sparse: list[str], restore_threads: None) -> None:
    leaves = [torch.randn(5, 24, 13, 13), torch.randn(40, 24, 3, 3)]
    mask = torch.rand(40, 24, 3, 3) < 0.2
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, weight = (t.clone().requires_grad_() for t in leaves)
        y = ops.masked_conv2d(x, weight, mask, None, 2, 1)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_slices_of_the_batch_do_not_change_a_bit(
    sparse: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [torch.randn(37, 8, 7, 7), torch.randn(12, 8, 3, 3)]
    mask = torch.rand(12, 8, 3, 3) < 0.3
    results = []
    for size in (2**30, 2**10):
        monkeypatch.setattr(masked_conv_sparse, "_SLICE_BYTES", size)
        x, weight = (t.clone().requires_grad_() for t in leaves)
        y = ops.masked_conv2d(x, weight, mask, None, 1, 1)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_very_large_geometries_are_torchs(sparse: list[str]) -> None:
    assert not masked_conv_sparse.is_possible(
        masked_conv_sparse.Geometry((512, 512, 512), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
        1,
        64,
    )
    x, weight = torch.randn(1, 1, 6000), torch.randn(1, 1, 5000)
    mask = torch.rand(weight.shape) < 0.5
    torch.testing.assert_close(
        ops.masked_conv1d(x, weight, mask), F.conv1d(x, weight * mask), rtol=1e-4, atol=1e-3
    )
    assert sparse == []
    assert math.prod(weight.shape) > masked_conv_sparse._TAPS
