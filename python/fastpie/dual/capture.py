"""From a module to a `Program`: `torch.export`, then the layers and what can be fused into them.

Whatever an `nn.Module` computes in eval mode is written down as a flat list of steps, with the
weights left as names, in three parts: the export (`_export`), reading its graph into calls
(`_Reader`), and recognising layers and what can be fused into them (`fusion.py`). What cannot be
written down (control flow that depends on the data, random operators, buffers that change) is
refused with the operator named.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fastpie.dual.features import features_of, watched
from fastpie.dual.fusion import PADS, Facts, bind, fuse, sizes_of
from fastpie.dual.inputs import batch_size
from fastpie.dual.program import (
    Call,
    Program,
    Structure,
    TensorName,
    Value,
    interpret,
    map_leaves,
)
from fastpie.errors import FastpieError

__all__ = ["CaptureError", "capture"]

aten = torch.ops.aten

# torch.export, warning filters and the attention switch are the process's, not a thread's.
_ONE_AT_A_TIME = threading.Lock()

# The submodule of the exported wrapper that holds the model.
_PREFIX = "model."


class CaptureError(FastpieError):
    """The model cannot be written down as a `Program`; it still runs as a `DualModel`.

    The message names the operator or the line of the model that stands in the way.
    """


def capture(
    model: nn.Module, args: tuple[Any, ...], *, feature_module: str | None = None
) -> Program:
    """Write down what `model` computes in eval mode, for any batch size.

    The model is left as it was: modes, attributes, hooks. Its own warnings are shown, torch's about
    the export are not.

    Args:
        model: a module; its weights are not copied into the program.
        args: example of its positional arguments. Dimension 0 is the batch in every tensor whose
            first size is that of the first tensor; all other sizes hold as they are here, and so do
            arguments that are no tensors.
        feature_module: what to keep as `Program.feature`; see `fastpie.dual.features.features_of`.

    Returns:
        Program, checked against the model at batch 1, where torch.export looks away (it takes every
        dynamic size to be at least 2).

    Raises:
        CaptureError: if the model cannot be captured.
        FastpieError: for no tensor among `args`, or a feature module that is not called exactly
            once.
    """
    if feature_module is not None:
        features_of(model, feature_module)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise CaptureError("Expected a model in Python, but it holds a torch.jit.ScriptModule.")
    batch = batch_size(args)
    leaves, spec = pytree.tree_flatten(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    batched = [t.ndim > 0 and t.shape[0] == batch for t in tensors]
    with _ONE_AT_A_TIME, _frozen(model, tensors[0].device):
        wrapper = _Flat(model, leaves, spec, feature_module)
        exported = _export(wrapper, tensors, batched, batch)
        if feature_module is not None and wrapper.returned.feature_calls != 1:
            raise FastpieError(
                f"Expected module {feature_module!r} to be called once, but the model called it "
                f"{wrapper.returned.feature_calls} times."
            )
        program = _Reader(model, wrapper, exported).program()
        _check_at_batch_one(program, model, wrapper, tensors, batched)
    return program


@contextmanager
def _frozen(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients or autocast, attention by its plain operators; all restored after.

    torch.export calls the model with fake tensors: a module that keeps an activation or a counter
    as an attribute would be left with a fake one.
    """
    modules = list(model.modules())
    before = [
        (
            dict(m.__dict__),
            {name: dict(m.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")},
        )
        for m in modules
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, (attributes, members) in zip(modules, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, items in members.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(items)


_RUN = object()  # stands for a leaf of the output that only a run gives


@dataclass
class _Returned:
    """What the model returned while it was traced."""

    leaves: list[Any] = field(default_factory=list)  # of the output, then of the feature
    split: int = 0  # leaves of the output
    output_spec: pytree.TreeSpec | None = None
    feature_spec: pytree.TreeSpec | None = None
    feature_calls: int = 0


class _Flat(nn.Module):
    """The model from flat tensors to flat tensors, as torch.export sees it.

    Trees, constants and features are handled here, so that any tree that pytree knows will do.
    """

    def __init__(
        self, model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec, feature_module: str | None
    ) -> None:
        super().__init__()
        self.model = model
        self.leaves = leaves
        self.spec = spec
        self.feature_module = feature_module
        # An object of its own: torch.export takes back what a forward assigns to its module.
        self.returned = _Returned()

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        output, features = self.call(pytree.tree_unflatten(leaves, self.spec))
        leaves, self.returned.output_spec = pytree.tree_flatten(output)
        self.returned.feature_calls = len(features)
        self.returned.split = len(leaves)
        if len(features) == 1:
            of_feature, self.returned.feature_spec = pytree.tree_flatten(features[0])
            leaves += of_feature
        symbolic = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
        self.returned.leaves = [_RUN if isinstance(leaf, symbolic) else leaf for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, symbolic))

    def call(self, args: Any) -> tuple[Any, list[Any]]:
        """The model's output, and its features in each call of their module."""
        if self.feature_module is None:
            return self.model(*args), []
        with watched(self.model, self.feature_module) as seen:
            return self.model(*args), seen


def _export(
    wrapper: _Flat, tensors: list[Tensor], batched: list[bool], batch: int
) -> ExportedProgram:
    example = tuple(
        _at_least_two(t) if is_batched and batch < 2 else t
        for t, is_batched in zip(tensors, batched, strict=True)
    )
    dim = Dim("batch")
    shapes = tuple({0: dim} if is_batched else None for is_batched in batched)
    with warnings.catch_warnings():
        # torch on its own internals. One message carries the address of contextlib or copyreg.
        warnings.filterwarnings("ignore", module=r"torch\.")
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attributes? self\.")
        try:
            with _without_graph_on_stderr():
                exported: ExportedProgram = torch.export.export(
                    wrapper, example, dynamic_shapes=(shapes,), strict=False
                )
                # Twice as long as the export itself, so only where it is needed.
                if _in_place(exported) is None:
                    exported = exported.run_decompositions({})
        except Exception as error:
            raise CaptureError(
                f"Expected a model that torch.export captures, but {_reason(error)}."
            ) from error
    return exported


@contextmanager
def _without_graph_on_stderr() -> Iterator[None]:
    """torch.export prints the graph of a failed export; all else that was printed is kept."""
    printed = io.StringIO()
    graph = ""
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except Exception as error:
        graph = str(getattr(error, "partial_fx_graph", ""))
        raise
    finally:
        text = printed.getvalue()
        sys.stderr.write(text.replace(graph + "\n", "") if graph else text)


def _at_least_two(t: Tensor) -> Tensor:
    """A batch of two: torch.export takes a size of 0 or 1 for a constant."""
    return torch.cat([t, t]) if len(t) else t.new_zeros((2, *t.shape[1:]))


def _reason(error: Exception) -> str:
    """One line of a failed export, with the line of the model that it came from."""
    text = str(error)
    fixed = re.search(r"specialized it to be a constant \((\d+)\)", text)
    if fixed:
        what = f"its code fixes the batch size to {fixed[1]} (len(x) does; x.shape[0] does not)"
    elif "Constraints violated" in text:
        lines = [line.strip(" -") for line in text.splitlines()[1:] if line.strip()]
        what = f"its code takes some batch sizes only ({(lines or ['?'])[0]})"
    elif "data-dependent" in text:
        what = f"its path depends on the data ({text.splitlines()[0].rstrip('.')})"
    else:
        first = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
        what = f"it fails with {type(error).__name__}: {first.split('. ')[0].rstrip('.')}"
    torch_root = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_root, "<")) and frame.filename != __file__
    ]
    if frames:
        what += f", at {_place(frames[-1].filename, frames[-1].lineno, frames[-1].name)}"
    return what


def _place(file: str, line: Any, function: str) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}"


def _where(node: fx.Node) -> str:
    """The line of the model behind a node, as the end of a message; "" if torch kept none."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.stack_trace or "")
    own = [f for f in frames if not f[0].startswith(str(Path(torch.__file__).parent))]
    return f", at {_place(*own[-1])}" if own else ""


# --- Reading the graph -------------------------------------------------------------------------

# Copies, which mean nothing in a functional program.
_COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
# Copies where shape and dtype stay as they are.
_CASTS = {
    aten._to_copy.default,
    aten.expand.default,
    aten.reshape.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.type_as.default,
    aten.view.default,
}
# Views that fail on some memory formats, and what takes their place.
_OF_ANY_LAYOUT: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
_DROPOUTS = {
    aten.alpha_dropout.default,
    aten.dropout.default,
    aten.feature_alpha_dropout.default,
    aten.feature_dropout.default,
}
# Checks of shapes and metadata that torch.export adds; the shapes hold by `Program.flatten`.
_CHECKS = {
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
# What depends on strides, which each backend chooses as it likes.
_STRIDED = {"as_strided", "as_strided_copy", "as_strided_scatter", "sym_stride"}

_KINDS: dict[InputKind, Literal["parameter", "buffer", "constant"]] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}


# Composite operators whose result is new memory; others may return their argument (dropout).
_FRESH = {
    aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d,
    aten.avg_pool1d,
    aten.batch_norm,
    aten.conv1d,
    aten.conv2d,
    aten.conv3d,
    aten.conv_transpose1d,
    aten.conv_transpose2d,
    aten.conv_transpose3d,
    aten.group_norm,
    aten.instance_norm,
    aten.layer_norm,
    aten.linear,
    aten.matmul,
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
    aten.scaled_dot_product_attention,
    aten.softmax,
}


class _InPlace(NamedTuple):
    """How the operations in place of a graph become functional ones."""

    twins: dict[fx.Node, Any]  # the functional operator for each of them
    same: dict[fx.Node, fx.Node]  # the first node that is the very tensor which a node returns


def _in_place(exported: ExportedProgram) -> _InPlace | None:
    """What to do about the operations in place, if it is simple.

    An operation in place (`relu_`) becomes the plain one, and later readers of the tensor read its
    result, provided that nobody reads the old memory under another name: through a view, or as an
    input of the program. None if torch's own functionalization has to sort it out.
    """
    nodes = list(exported.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    twins: dict[fx.Node, Any] = {}
    same: dict[fx.Node, fx.Node] = {}
    memory: dict[fx.Node, set[fx.Node]] = {}  # the nodes that may share a node's memory
    for i, node in enumerate(nodes):
        memory[node] = {node}
        if node.op != "call_function" or _op_name(node.target) == "sym_size":
            continue
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator) or _changes_statistics(node):
            return None
        sources = node.all_input_nodes
        if isinstance(target, torch._ops.OpOverload):
            changes = target._schema.is_mutable and target is not aten.detach_.default
            if changes:
                twin = _twin(node)
                if twin is None:
                    return None
                twins[node] = twin
            if changes or target is aten.detach_.default or _is_idle_dropout(target, node):
                sources = sources[:1]
                same[node] = same.get(sources[0], sources[0])
            else:
                sources = _may_alias(node)
            if changes:
                for other in memory[sources[0]]:
                    another = same.get(other, other) is not same[node]
                    if other.op != "call_function" or (
                        another and any(position[user] > i for user in other.users)
                    ):
                        return None
        for source in sources:
            memory[node] |= memory[source]
        for member in memory[node]:
            memory[member] = memory[node]
    return _InPlace(twins, same)


def _is_idle_dropout(target: Any, node: fx.Node) -> bool:
    """Whether a node is a dropout in eval mode, which returns the very tensor it is given."""
    return target in _DROPOUTS and bind(target, node.args, node.kwargs).get("train") is False


def _changes_statistics(node: fx.Node) -> bool:
    """Whether a normalisation updates running statistics, which its schema does not tell."""
    if node.target not in (aten.batch_norm.default, aten.instance_norm.default):
        return False
    bound = bind(node.target, node.args, node.kwargs)
    updates = bound.get("training") or bound.get("use_input_stats")
    return bool(updates) and bound["running_mean"] is not None


def _may_alias(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the result may share."""
    target: Any = node.target
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    if composite and target.overloadpacket not in _FRESH:
        return node.all_input_nodes
    bound = zip(target._schema.arguments, node.args, strict=False)
    shared = [arg for declared, arg in bound if declared.alias_info is not None]
    return [arg for arg in shared if isinstance(arg, fx.Node)]


def _twin(node: fx.Node) -> Any:
    """The functional operator that computes what one in place writes; None if there is none."""
    target: Any = node.target
    schema = target._schema
    written = [arg.alias_info is not None and arg.alias_info.is_write for arg in schema.arguments]
    if torch.Tag.inplace_view in target.tags or written.count(True) != 1 or not written[0]:
        return None
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    twin = getattr(packet, target._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        return None
    names = [[a.name for a in s.arguments[1:]] for s in (schema, twin._schema)]
    if names[0] != names[1]:
        return None
    # Written into a tensor a result keeps that tensor's dtype; on its own it may be promoted.
    vals = [source.meta.get("val") for source in node.all_input_nodes]
    return twin if len({val.dtype for val in vals if isinstance(val, Tensor)}) == 1 else None


class _Reader:
    """Turns the graph of an exported program into calls, then into layers."""

    def __init__(self, model: nn.Module, wrapper: _Flat, exported: ExportedProgram) -> None:
        self.wrapper = wrapper
        self.exported = exported
        self.canonical = _first_names(model)
        self.kinds: dict[TensorName, Literal["parameter", "buffer", "constant"]] = {}
        self.constants: dict[TensorName, Tensor] = {}
        self.operands: dict[fx.Node, Value | TensorName] = {}
        self.inputs: list[Value] = []
        self.calls: list[Call] = []
        self.facts = Facts()
        self.names: Counter[str] = Counter()
        self.effects: set[Value] = set()
        self.in_place = _in_place(exported) or _InPlace({}, {})

    def program(self) -> Program:
        self._refuse_changes()
        nodes = list(self.exported.graph.nodes)
        for node, spec in zip(
            [n for n in nodes if n.op == "placeholder"],
            self.exported.graph_signature.input_specs,
            strict=True,
        ):
            self._read_placeholder(node, spec)
        for node in nodes:
            if node.op == "call_function":
                self._read_call(node)
        (results,) = nodes[-1].args
        returned = self.wrapper.returned
        if returned.output_spec is None or not results:
            raise CaptureError("Expected a model that returns a tensor, but it returns none.")
        given = iter([self._operand(result) for result in results])
        leaves = [next(given) if leaf is _RUN else leaf for leaf in returned.leaves]
        output = Structure(tuple(leaves[: returned.split]), returned.output_spec)
        feature = None
        if returned.feature_spec is not None:
            feature = Structure(tuple(leaves[returned.split :]), returned.feature_spec)

        kept = output.values() + (feature.values() if feature else [])
        self.calls = _without_dead(self.calls, kept, self.effects)
        self._refuse_random()
        steps = fuse(self.calls, kept, self.facts)
        named = {name for step in steps for name in step.tensors()}
        named.update(output.tensors() + (feature.tensors() if feature else []))
        defined = {*self.inputs, *(step.result for step in steps)}
        arguments = iter(self.inputs)
        return Program(
            steps=tuple(steps),
            inputs=tuple(self.inputs),
            arguments=Structure(
                tuple(
                    next(arguments) if isinstance(leaf, Tensor) else leaf
                    for leaf in self.wrapper.leaves
                ),
                self.wrapper.spec,
            ),
            output=output,
            feature=feature,
            tensors={name: kind for name, kind in self.kinds.items() if name in named},
            constants={name: t for name, t in self.constants.items() if name in named},
            meta={value: meta for value, meta in self.facts.meta.items() if value in defined},
        )

    def _refuse_changes(self) -> None:
        for spec in self.exported.graph_signature.output_specs:
            if spec.kind is OutputKind.USER_OUTPUT:
                continue
            target = (spec.target or "").removeprefix(_PREFIX)
            what = {
                OutputKind.BUFFER_MUTATION: f"buffer {target!r}",
                OutputKind.USER_INPUT_MUTATION: "its own input",
            }.get(spec.kind, f"{target!r} ({spec.kind.name.lower()})")
            name = getattr(spec.arg, "name", None)
            node = next((n for n in self.exported.graph.nodes if n.name == name), None)
            raise CaptureError(
                f"Expected a model that changes nothing in eval mode, but it writes to {what}"
                f"{_where(node) if node is not None else ''}."
            )

    def _read_placeholder(self, node: fx.Node, spec: Any) -> None:
        val = node.meta.get("val")
        if spec.kind is InputKind.USER_INPUT:
            value = Value(node.name)
            self.operands[node] = value
            self.inputs.append(value)
            self.facts.add(value, val)
            return
        kind = _KINDS.get(spec.kind)
        if kind is None or not isinstance(val, Tensor):
            raise CaptureError(
                f"Expected a model of tensors, but its code uses {spec.target!r} "
                f"({spec.kind.name.lower()})."
            )
        path = spec.target.removeprefix(_PREFIX)
        name = TensorName(self.canonical.get(path, path))
        if kind == "constant":
            # The model's attribute or one of the wrapper, of a parameter's name even.
            while name in self.constants or name in self.canonical:
                name = TensorName(f"{name}_")
            self.constants[name] = self.exported.constants[spec.target]
        self.operands[node] = name
        self.kinds[name] = kind
        self.facts.tensor_shapes[name] = tuple(val.shape)

    def _read_call(self, node: fx.Node) -> None:
        target = self.in_place.twins.get(node, node.target)
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"Expected a model without control flow on data, but it uses {target.name()!r}"
                f"{_where(node)}."
            )
        op = _op_name(target)
        if op in _STRIDED:
            raise CaptureError(
                f"Expected a model that does not look at strides, but it uses {target}"
                f"{_where(node)}."
            )
        if op in _CHECKS or (op == "_assert_scalar" and not _reads_data(node)):
            return
        if self._is_copy(node, target):
            self.operands[self._first(node)] = self._operand(node.all_input_nodes[0])
            return
        if self._is_cast_of_constant(node, target):
            self._add_cast_constant(node, target)
            return
        target = _OF_ANY_LAYOUT.get(target, target)
        value = Value(node.name)
        args, kwargs = map_leaves(
            (tuple(node.args), dict(node.kwargs)),
            self._operand,
        )
        self.operands[self._first(node)] = value
        self.facts.add(value, node.meta.get("val"))
        self.facts.nodes[value] = node
        if op == "_assert_scalar":
            self.effects.add(value)
        path = _module_path(node)
        self.calls.append(
            Call(
                name=self._unique(f"{path}/{op}" if path else op),
                result=value,
                target=target,
                args=args,
                kwargs=kwargs,
            )
        )

    def _operand(self, leaf: Any) -> Any:
        return self.operands[self._first(leaf)] if isinstance(leaf, fx.Node) else leaf

    def _first(self, node: fx.Node) -> fx.Node:
        return self.in_place.same.get(node, node)

    def _unique(self, name: str) -> str:
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}#{self.names[name]}"

    def _is_copy(self, node: fx.Node, target: Any) -> bool:
        """Whether the result of a node is its first argument."""
        if target in _COPIES or _is_idle_dropout(target, node):
            return True
        if target in PADS:
            return not any(bind(target, node.args, node.kwargs)["pad"])
        if target not in _CASTS:
            return False
        before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
        return (
            isinstance(before, Tensor)
            and sizes_of(before) == sizes_of(after)
            and (before.dtype, before.device, before.layout)
            == (after.dtype, after.device, after.layout)
        )

    def _is_cast_of_constant(self, node: fx.Node, target: Any) -> bool:
        """As `torch.tensor(...).to(x)` in a model's code is: done once and for all, here."""
        sources = [self._operand(source) for source in node.all_input_nodes]
        return target in _CASTS and len(sources) == 1 and sources[0] in self.constants

    def _add_cast_constant(self, node: fx.Node, target: Any) -> None:
        args, kwargs = map_leaves(
            (tuple(node.args), dict(node.kwargs)),
            lambda leaf: self.constants[self._operand(leaf)] if isinstance(leaf, fx.Node) else leaf,
        )
        name = TensorName(node.name)
        while name in self.constants or name in self.canonical:
            name = TensorName(f"{name}_")
        with torch.no_grad():
            self.constants[name] = target(*args, **kwargs)
        self.kinds[name] = "constant"
        self.facts.tensor_shapes[name] = tuple(self.constants[name].shape)
        self.operands[self._first(node)] = name

    def _refuse_random(self) -> None:
        for call in self.calls:
            target = call.target
            if not isinstance(target, torch._ops.OpOverload):
                continue
            if torch.Tag.nondeterministic_seeded not in target.tags:
                continue
            bound = bind(target, call.args, call.kwargs)
            asleep = (
                bound.get("train") is False
                or bound.get("training") is False
                or bound.get("dropout_p") == 0.0
            )
            if not asleep:
                raise CaptureError(
                    f"Expected a model that draws no random numbers in eval mode, but it uses "
                    f"{target}{_where(self.facts.nodes[call.result])}."
                )


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter and buffer, by every name it has."""
    first: dict[str, str] = {}
    for members in (model.named_parameters, model.named_buffers):
        canonical: dict[int, str] = {}
        for name, tensor in members(remove_duplicate=False):
            first[name] = canonical.setdefault(id(tensor), name)
    return first


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "__name__", target))


def _module_path(node: fx.Node) -> str:
    """Path in the model of the module whose code called the operator; "" for the model."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    path = re.sub(r"@\d+", "", path).removeprefix("L['self'].")  # "@1": the second call of a module
    return "" if path == _PREFIX[:-1] else path.removeprefix(_PREFIX)


def _reads_data(node: fx.Node) -> bool:
    """Whether a number comes from the data of a tensor, not from its shape."""
    pending, seen = list(node.all_input_nodes), set()
    while pending:
        current = pending.pop()
        if _op_name(current.target) in ("_local_scalar_dense", "item"):
            return True
        if current not in seen and not isinstance(current.meta.get("val"), Tensor):
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


def _without_dead(calls: list[Call], kept: list[Value], effects: set[Value]) -> list[Call]:
    needed = set(kept)
    alive = []
    for call in reversed(calls):
        if call.result in needed or call.result in effects:
            alive.append(call)
            needed.update(call.values())
    return alive[::-1]


# --- Batch 1 -----------------------------------------------------------------------------------

# Far above rounding, far below what another path through the model would give.
_OTHER_PATH = 0.05


def _check_at_batch_one(
    program: Program,
    model: nn.Module,
    wrapper: _Flat,
    tensors: list[Tensor],
    batched: list[bool],
) -> None:
    """Refuse a model of which torch.export missed something.

    It takes every dynamic size to be at least 2, so it does not see a path for a single image; nor
    does it tell of a buffer that the forward replaces.
    """
    single = [
        (_at_least_two(t) if not len(t) else t)[:1] if is_batched else t
        for t, is_batched in zip(tensors, batched, strict=True)
    ]
    remaining = iter(single)
    leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in wrapper.leaves]
    buffers = dict(model.named_buffers())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = model(*pytree.tree_unflatten(leaves, wrapper.spec))
    except Exception:
        return  # a model that takes no single image, such as one with batch statistics
    for name, buffer in model.named_buffers():
        if buffers.get(name) is not buffer:
            raise CaptureError(
                f"Expected a model that changes nothing in eval mode, but it writes to buffer "
                f"{name!r}."
            )
    known: dict[str, Tensor] = {str(name): t for name, t in program.constants.items()}
    known.update(model.named_buffers())
    known.update(model.named_parameters())
    got, _ = interpret(program, single, known.__getitem__)
    wanted, spec = pytree.tree_flatten(expected)
    had, had_spec = pytree.tree_flatten(got)
    if spec != had_spec or not all(_same_path(*pair) for pair in zip(wanted, had, strict=True)):
        raise CaptureError(
            "Expected a model that treats a batch of one like any other, but there it does not give "
            "what torch.export saw (does its code ask for the batch size?)."
        )


def _same_path(want: Any, have: Any) -> bool:
    if not isinstance(want, Tensor):
        return not isinstance(have, Tensor)
    if not isinstance(have, Tensor) or want.shape != have.shape or want.dtype != have.dtype:
        return False
    if not want.is_floating_point() or not want.numel():
        return True
    want, have = want.double().nan_to_num(0, 0, 0), have.double().nan_to_num(0, 0, 0)
    scale = want.abs().max().item()
    return bool((want - have).abs().max().item() <= _OTHER_PATH * scale + 1e-6)
