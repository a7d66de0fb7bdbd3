"""Steps on tensors: oneDNN's prepacked, fused convolutions through torch, and torch's own operators.

The GPU engine uses the latter.

The operators `torch.ops.mkldnn.*` are those that torch.compile uses for frozen models; they are no
public interface. Where one is missing, the layer is computed by torch.nn.functional.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastpie.dual.program import (
    Activation,
    Affine,
    Call,
    Convolution,
    Linear,
    Step,
    TensorName,
    Value,
    activate,
    map_leaves,
)
from fastpie.dual.states import ModelState, fold, norm_scale_shift

__all__ = ["TensorStep", "channels_last", "known_slope", "tensor_step"]

TensorStep = Callable[[dict[Value, Any]], Any]
"""Computes the result of a step from the values so far; overwrites none but the residual that it
was told to."""

_Finish = Callable[[Tensor, dict[Value, Any]], Tensor]

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> Tensor:
    """The tensor with channels innermost, as oneDNN's kernels want it."""
    return x.contiguous(memory_format=_FORMATS.get(x.ndim, torch.contiguous_format))


def tensor_step(
    step: Step,
    state: ModelState,
    *,
    dtype: torch.dtype,
    sizes: tuple[int, ...] | None = None,
    overwrite_residual: bool = False,
    is_output: bool = False,
    prepack: bool = True,
) -> tuple[str, TensorStep]:
    """Lower a step to tensors. It keeps the state's weights, which `states_of` copied from the model.

    Args:
        step: any step of a program.
        state: the model's tensors.
        dtype: to compute in, torch.float32 or torch.bfloat16.
        sizes: [N, C, ...] of a convolution's input: oneDNN lays the weights out for it.
        overwrite_residual: whether the residual's memory may become the result's.
        is_output: the result is what the model returns and no more: a linear layer gives fp32.
        prepack: whether oneDNN may hold the weights in its own layout, on the CPU.

    Returns:
        The name of the kernel, for the report, and the function.
    """
    if isinstance(step, Convolution):
        return _convolution(step, state, dtype, sizes, overwrite_residual, prepack)
    if isinstance(step, Linear):
        return _linear(step, state, torch.float32 if is_output else dtype)
    if isinstance(step, Affine):
        return _affine(step, state, dtype)
    assert isinstance(step, Call)
    return _call(step, state, dtype)


def known_slope(activation: Activation | None, state: ModelState) -> Activation | None:
    """The activation with a learnt slope that is one number read from the model."""
    if activation is None or not isinstance(activation.slope, TensorName):
        return activation
    slope = state.lookup(activation.slope)
    if slope.numel() != 1:
        return activation
    return Activation(activation.name, float(slope))


def _fused_activation(activation: Activation | None) -> tuple[str, list[float], str] | None:
    """Attribute, scalars and algorithm by which oneDNN's operators know an activation, if so."""
    if activation is None:
        return "none", [], ""
    if isinstance(activation.slope, TensorName):
        return None
    return {
        "relu": ("relu", [], ""),
        "relu6": ("hardtanh", [0.0, 6.0], ""),
        "silu": ("swish", [], ""),
        "gelu": ("gelu", [], "none"),
        "gelu_tanh": ("gelu", [], "tanh"),
        "hardswish": ("hardswish", [], ""),
        "leaky_relu": ("leaky_relu", [activation.slope], ""),
    }[activation.name]


def _prepacked(
    step: Convolution, weight: Tensor, sizes: tuple[int, ...] | None
) -> tuple[Tensor, Any, Any] | None:
    """Weights in oneDNN's own layout and the operators for it, or None where there are none."""
    reorder = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
    unary = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    in_place = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)
    if reorder is None or unary is None or in_place is None:
        return None
    if weight.ndim not in _FORMATS or not weight.numel():
        return None
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    size = None if sizes is None else list(step.padded(torch.empty(sizes, device="meta"))[0].shape)
    padding = _both_sides(step)
    packed = reorder(channels_last(weight), padding, step.stride, step.dilation, step.groups, size)
    return packed, unary, in_place


def _both_sides(step: Convolution) -> list[int]:
    """What is left to pad on both sides of `step.padded`."""
    return [0] * len(step.padding) if step.padding_behind else list(step.padding)


def _convolution(
    step: Convolution,
    state: ModelState,
    dtype: torch.dtype,
    sizes: tuple[int, ...] | None,
    overwrite_residual: bool,
    prepack: bool,
) -> tuple[str, TensorStep]:
    folded = fold(step, state)
    weight = folded.dense(dtype)
    bias = None if folded.bias is None else folded.bias.to(dtype)
    activation = known_slope(step.activation, state)
    finish = _finish(step, activation, state)
    fused = _fused_activation(activation)
    packed = _prepacked(step, weight, sizes) if prepack else None
    if packed is None:
        return "torch", _torch_convolution(step, channels_last(weight), bias, finish)
    prepacked, unary, in_place = packed
    geometry = (_both_sides(step), list(step.stride), list(step.dilation), step.groups)
    if fused is None:

        def run_apart(values: dict[Value, Any]) -> Tensor:
            x, _ = step.padded(values[step.input])
            return finish(unary(x, prepacked, bias, *geometry, "none", [], ""), values)

        return "onednn", run_apart
    attribute, scalars, algorithm = fused
    if step.residual is None:

        def run(values: dict[Value, Any]) -> Tensor:
            x, _ = step.padded(values[step.input])
            return unary(  # type: ignore[no-any-return]
                x, prepacked, bias, *geometry, attribute, scalars, algorithm
            )

        return "onednn", run

    after = None if attribute == "none" else attribute

    def run_binary(values: dict[Value, Any]) -> Tensor:
        x, _ = step.padded(values[step.input])
        residual = channels_last(values[step.residual])  # type: ignore[index]
        if overwrite_residual:
            operands = (residual, x, prepacked, bias, *geometry)
            return in_place.binary(  # type: ignore[no-any-return]
                *operands, "add", 1.0, after, scalars, algorithm
            )
        operands = (x, residual, prepacked, bias, *geometry)
        return unary.binary(  # type: ignore[no-any-return]
            *operands, "add", 1.0, after, scalars, algorithm
        )

    return "onednn", run_binary


def _torch_convolution(
    step: Convolution, weight: Tensor, bias: Tensor | None, finish: _Finish
) -> TensorStep:
    convolve = _CONV[weight.ndim - 2]

    def run(values: dict[Value, Any]) -> Tensor:
        x, padding = step.padded(values[step.input])
        y = convolve(x, weight, bias, step.stride, padding, step.dilation, step.groups)
        return finish(y, values)

    return run


def _linear(step: Linear, state: ModelState, dtype: torch.dtype) -> tuple[str, TensorStep]:
    folded = fold(step, state)
    finish = _finish(step, known_slope(step.activation, state), state)
    weight = folded.dense(dtype)
    bias = None if folded.bias is None else folded.bias.to(dtype)

    def run(values: dict[Value, Any]) -> Tensor:
        y = functional.linear(values[step.input].to(dtype), weight, bias)
        return finish(y, values)

    return "torch", run


def _finish(
    step: Convolution | Linear, activation: Activation | None, state: ModelState
) -> _Finish:
    """Residual and activation by torch."""
    lookup = {}
    if activation is not None and isinstance(activation.slope, TensorName):
        lookup[str(activation.slope)] = state.lookup(activation.slope)

    def finish(y: Tensor, values: dict[Value, Any]) -> Tensor:
        if step.residual is not None:
            y = y + values[step.residual]
        return activate(y, activation, lambda name: lookup[name].to(y.dtype))

    return finish


def _operands(step: Step, state: ModelState, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that the step reads, in the dtype that it computes in."""
    operands: dict[str, Tensor] = {}
    for name in step.tensors():
        tensor = state.lookup(name)
        operands[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return operands


def _affine(step: Affine, state: ModelState, dtype: torch.dtype) -> tuple[str, TensorStep]:
    scale, shift = (t.to(dtype) for t in norm_scale_shift(step.norm, state))
    activation = known_slope(step.activation, state)
    tensors = _operands(step, state, dtype)

    def run(values: dict[Value, Any]) -> Tensor:
        x = values[step.input]
        shape = (-1, *(1,) * (x.ndim - 2))
        y = torch.addcmul(shift.view(shape), x, scale.view(shape))
        if step.activation is not None and step.activation.name == "relu":
            return y.relu_()
        return activate(y, activation, lambda name: tensors[name])

    return "torch", run


def _call(step: Call, state: ModelState, dtype: torch.dtype) -> tuple[str, TensorStep]:
    """An operator of torch, in bf16 only if torch has it in bf16."""
    tensors = {dtype: _operands(step, state, dtype)}

    def compute(values: dict[Value, Any], kind: torch.dtype) -> Any:
        def resolve(leaf: Any) -> Any:
            if isinstance(leaf, TensorName):
                return tensors[kind][leaf]
            value = values[leaf] if isinstance(leaf, Value) else leaf
            if kind != dtype and isinstance(value, Tensor) and value.dtype == dtype:
                return value.to(kind)
            return value

        return step.target(*map_leaves(step.args, resolve), **map_leaves(step.kwargs, resolve))

    def run(values: dict[Value, Any]) -> Any:
        if torch.float32 in tensors and dtype != torch.float32:
            return _cast(compute(values, torch.float32), torch.float32, dtype)
        try:
            return compute(values, dtype)
        except NotImplementedError:
            if dtype == torch.float32:
                raise
        result = compute_in_fp32(values)
        return _cast(result, torch.float32, dtype)

    def compute_in_fp32(values: dict[Value, Any]) -> Any:
        tensors[torch.float32] = {
            name: t.float() if t.dtype == dtype else t for name, t in tensors[dtype].items()
        }
        return compute(values, torch.float32)

    return "torch", run


def _cast(result: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
    if isinstance(result, Tensor):
        return result.to(wanted) if result.dtype == given else result
    if isinstance(result, list | tuple):
        return type(result)(_cast(item, given, wanted) for item in result)
    return result
