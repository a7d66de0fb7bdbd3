"""A captured model as data: a list of steps over named values, and its plain interpreter.

`capture` writes a `Program`, the planner of each backend reads it. Nothing here knows of masks, of
the pruned model or of kernels: weights are names, looked up in whatever set of tensors a caller
has (dense, pruned at a level, folded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from fastpie.errors import FastpieError

__all__ = [
    "Activation",
    "Affine",
    "Call",
    "Convolution",
    "Linear",
    "Lookup",
    "Norm",
    "Program",
    "Step",
    "Structure",
    "TensorMeta",
    "TensorName",
    "Value",
    "activate",
    "interpret",
    "map_leaves",
    "normalize",
    "run_step",
    "without_batch_sizes",
]


class Value(str):
    """Name of a value that a run computes: an input, or the result of one step (SSA)."""

    __slots__ = ()


class TensorName(str):
    """Name of a tensor that exists before a run: a parameter, a buffer or a constant.

    A parameter has the name that `named_parameters()` gives it, so the first one if several
    modules share it; a buffer likewise. A constant has a name of its own in `Program.constants`.
    """

    __slots__ = ()


Lookup = Callable[[TensorName], Tensor]


@dataclass(frozen=True)
class TensorMeta:
    """What is known of a tensor before a run."""

    shape: tuple[int | None, ...]
    """None where the size depends on the batch size (the batch itself, or a multiple of it)."""
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Norm:
    """BatchNorm with fixed statistics: (x - mean) / sqrt(var + eps) * weight + bias, channel-wise.

    Channels are dimension 1 of the tensor normalised.
    """

    weight: TensorName | None
    bias: TensorName | None
    mean: TensorName
    var: TensorName
    eps: float


@dataclass(frozen=True)
class Activation:
    """An elementwise function that ends a step."""

    name: Literal["relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "leaky_relu"]
    slope: float | TensorName = 0.0
    """Of the negative side, for "leaky_relu". A name for PReLU with one slope for all channels."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation; it defines `result` once.

    Attributes:
        name: path of the module and operation, as in "layer1.0.conv1/conv2d"; unique in a program.
        result: the value that it defines.
    """

    name: str
    result: Value

    def values(self) -> list[Value]:
        """The values that it reads, in the order of its fields, repeated if read twice."""
        return [leaf for leaf in self._operands() if isinstance(leaf, Value)]

    def tensors(self) -> list[TensorName]:
        """The parameters, buffers and constants that it reads."""
        return [leaf for leaf in self._operands() if isinstance(leaf, TensorName)]

    def _operands(self) -> Iterator[Any]:
        for field in fields(self):
            if field.name not in ("name", "result"):
                yield from _leaves(getattr(self, field.name))


@dataclass(frozen=True, kw_only=True)
class Call(Step):
    """target(*args, **kwargs), for all that has no step of its own.

    Attributes:
        target: an ATen operator, or a Python function on ints such as `operator.mul`.
        args: with `Value` and `TensorName` leaves in nested lists, tuples and dicts.
        kwargs: likewise.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def aliased(self) -> list[Value]:
        """The values whose memory the result may share (`transpose`, `reshape`, `getitem`)."""
        if not isinstance(self.target, torch._ops.OpOverload):
            return self.values()
        bound = zip(self.target._schema.arguments, self.args, strict=False)
        shared = [arg for declared, arg in bound if declared.alias_info is not None]
        return [leaf for leaf in _leaves(shared) if isinstance(leaf, Value)]


@dataclass(frozen=True, kw_only=True)
class Convolution(Step):
    """result = activation(norm(convolution(input)) + residual), in 1, 2 or 3 dimensions.

    Attributes:
        input: [N, C_in, *spatial], always batched.
        weight: [C_out, C_in / groups, *kernel].
        stride: one number for each spatial dimension, like `padding` and `dilation`.
        padding: zeros on both sides of each spatial dimension.
        padding_behind: zeros behind each, where they are not as many as before it.
        norm: of the C_out channels, to be folded into weight and bias.
        residual: of the result's shape and dtype, defined before this step.
    """

    input: Value
    weight: TensorName
    bias: TensorName | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_behind: tuple[int, ...] | None = None
    norm: Norm | None = None
    residual: Value | None = None
    activation: Activation | None = None

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Input and padding for an operator that pads both sides alike."""
        if self.padding_behind is None:
            return x, self.padding
        sides = zip(reversed(self.padding), reversed(self.padding_behind), strict=True)
        return functional.pad(x, [n for pair in sides for n in pair]), (0,) * len(self.padding)


@dataclass(frozen=True, kw_only=True)
class Linear(Step):
    """result = activation(norm(linear(input)) + residual).

    Attributes:
        input: [..., in_features].
        weight: [out_features, in_features].
        norm: of the features; only where the result is [N, out_features].
        residual: of the result's shape and dtype, defined before this step.
    """

    input: Value
    weight: TensorName
    bias: TensorName | None
    norm: Norm | None = None
    residual: Value | None = None
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Affine(Step):
    """result = activation(norm(input)): a BatchNorm that no step before it could take.

    As in DenseNet, where it is the prologue of the next convolution.
    """

    input: Value
    norm: Norm
    activation: Activation | None = None


@dataclass(frozen=True)
class Structure:
    """A tree as models take and return it, flattened.

    Attributes:
        leaves: a `Value` (or `TensorName`) for what is known in a run only; anything else is a
            constant of the model or of the example.
        spec: how to put leaves together, of `torch.utils._pytree`.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    def values(self) -> list[Value]:
        """The values among the leaves, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Value)]

    def tensors(self) -> list[TensorName]:
        """The parameters, buffers and constants among the leaves: a model that returns them."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorName)]

    def build(self, values: Mapping[Value, Any], lookup: Lookup | None = None) -> Any:
        """The tree, with each value and name replaced by what it stands for."""
        return pytree.tree_unflatten(
            [_resolve(leaf, values, lookup) for leaf in self.leaves], self.spec
        )


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model in eval mode, for any batch size, as steps in the order of execution.

    It is functional: no step changes a tensor. Operations that only copy were removed, so an output
    can be an input, a view of one, a parameter, or another output: copy before handing it out.

    Attributes:
        steps: each reads inputs, results of earlier steps and tensors by name.
        inputs: the tensor leaves of the model's positional arguments.
        arguments: the arguments; leaves that are no tensors are those of the example, and the
            program holds for them only.
        output: what the model returns.
        feature: what the feature module returns, or None if none was asked for.
        tensors: the tensors read, by name, and what they are in the model.
        constants: the value of each "constant": tensors made or kept by the model's code.
        meta: of every input and every result that is a tensor (not of ints and tuples).
    """

    steps: tuple[Step, ...]
    inputs: tuple[Value, ...]
    arguments: Structure
    output: Structure
    feature: Structure | None
    tensors: dict[TensorName, Literal["parameter", "buffer", "constant"]]
    constants: dict[TensorName, Tensor]
    meta: dict[Value, TensorMeta]

    def outputs(self) -> list[Value]:
        """The values that outlive a run: those of the output and of the feature."""
        return self.output.values() + (self.feature.values() if self.feature else [])

    def users(self) -> dict[Value, list[int]]:
        """The steps that read each value, by position; outputs count as the position after all."""
        found: dict[Value, list[int]] = {}
        for position, step in enumerate(self.steps):
            for value in dict.fromkeys(step.values()):
                found.setdefault(value, []).append(position)
        for value in dict.fromkeys(self.outputs()):
            found.setdefault(value, []).append(len(self.steps))
        return found

    def last_use(self) -> dict[Value, int]:
        """Position of the last step that reads each value; `len(steps)` for an output.

        A value that nothing reads is absent. Memory of a view lives as long as its last reader:
        see `Call.aliased`.
        """
        return {value: positions[-1] for value, positions in self.users().items()}

    def flatten(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The tensors among a model's positional arguments, in the order of `inputs`.

        Raises:
            FastpieError: for another structure, another constant, or a tensor of another dtype or
                of another size in any dimension but the batch.
        """
        leaves, spec = pytree.tree_flatten(args)
        if spec != self.arguments.spec:
            raise FastpieError(
                f"Expected inputs in the structure of the example, {self.arguments.spec}, but got "
                f"{spec}."
            )
        tensors: list[Tensor] = []
        batches: dict[int, None] = {}
        for leaf, known in zip(leaves, self.arguments.leaves, strict=True):
            if isinstance(known, Value):
                want = self.meta[known]
                if (
                    not isinstance(leaf, Tensor)
                    or leaf.dtype != want.dtype
                    or len(leaf.shape) != len(want.shape)
                    or any(w not in (None, n) for n, w in zip(leaf.shape, want.shape, strict=True))
                ):
                    raise FastpieError(
                        f"Expected input {len(tensors)} to be a tensor of {_text(want)}, as the "
                        f"example's, but got {_text(leaf)}."
                    )
                if None in want.shape:
                    batches[leaf.shape[0]] = None
                tensors.append(leaf)
            elif type(leaf) is not type(known) or not _equal(leaf, known):
                raise FastpieError(
                    f"Expected {known!r}, a constant of the example, but got {leaf!r}."
                )
        if len(batches) > 1:
            raise FastpieError(f"Expected inputs of one batch size, but got {list(batches)}.")
        return tensors

    def __str__(self) -> str:
        """One line for each step."""
        lines = [f"inputs: {', '.join(self.inputs)}"]
        for step in self.steps:
            operands = ", ".join(step.values() + [f"<{name}>" for name in step.tensors()])
            extra = [
                getattr(step, "activation", None) and f"activation={step.activation.name}",  # type: ignore[attr-defined]
                getattr(step, "residual", None) and f"residual={step.residual}",  # type: ignore[attr-defined]
            ]
            lines.append(
                f"{step.result} = {type(step).__name__} [{step.name}] ({operands})"
                + "".join(f" {text}" for text in extra if text)
            )
        return "\n".join([*lines, f"outputs: {', '.join(self.outputs())}"])


def without_batch_sizes(program: Program) -> Program:
    """The same program with ``x.reshape(x.shape[0], ...)`` written as ``x.reshape(-1, ...)``.

    Where the other sizes are known, the batch size need not be: a step that reads none can run on
    a part of the batch.
    """
    sizes = {
        step.result
        for step in program.steps
        if isinstance(step, Call)
        and step.target is torch.ops.aten.sym_size.int
        and step.args[1:] == (0,)
    }
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, Call) and step.target is torch.ops.aten.reshape.default:
            meta = program.meta[step.result]
            if step.args[1][0] in sizes and all(meta.shape[1:]):
                step = replace(step, args=(step.args[0], [-1, *meta.shape[1:]]))
        steps.append(step)
    needed = set(program.outputs())
    for step in reversed(steps):
        if step.result in needed:
            needed.update(step.values())
    return replace(program, steps=tuple(step for step in steps if step.result in needed))


def interpret(
    program: Program, inputs: Sequence[Tensor] | Mapping[Value, Tensor], lookup: Lookup
) -> tuple[Any, Any]:
    """Run a program step by step with plain PyTorch: the readable twin of every planner.

    Args:
        program: from `capture`.
        inputs: as `Program.flatten` gives them, or by name.
        lookup: gives the parameter, buffer or constant of a name.

    Returns:
        The model's output, and the feature module's (None without one).
    """
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(program.inputs, inputs, strict=True))
    values: dict[Value, Any] = dict(inputs)
    last_use = program.last_use()
    for position, step in enumerate(program.steps):
        values[step.result] = run_step(step, values, lookup)
        for value in {*step.values(), step.result}:
            if last_use.get(value, position) == position:
                del values[value]
    output = program.output.build(values, lookup)
    return output, program.feature.build(values, lookup) if program.feature else None


def run_step(step: Step, values: Mapping[Value, Any], lookup: Lookup) -> Any:
    """The result of one step, from the values that it reads."""
    if isinstance(step, Call):
        args, kwargs = map_leaves(
            (step.args, step.kwargs), lambda leaf: _resolve(leaf, values, lookup)
        )
        return step.target(*args, **kwargs)
    if isinstance(step, Affine):
        return activate(normalize(values[step.input], step.norm, lookup), step.activation, lookup)
    if not isinstance(step, Convolution | Linear):
        raise TypeError(f"Expected a step, but got {type(step)}.")
    x, weight = values[step.input], lookup(step.weight)
    bias = None if step.bias is None else lookup(step.bias)
    if isinstance(step, Linear):
        x = functional.linear(x, weight, bias)
    else:
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(step.stride) - 1]
        x, padding = step.padded(x)
        x = convolve(x, weight, bias, step.stride, padding, step.dilation, step.groups)
    if step.norm is not None:
        x = normalize(x, step.norm, lookup)
    if step.residual is not None:
        x = x + values[step.residual]
    return activate(x, step.activation, lookup)


def normalize(x: Tensor, norm: Norm, lookup: Lookup) -> Tensor:
    """BatchNorm with fixed statistics."""
    return functional.batch_norm(
        x,
        lookup(norm.mean),
        lookup(norm.var),
        None if norm.weight is None else lookup(norm.weight),
        None if norm.bias is None else lookup(norm.bias),
        training=False,
        eps=norm.eps,
    )


def activate(x: Tensor, activation: Activation | None, lookup: Lookup) -> Tensor:
    """The activation of `x`; `x` itself for None."""
    if activation is None:
        return x
    slope = activation.slope
    if isinstance(slope, TensorName):
        return functional.prelu(x, lookup(slope))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": functional.relu,
        "relu6": functional.relu6,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "hardswish": functional.hardswish,
        "leaky_relu": lambda t: functional.leaky_relu(t, slope),
    }
    return functions[activation.name](x)


def map_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """change(leaf) in nested lists, tuples and dicts, as the arguments of a `Call` are."""
    if isinstance(tree, list | tuple):
        return type(tree)([map_leaves(item, change) for item in tree])
    if isinstance(tree, dict):
        return {key: map_leaves(item, change) for key, item in tree.items()}
    return change(tree)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    elif is_dataclass(tree) and not isinstance(tree, type):
        yield from _leaves([getattr(tree, field.name) for field in fields(tree)])
    else:
        yield tree


def _resolve(leaf: Any, values: Mapping[Value, Any], lookup: Lookup | None) -> Any:
    if isinstance(leaf, Value):
        return values[leaf]
    if isinstance(leaf, TensorName):
        if lookup is None:
            raise KeyError(leaf)
        return lookup(leaf)
    return leaf


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # an array: no single truth value
        return False


def _text(x: Any) -> str:
    if not isinstance(x, Tensor | TensorMeta):
        return repr(type(x))
    sizes = ", ".join("N" if size is None else str(size) for size in x.shape)
    return f"shape [{sizes}] and dtype {x.dtype}"
