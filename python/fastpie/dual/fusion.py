"""Recognising layers among the calls of a captured model, and what can be fused into them.

A layer takes in the zero padding before it, and the BatchNorm, residual and activation behind it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastpie.dual.program import (
    Activation,
    Affine,
    Call,
    Convolution,
    Linear,
    Norm,
    Step,
    TensorMeta,
    TensorName,
    Value,
)

__all__ = ["PADS", "Facts", "bind", "fuse", "sizes_of"]

aten = torch.ops.aten

PADS = {aten.constant_pad_nd.default, aten.pad.default}
_Layer = Convolution | Linear | Affine

_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
_GATES = {aten.sigmoid.default: aten.silu.default, aten.hardsigmoid.default: aten.hardswish.default}


class Facts:
    """What is known of values and tensors while the program is built."""

    def __init__(self) -> None:
        self.meta: dict[Value, TensorMeta] = {}
        self.sizes: dict[Value, tuple[str, ...]] = {}
        self.nodes: dict[Value, fx.Node] = {}
        self.tensor_shapes: dict[TensorName, tuple[int, ...]] = {}

    def add(self, value: Value, val: Any) -> None:
        """Note what the export knows of a value."""
        if isinstance(val, Tensor):
            shape = tuple(size if isinstance(size, int) else None for size in val.shape)
            self.meta[value] = TensorMeta(shape, val.dtype)
            self.sizes[value] = sizes_of(val)


def bind(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call of an ATen operator by name, defaults included."""
    return {
        declared.name: args[i] if i < len(args) else kwargs.get(declared.name, _default(declared))
        for i, declared in enumerate(target._schema.arguments)
    }


def _default(declared: Any) -> Any:
    return declared.default_value if declared.has_default_value() else None


def sizes_of(tensor: Tensor) -> tuple[str, ...]:
    """Sizes as text: comparing symbolic ones as numbers would ask torch to fix them."""
    return tuple(str(size) for size in tensor.shape)


def fuse(calls: list[Call], kept: list[Value], facts: Facts) -> list[Step]:
    """The same as steps: layers with what is fused into them, other calls as they are.

    Args:
        calls: in the order of execution.
        kept: values that the model returns.
        facts: of their values and tensors.
    """
    return _Fuser(calls, kept, facts).steps


class _Fuser:
    """One sweep over the calls; each either becomes a step or joins the step that it reads.

    A step that takes in a later operation moves to that operation's place, so all that it reads
    (the residual) is defined before it.
    """

    def __init__(self, calls: list[Call], kept: list[Value], facts: Facts) -> None:
        self.facts = facts
        self.uses = Counter(value for call in calls for value in call.values())
        self.uses.update(kept)
        self.done: dict[Value, Step] = {}  # in the order of execution
        for call in calls:
            step = self._fuse(self._gate(call))
            self.done[step.result] = step
        self.steps = list(self.done.values())

    def _fuse(self, call: Call) -> Step:
        target: Any = call.target
        if not isinstance(target, torch._ops.OpOverload):
            return self._norm(call) or call
        if target in _CONVOLUTIONS or target is aten.convolution.default:
            return self._convolution(call) or call
        if target is aten.linear.default:
            return self._linear(call) or call
        if target in (aten.batch_norm.default, aten.instance_norm.default):
            return self._norm(call) or call
        if target is aten.add.Tensor:
            return self._residual(call) or call
        activation = self._activation_of(call)
        return (activation and self._activation(call, activation)) or call

    def _sole(self, value: Any) -> Step | None:
        """The step that defines `value`, if only the call at hand reads it."""
        return self.done.get(value) if isinstance(value, Value) and self.uses[value] == 1 else None

    def _join(self, step: _Layer, call: Call, **changes: Any) -> Step:
        del self.done[step.result]
        return replace(step, result=call.result, **changes)

    def _gate(self, call: Call) -> Call:
        """Write x * sigmoid(x) as silu and x * hardsigmoid(x) as hardswish."""
        if call.target is not aten.mul.Tensor:
            return call
        for x, gate in (call.args, call.args[::-1]):
            step = self._sole(gate)
            if isinstance(step, Call) and step.target in _GATES and step.args == (x,):
                del self.done[step.result]
                self.uses[x] -= 1
                return replace(call, target=_GATES[step.target], args=(x,), kwargs={})
        return call

    def _convolution(self, call: Call) -> Step | None:
        bound = bind(call.target, call.args, call.kwargs)
        x, weight, bias = bound["input"], bound["weight"], bound["bias"]
        if not _is_layer(x, weight, bias) or bound.get("transposed"):
            return None
        kernel = self.facts.tensor_shapes[weight][2:]
        rank = len(kernel)
        if len(self.facts.meta[x].shape) != rank + 2:
            return None  # an image without a batch
        stride, dilation = _per_dim(bound["stride"], rank), _per_dim(bound["dilation"], rank)
        sides = _padding(bound["padding"], kernel, dilation)
        if stride is None or dilation is None or sides is None:
            return None
        before = self._sole(x)
        if isinstance(before, Call) and before.target in PADS:
            zeros = _zeros(before, rank)
            if zeros is not None:
                sides = _Sides(*(_sum(a, b) for a, b in zip(sides, zeros, strict=True)))
                x = before.args[0]
                del self.done[before.result]
        return Convolution(
            name=call.name,
            result=call.result,
            input=x,
            weight=weight,
            bias=bias,
            stride=stride,
            padding=sides.before,
            padding_behind=None if sides.behind == sides.before else sides.behind,
            dilation=dilation,
            groups=bound["groups"],
        )

    def _linear(self, call: Call) -> Step | None:
        bound = bind(call.target, call.args, call.kwargs)
        x, weight, bias = bound["input"], bound["weight"], bound["bias"]
        if not _is_layer(x, weight, bias):
            return None
        return Linear(name=call.name, result=call.result, input=x, weight=weight, bias=bias)

    def _norm(self, call: Call) -> Step | None:
        """A BatchNorm with fixed statistics, as one call or as (call, getitem 0)."""
        norm_call = call
        if call.target is operator.getitem:
            source = self._sole(call.args[0])
            if not isinstance(source, Call) or call.args[1] != 0:
                return None
            if source.target not in (
                aten._native_batch_norm_legit_no_training.default,
                aten.native_batch_norm.default,
            ):
                return None
            norm_call = source
        elif not isinstance(call.target, torch._ops.OpOverload):
            return None
        bound = bind(norm_call.target, norm_call.args, norm_call.kwargs)
        if bound.get("training") or bound.get("use_input_stats"):
            return None
        x = bound["input"]
        tensors = [bound[k] for k in ("weight", "bias", "running_mean", "running_var")]
        if not isinstance(x, Value) or not all(isinstance(t, TensorName | None) for t in tensors):
            return None
        weight, bias, mean, var = tensors
        if mean is None or var is None:
            return None
        if norm_call is not call:
            del self.done[norm_call.result]
        norm = Norm(weight=weight, bias=bias, mean=mean, var=var, eps=bound["eps"])
        before = self._sole(x)
        if (
            isinstance(before, Convolution | Linear)
            and (before.norm, before.residual, before.activation) == (None, None, None)
            and (isinstance(before, Convolution) or len(self.facts.meta[x].shape) == 2)
        ):
            return self._join(before, call, norm=norm)
        return Affine(name=norm_call.name, result=call.result, input=x, norm=norm)

    def _residual(self, call: Call) -> Step | None:
        """A sum of two tensors of one shape, by the later of the layers that it adds up."""
        bound = bind(call.target, call.args, call.kwargs)
        operands = [bound["self"], bound["other"]]
        if bound["alpha"] != 1 or not all(isinstance(v, Value) for v in operands):
            return None
        if any(not self._alike(v, call.result) for v in operands):
            return None
        order = {value: position for position, value in enumerate(self.done)}
        for layer, other in sorted(
            (operands, operands[::-1]), key=lambda pair: order.get(pair[0], -1), reverse=True
        ):
            step = self._sole(layer)
            if isinstance(step, Convolution | Linear) and (step.residual, step.activation) == (
                None,
                None,
            ):
                return self._join(step, call, residual=other)
        return None

    def _alike(self, a: Value, b: Value) -> bool:
        """Whether two values are tensors of one shape, whatever the batch, and one dtype."""
        facts = self.facts
        return (
            a in facts.meta
            and b in facts.meta
            and facts.sizes[a] == facts.sizes[b]
            and facts.meta[a].dtype == facts.meta[b].dtype
        )

    def _activation_of(self, call: Call) -> Activation | None:
        """The activation that an operator is, if it is one."""
        if call.target is aten.prelu.default:
            weight = call.args[1]
            one = isinstance(weight, TensorName) and self.facts.tensor_shapes[weight] == (1,)
            return Activation("leaky_relu", weight) if one else None
        read = _ACTIVATIONS.get(call.target)
        return read(bind(call.target, call.args, call.kwargs)) if read else None

    def _activation(self, call: Call, activation: Activation) -> Step | None:
        step = self._sole(call.args[0])
        if isinstance(step, Convolution | Linear | Affine) and step.activation is None:
            return self._join(step, call, activation=activation)
        return None


def _is_layer(x: Any, weight: Any, bias: Any) -> bool:
    return (
        isinstance(x, Value)
        and isinstance(weight, TensorName)
        and (bias is None or isinstance(bias, TensorName))
    )


def _per_dim(sizes: Any, rank: int) -> tuple[int, ...] | None:
    """One number for each spatial dimension; None if one depends on the batch."""
    if not all(isinstance(size, int) for size in sizes):
        return None
    return tuple(sizes) * rank if len(sizes) == 1 else tuple(sizes)


class _Sides(NamedTuple):
    """Zeros before and behind each spatial dimension."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _padding(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...] | None
) -> _Sides | None:
    """What a convolution pads; None if that depends on the batch."""
    if padding == "valid":
        return _Sides((0,) * len(kernel), (0,) * len(kernel))
    if padding == "same" and dilation is not None:  # the odd zero goes behind, as in torch
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return _Sides(tuple(t // 2 for t in total), tuple(t - t // 2 for t in total))
    both = None if isinstance(padding, str) else _per_dim(padding, len(kernel))
    return None if both is None else _Sides(both, both)


def _zeros(call: Call, rank: int) -> _Sides | None:
    """The zeros that a pad adds to each of `rank` last dimensions; None if it does something else."""
    bound = bind(call.target, call.args, call.kwargs)
    pad = list(bound["pad"])
    if bound.get("mode", "constant") != "constant" or bound["value"] not in (None, 0):
        return None
    if not all(isinstance(p, int) and p >= 0 for p in pad) or len(pad) > 2 * rank:
        return None
    pad += [0] * (2 * rank - len(pad))
    return _Sides(tuple(pad[::2][::-1]), tuple(pad[1::2][::-1]))  # F.pad: the last dimension first


def _clamped(low: Any, high: Any) -> Activation | None:
    if any(isinstance(bound, str) for bound in (low, high)) or low != 0:
        return None
    return Activation("relu") if high is None else Activation("relu6") if high == 6 else None


_ACTIVATIONS: dict[Any, Callable[[dict[str, Any]], Activation | None]] = {
    aten.relu.default: lambda bound: Activation("relu"),
    aten.relu6.default: lambda bound: Activation("relu6"),
    aten.silu.default: lambda bound: Activation("silu"),
    aten.hardswish.default: lambda bound: Activation("hardswish"),
    aten.gelu.default: lambda bound: Activation(
        "gelu_tanh" if bound["approximate"] == "tanh" else "gelu"
    ),
    aten.leaky_relu.default: lambda bound: Activation("leaky_relu", float(bound["negative_slope"])),
    aten.rrelu.default: lambda bound: Activation(
        "leaky_relu", (bound["lower"] + bound["upper"]) / 2
    ),
    aten.hardtanh.default: lambda bound: _clamped(bound["min_val"], bound["max_val"]),
    aten.clamp.default: lambda bound: _clamped(bound["min"], bound["max"]),
    aten.clamp_min.default: lambda bound: _clamped(bound["min"], None),
}
