"""The Triton convolutions under Triton's interpreter, on the CPU, against torch in fp64.

`TRITON_INTERPRET=1 pytest -m triton_interpreter`: see test_interpreter.py.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastpie.errors import FastpieError
from fastpie.ops import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from fastpie.triton_kernels import TileConfig

from fastpie import triton_kernels
from tile_check import activation_function, check_config

kernels = importlib.import_module("fastpie.triton_kernels.masked_conv")
launch = importlib.import_module("fastpie.triton_kernels.launch")

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TILE = TileConfig(32, 32, 32)
DIRECT = TileConfig(64, 16, 0, 4, 1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 2 else x.contiguous()


def _poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _channels_last(torch.full(tuple(shape), torch.nan, dtype=dtype))


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1.0)
    assert actual.isfinite().all()
    assert ((actual.double() - expected).abs() / scale).max() <= TOLERANCE[actual.dtype]


def _layer(
    models: str,  # "dual", "shared" or "single"
    images: int,
    channels: int,
    filters: int,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """Random operands; each model has its scales and biases, the last one a mask."""
    count = 1 if models == "single" else 2
    inputs = [
        _channels_last(torch.randn(images, channels * groups, *size).to(dtype))
        for _ in range(1 if models == "shared" else count)
    ]
    inputs = inputs * count if models == "shared" else inputs
    weight = (torch.randn(filters, *kernel, channels) / math.sqrt(channels)).to(dtype)
    mask = torch.rand(filters, channels, *kernel) < 0.4
    masks = [None] * (count - 1) + [reference.pack_mask(mask)]
    scales = [torch.randn(filters) for _ in range(count)]
    biases = [torch.randn(filters) for _ in range(count)]
    window = (list(stride), list(padding), list(dilation), groups)
    return inputs, weight, masks, scales, biases, window


def _twin(
    inputs: list[Tensor],
    weight: Tensor,
    masks: list[Tensor | None],
    scales: list[Tensor | None],
    biases: list[Tensor | None],
    residuals: list[Tensor | None],
    window: tuple[Any, ...],
    activation: tuple[str, float] = ("none", 0.0),
) -> list[Tensor]:
    doubles = [[None if t is None else t.double() for t in x] for x in (inputs, residuals)]
    return reference.masked_conv_nhwc(
        doubles[0],
        weight.double(),
        masks,
        scales,
        biases,
        doubles[1],
        *window,
        activation_function(activation),
    )


# models, images, channels of a group, filters, size, kernel, stride, padding, dilation, groups, dtype
CASES = {
    "3x3": ("dual", 1, 40, 24, (7, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float32),
    "3x3 strided": ("dual", 3, 20, 35, (7, 7), (3, 3), (2, 3), (0, 2), (1, 1), 1, torch.float16),
    "groups, dilation": ("dual", 1, 17, 14, (9, 8), (3, 2), (1, 2), (2, 1), (2, 3), 2, torch.float32),
    "1x1": ("dual", 2, 64, 40, (5, 6), (1, 1), (1, 1), (0, 0), (1, 1), 1, torch.bfloat16),
    "1x1 strided": ("shared", 2, 24, 8, (5, 7), (1, 1), (2, 2), (0, 0), (1, 1), 1, torch.bfloat16),
    "1x1 groups": ("dual", 2, 8, 24, (5, 3), (1, 1), (1, 1), (0, 0), (1, 1), 3, torch.float32),
    "stem": ("shared", 2, 3, 20, (9, 8), (7, 5), (2, 2), (3, 2), (1, 1), 1, torch.float32),
    "stem 3d": ("dual", 1, 1, 20, (4, 5, 6), (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), 1, torch.float16),
    "1d": ("dual", 3, 20, 12, (17,), (5,), (2,), (4,), (2,), 1, torch.float32),
    "1d long": ("single", 2, 9, 12, (40,), (33,), (3,), (8,), (1,), 1, torch.float32),
    "3d": ("dual", 1, 20, 12, (4, 5, 6), (3, 2, 3), (2, 1, 1), (1, 1, 0), (1, 1, 2), 1, torch.float16),
    "depthwise": ("dual", 2, 1, 20, (6, 5), (3, 2), (2, 1), (1, 1), (1, 1), 20, torch.float32),
    "depthwise shared": ("shared", 2, 1, 16, (9, 8), (3, 3), (1, 1), (1, 1), (2, 2), 16, torch.float16),
    "depthwise 3d": ("single", 1, 1, 8, (4, 5, 6), (3, 2, 3), (1, 1, 2), (1, 0, 1), (1, 1, 1), 8, torch.bfloat16),
    "tiny groups": ("dual", 2, 3, 12, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4, torch.float32),
    "linear": ("dual", 7, 70, 33, (), (), (), (), (), 1, torch.float16),
    "linear shared": ("shared", 3, 40, 10, (), (), (), (), (), 1, torch.bfloat16),
    "single": ("single", 2, 40, 24, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_against_the_twin(case: str) -> None:
    inputs, weight, masks, scales, biases, window = _layer(*CASES[case])
    shape = _twin(inputs, weight, masks, scales, biases, [None] * len(inputs), window)[0].shape
    residuals = [_channels_last(torch.randn(shape).to(weight.dtype)) for _ in inputs]
    expected = _twin(inputs, weight, masks, scales, biases, residuals, window, ("relu", 0.0))
    outputs = [_poisoned(shape, weight.dtype) for _ in inputs]
    config = DIRECT if kernels._form_of(weight.shape[-1], window[3]) == "direct" else TILE
    operands = (inputs, weight, masks, scales, biases, residuals, outputs, *window)
    triton_kernels.masked_conv_nhwc(*operands, ("relu", 0.0), config)
    for output, right in zip(outputs, expected, strict=True):
        _assert_close(output, right)


@pytest.mark.parametrize("case", ["3x3 strided", "stem", "depthwise", "1x1"])
def test_offsets_of_64_bits(case: str) -> None:
    inputs, weight, masks, scales, biases, window = _layer(*CASES[case])
    none = [None] * len(inputs)
    expected = _twin(inputs, weight, masks, scales, biases, none, window)
    outputs = [_poisoned(right.shape, weight.dtype) for right in expected]
    config = DIRECT if case == "depthwise" else TILE
    operands = (inputs, weight, masks, scales, biases, none, outputs, *window, ("none", 0.0))
    planned = kernels.plan(*operands, config, False)
    assert not planned.constants["WIDE"]
    launch.run(planned._replace(constants=planned.constants | {"WIDE": True}))
    for output, right in zip(outputs, expected, strict=True):
        _assert_close(output, right)


def test_offsets_are_64_bits_wide_where_it_takes_them() -> None:
    def plan(*sizes: int) -> dict[str, Any]:
        x = torch.empty((*sizes, 64), dtype=torch.float16, device="meta").movedim(-1, 1)
        weight = torch.empty(64, 3, 3, 3, 64, dtype=torch.float16, device="meta")
        none = [None]
        window = ([1] * 3, [1] * 3, [1] * 3, 1)
        operands = ([x], weight, none, none, none, none, [x], *window, ("none", 0.0))
        constants: dict[str, Any] = kernels.plan(*operands, None, False).constants
        return constants

    assert not plan(1000, 64, 128, 128)["WIDE"]  # many images of less than 2^31 / 8 values
    assert plan(2, 256, 512, 512)["WIDE"]  # images of 2^32 values


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "groups"), [(40, 9, 3, 1), (3, 9, 3, 1), (1, 16, 3, 16)]
)
def test_padding_behind_follows_from_the_output(
    channels: int, filters: int, kernel: int, groups: int
) -> None:
    shape = ("dual", 2, channels, filters, (6, 7), (kernel,) * 2, (2, 2), (0, 1), (1, 1), groups)
    inputs, weight, masks, scales, biases, window = _layer(*shape, torch.float32)
    padded = [functional.pad(x, (0, 2, 0, 3)) for x in inputs]
    none = [None, None]
    expected = _twin(padded, weight, masks, scales, biases, none, window)
    outputs = [_poisoned(right.shape, weight.dtype) for right in expected]
    config = DIRECT if groups > 1 else TILE
    operands = (inputs, weight, masks, scales, biases, none, outputs, *window)
    triton_kernels.masked_conv_nhwc(*operands, config=config)
    for output, right in zip(outputs, expected, strict=True):
        _assert_close(output, right)


@pytest.mark.parametrize("kernel", [1, 3])
def test_slices_of_the_channels(kernel: int) -> None:
    """As DenseNet has them: inputs, residuals and outputs are parts of wider tensors."""
    padding = kernel // 2
    shape = ("dual", 2, 16, 24, (5, 4), (kernel,) * 2, (1, 1), (padding,) * 2, (1, 1), 1)
    inputs, weight, masks, scales, biases, window = _layer(*shape, torch.float32)
    inputs = [_channels_last(torch.cat([x, x, x], 1))[:, 8:24] for x in inputs]
    residuals = [_channels_last(torch.randn(2, 40, 5, 4))[:, 3:27] for _ in inputs]
    expected = _twin(inputs, weight, masks, scales, biases, residuals, window)
    whole = [_poisoned((2, 50, 5, 4), torch.float32) for _ in inputs]
    outputs = [y[:, 8:32] for y in whole]
    operands = (inputs, weight, masks, scales, biases, residuals, outputs, *window)
    triton_kernels.masked_conv_nhwc(*operands, config=TILE)
    for output, right, around in zip(outputs, expected, whole, strict=True):
        _assert_close(output, right)
        assert around[:, :8].isnan().all()
        assert around[:, 32:].isnan().all()


@pytest.mark.parametrize(
    ("case", "shared"),
    [("3x3", False), ("1x1", True), ("stem", True), ("depthwise", False), ("linear", False)],
)
def test_an_all_ones_mask_gives_equal_bits(case: str, shared: bool) -> None:
    inputs, weight, _, scales, biases, window = _layer("dual", *CASES[case][1:])
    inputs = [inputs[0], inputs[0] if shared else inputs[0].clone()]
    channels = weight.shape[-1]
    ones = torch.ones(weight.shape[0], channels, *weight.shape[1:-1], dtype=torch.bool)
    masks = [None, reference.pack_mask(ones)]
    none, same = [None, None], ([scales[0]] * 2, [biases[0]] * 2)
    expected = _twin(inputs, weight, none, *same, none, window)
    outputs = [_poisoned(right.shape, weight.dtype) for right in expected]
    config = DIRECT if case == "depthwise" else TILE
    operands = (inputs, weight, masks, *same, none, outputs, *window)
    triton_kernels.masked_conv_nhwc(*operands, config=config)
    _assert_close(outputs[0], expected[0])
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("case", ["3x3", "stem", "depthwise", "linear"])
def test_without_any_weight_the_bias_is_left(case: str) -> None:
    inputs, weight, masks, _, biases, window = _layer("dual", *CASES[case][1:])
    masks = [masks[1], torch.zeros_like(masks[1])]
    none = [None, None]
    expected = _twin(inputs, weight, masks, none, biases, none, window)
    outputs = [_poisoned(right.shape, torch.float32) for right in expected]
    config = DIRECT if case == "depthwise" else TILE
    inputs, weight = [x.float() for x in inputs], weight.float()
    operands = (inputs, weight, masks, none, biases, none, outputs, *window)
    triton_kernels.masked_conv_nhwc(*operands, config=config)
    _assert_close(outputs[0], expected[0])
    shape = (-1, *(1,) * len(window[0]))
    assert torch.equal(outputs[1], biases[1].view(shape).expand(outputs[1].shape))


def test_views_of_one_input_are_shared() -> None:
    x = torch.randn(4, 8)
    assert launch.is_shared([x, x])
    assert launch.is_shared([x, x.reshape(4, 8)])
    assert not launch.is_shared([x])
    assert not launch.is_shared([x, x.clone()])
    assert not launch.is_shared([x[:2], x[:2].t().contiguous()])
    assert not launch.is_shared([x[:, :4], x[:, 4:]])


def test_a_kernel_that_is_too_long_is_refused() -> None:
    x = torch.empty(1, 100, 16).movedim(-1, 1)
    none = [None]
    window = ([1], [0], [1], 1)
    with pytest.raises(FastpieError, match="add up to at most 62"):
        triton_kernels.masked_conv_nhwc(
            [x], torch.empty(16, 70, 16), none, none, none, none, [x[..., :31]], *window
        )


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activations(activation: str) -> None:
    values = torch.tensor([torch.nan, -1e4, -7.0, -3.0, -1.0, -0.1, 0.0, 0.3, 2.9, 6.5, 40.0])
    inputs = [values.repeat(2, 1), values.flip(0).repeat(2, 1)]
    # Each channel by itself: NaN stays where it is.
    operands = (inputs, torch.ones(11, 1), [None] * 2, [None] * 2, [None] * 2, [None] * 2)
    x = [t.view(2, 11, 1, 1) for t in inputs]
    outputs = [torch.full_like(t, 7.0) for t in x]
    weight = torch.ones(11, 1, 1, 1)
    window = ([1, 1], [0, 0], [1, 1], 11)
    slope = 0.3
    triton_kernels.masked_conv_nhwc(
        x, weight, *operands[2:], outputs, *window, (activation, slope), DIRECT
    )
    for output, given in zip(outputs, inputs, strict=True):
        right = activation_function((activation, slope))(given.double())
        torch.testing.assert_close(
            output.view(2, 11).double(), right, rtol=1e-6, atol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize(("channels", "groups"), [(32, 1), (3, 1), (1, 16)])
def test_nothing_to_do(channels: int, groups: int) -> None:
    x = _channels_last(torch.empty(0, channels * groups, 5, 5))
    y = _channels_last(torch.empty(0, 16, 5, 5))
    none = [None, None]
    window = ([1, 1], [0, 0], [1, 1], groups)
    weight = torch.ones(16, 1, 1, channels)
    triton_kernels.masked_conv_nhwc([x, x], weight, none, none, none, none, [y, y], *window)


@pytest.mark.parametrize(
    "shape", [(5, 3), (4, 70, 3, 3), (3, 32, 2), (2, 33, 3, 1, 2), (6, 1, 3, 3)]
)
def test_pack_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    assert torch.equal(triton_kernels.pack_mask(mask), reference.pack_mask(mask))


def test_pack_mask_of_nothing() -> None:
    assert triton_kernels.pack_mask(torch.ones(0, 40, 3, dtype=torch.bool)).shape == (0, 3, 2)


# ---------------------------------------------------------------------------- gradients

GRADIENTS = ["3x3", "groups, dilation", "1x1 strided", "1d", "linear", "single"]
GRADIENT_CASES = {name: CASES[name] for name in GRADIENTS} | {
    "3d": ("dual", 1, 9, 12, (4, 5, 6), (3, 2, 3), (2, 1, 3), (1, 1, 0), (1, 1, 2), 1, torch.float16),
    "stride and dilation": (
        "dual", 1, 9, 12, (9, 12), (3, 4), (3, 4), (1, 0), (2, 2), 1, torch.float32
    ),
}  # fmt: skip


def _gradients(case: str) -> tuple[Any, ...]:
    """Operands of a layer, gradients of its outputs, and autograd's of everything, in fp64."""
    inputs, weight, masks, _, _, window = _layer(*GRADIENT_CASES[case])
    count, dtype = len(inputs), weight.dtype
    leaves = [x.double().requires_grad_() for x in inputs]
    shared_weight = weight.double().requires_grad_()
    none = [None] * count
    outputs = reference.masked_conv_nhwc(leaves, shared_weight, masks, none, none, none, *window)
    given = [_channels_last(torch.randn(y.shape).to(dtype)) for y in outputs]
    right = torch.autograd.grad(outputs, [*leaves, shared_weight], [g.double() for g in given])
    return inputs, weight, masks, window, given, right[:-1], right[-1]


@pytest.mark.parametrize(
    ("case", "wide"), [*((case, False) for case in GRADIENT_CASES), ("1d", True)]
)
def test_gradient_of_the_inputs(case: str, wide: bool) -> None:
    inputs, weight, masks, window, given, right, _ = _gradients(case)
    backward = importlib.import_module("fastpie.triton_kernels.masked_conv_backward")
    outputs = [_poisoned(x.shape, weight.dtype) for x in inputs]
    operands = (given, weight, masks, outputs, *window, TileConfig(64, 32, 32))
    if wide:
        planned = backward.plan_input_gradient(*operands)
        launch.run(planned._replace(constants=planned.constants | {"WIDE": True}))
    else:
        triton_kernels.masked_conv_input_gradient(*operands)
    for output, expected in zip(outputs, right, strict=True):
        _assert_close(output, expected)


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradient_of_the_weight(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = importlib.import_module("fastpie.triton_kernels.masked_conv_backward")
    monkeypatch.setattr(backward, "_STEPS_OF_A_PART", 1)  # more than one part
    monkeypatch.setattr(backward, "_PROGRAMS", 30)
    inputs, weight, masks, window, given, _, right = _gradients(case)
    kernel = weight.shape[1:-1]
    operands = (given, inputs, masks, kernel, *window, TileConfig(32, 32, 32))
    result = triton_kernels.masked_conv_weight_gradient(*operands)
    assert result.dtype is weight.dtype
    _assert_close(result, right)
    assert torch.equal(result, triton_kernels.masked_conv_weight_gradient(*operands))


def test_gradient_of_the_weight_without_images() -> None:
    x, g = _channels_last(torch.empty(0, 16, 5, 5)), _channels_last(torch.empty(0, 16, 5, 5))
    window = ([1, 1], [0, 0], [1, 1], 1)
    result = triton_kernels.masked_conv_weight_gradient([g], [x], [None], (1, 1), *window)
    assert torch.equal(result, torch.zeros(16, 1, 1, 16))


# ---------------------------------------------------------------------------- check_config


def _checked(config: TileConfig, case: str, **changes: Any) -> str | None:
    inputs, weight, masks, scales, biases, window = _layer(*CASES[case])
    none = [None] * len(inputs)
    shapes = [y.shape for y in _twin(inputs, weight, masks, scales, biases, none, window)]
    outputs = [_poisoned(s, weight.dtype) for s in shapes]
    operands = (inputs, weight, masks, scales, biases, outputs, outputs, *window, ("silu", 0.0))
    return check_config(config, *operands, images=1, **changes)


@pytest.mark.parametrize("case", ["3x3", "depthwise", "linear shared", "1x1"])
def test_a_right_config_passes(case: str) -> None:
    assert _checked(DIRECT if case == "depthwise" else TILE, case) is None


@pytest.mark.parametrize("fault", ["untouched", "wrong", "unsteady"])
def test_a_faulty_config_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    right = triton_kernels.masked_conv_nhwc

    def faulty(*args: Any) -> None:
        nonlocal calls
        calls += 1
        right(*args)
        value = args[6][-1].view(-1) if args[6][-1].is_contiguous() else args[6][-1][0, 0, 0]
        if fault == "untouched":
            value[-1] = torch.nan
        elif fault == "wrong":
            value[-1] += 1.0
        elif calls == 2:
            value[-1] += 2.0**-20

    monkeypatch.setattr(triton_kernels, "masked_conv_nhwc", faulty)
    reason = _checked(TILE, "3x3")
    assert reason is not None
    assert ("second time" if fault == "unsteady" else "off by") in reason
    assert "model 1" in reason


# ---------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("shared", [True, False])
def test_the_operator_runs_the_kernels(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """dual_conv and its derivatives, second ones too, as a GPU would compute them."""
    operators = importlib.import_module("fastpie.ops.dual_conv_kernels")
    monkeypatch.setattr(operators, "is_served", lambda dense, weight: True)
    count = 0

    def counted(original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        return run

    for name in ("masked_conv_nhwc", "masked_conv_input_gradient", "masked_conv_weight_gradient"):
        monkeypatch.setattr(triton_kernels, name, counted(getattr(triton_kernels, name)))
    dense, pruned = torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4)
    weight, bias = torch.randn(16, 16, 3, 1), torch.randn(16)
    mask = torch.rand(weight.shape) < 0.5
    window = ([2, 1], [1, 0], [1, 1], 1)

    def first_and_second(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (dense, weight, bias, pruned)]
        leaves = leaves[:3] if shared else leaves
        outputs = function(*leaves)
        loss = outputs[0].sin().sum() + outputs[1].cos().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*outputs, *first, *second]

    def kernels_compute(x: Tensor, w: Tensor, b: Tensor, y: Tensor | None = None) -> Any:
        return torch.ops.fastpie.dual_conv(x, y, w, mask, b, *window)

    def torch_computes(x: Tensor, w: Tensor, b: Tensor, y: Tensor | None = None) -> Any:
        other = x if y is None else y
        return (
            functional.conv2d(x, w, b, *window),
            functional.conv2d(other, w * mask, b, *window),
        )

    actual = first_and_second(kernels_compute, torch.float32)
    assert count >= 6
    expected = first_and_second(torch_computes, torch.float64)
    for a, b in zip(actual, expected, strict=True):
        _assert_close(a, b)


def test_the_operator_of_a_linear_layer_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = importlib.import_module("fastpie.ops.dual_conv_kernels")
    monkeypatch.setattr(operators, "is_served", lambda dense, weight: True)
    inputs = [torch.randn(2, 3, 20, requires_grad=True) for _ in range(2)]
    weight = torch.randn(18, 20, requires_grad=True)
    mask = torch.rand(weight.shape) < 0.5
    actual = torch.ops.fastpie.dual_conv(*inputs, weight, mask, None, [], [], [], 1)
    expected = [
        functional.linear(x, w) for x, w in zip(inputs, (weight, weight * mask), strict=True)
    ]
    given = [torch.randn(2, 3, 18) for _ in range(2)]
    leaves = [*inputs, weight]
    for a, b in zip(
        [*actual, *torch.autograd.grad(actual, leaves, given)],
        [*expected, *torch.autograd.grad(expected, leaves, given)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
