"""`capture`: a program that computes what the model does, with the layers and fusions it names."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from fastpie import FastpieError
from fastpie.dual.capture import CaptureError, capture
from fastpie.dual.program import (
    Activation,
    Affine,
    Call,
    Convolution,
    Linear,
    Program,
    TensorName,
    Value,
    interpret,
)
from networks import MONAI, SMALL, Network, ResidualCNN

CAPTURED = [n for n in SMALL + MONAI if n.name != "control_flow"]
aten = torch.ops.aten


@functools.cache
def captured(name: str) -> tuple[nn.Module, Program]:
    network = by_name(name)
    model = network.build()
    return model, capture(model, network.inputs(1 + len(name) % 3))


def by_name(name: str) -> Network:
    return next(n for n in SMALL + MONAI if n.name == name)


def tensors_of(model: nn.Module, program: Program) -> dict[str, Tensor]:
    """What a caller looks names up in."""
    known: dict[str, Tensor] = dict(model.named_buffers())
    known.update(model.named_parameters())
    known.update(program.constants)
    for name, kind in program.tensors.items():
        assert (
            name
            in {
                "parameter": dict(model.named_parameters()),
                "buffer": dict(model.named_buffers()),
                "constant": program.constants,
            }[kind]
        )
    return known


@torch.no_grad()
def run(model: nn.Module, program: Program, args: tuple[Any, ...]) -> tuple[Any, Any]:
    return interpret(program, program.flatten(args), tensors_of(model, program).__getitem__)


def assert_same(model: nn.Module, program: Program, args: tuple[Any, ...]) -> None:
    with torch.no_grad():
        want = model(*args)
    got, _ = run(model, program, args)
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert a == b


class Function(nn.Module):
    """A forward given as a function of (module, *inputs), over some layers."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def check(model: nn.Module | Callable[..., Any], *args: Any, **layers: Any) -> Program:
    """The program of a model, after it gave what the model gives at several batch sizes."""
    if not isinstance(model, nn.Module):
        model = Function(model, **layers)
    model.eval()
    program = capture(model, args)
    batch = len(args[0])
    for size in (1, batch, 5):
        resized = [
            torch.randn(size, *a.shape[1:], dtype=a.dtype)
            if isinstance(a, Tensor) and a.ndim and len(a) == batch
            else a
            for a in args
        ]
        assert_same(model, program, tuple(resized))
    assert len({step.name for step in program.steps}) == len(program.steps)
    assert len({step.result for step in program.steps}) == len(program.steps)
    assert all(step.result in program.last_use() for step in program.steps)  # nothing is dead
    return program


def kinds(program: Program) -> list[str]:
    """Type of each step, for a call its operator; ints for shapes left out."""
    names = [
        step.target._schema.name.split("::")[1]
        if isinstance(step, Call) and isinstance(step.target, torch._ops.OpOverload)
        else type(step).__name__
        for step in program.steps
    ]
    return [name for name in names if name != "sym_size"]


def steps_of(program: Program, kind: type) -> list[Any]:
    return [step for step in program.steps if isinstance(step, kind)]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), dtype=dtype)


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1, **kwargs)


def norm(channels: int = 3, kind: Any = nn.BatchNorm2d, **kwargs: Any) -> nn.Module:
    layer = kind(channels, **kwargs)
    for tensor, low in ((layer.running_mean, -1.0), (layer.running_var, 0.5)):
        nn.init.uniform_(tensor, low, 2.0)
    return layer


# --- Networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", CAPTURED, ids=lambda n: n.name)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_program_gives_what_the_model_gives(network: Network, batch: int) -> None:
    model, program = captured(network.name)
    assert_same(model, program, network.inputs(batch))


def test_residual_block_is_three_convolutions() -> None:
    model, program = captured("residual")
    assert kinds(program) == ["Convolution"] * 3 + ["mean", "Linear"]
    stem, first, second = steps_of(program, Convolution)
    assert [s.name for s in (stem, first, second)] == [
        "stem/conv2d",
        "conv1/conv2d",
        "conv2/conv2d",
    ]
    assert all(s.activation == Activation("relu") for s in (stem, first, second))
    assert (first.input, second.input, second.residual) == (stem.result, first.result, stem.result)
    assert second.norm.mean == "bn2.running_mean"
    assert second.norm.eps == model.bn2.eps
    assert (second.weight, second.bias) == ("conv2.weight", None)
    assert (second.padding, second.groups) == ((1, 1), 1)
    assert program.meta[stem.result].shape == (None, 6, 8, 8)
    assert program.meta[stem.result].dtype is torch.float32


@pytest.mark.parametrize(("name", "rank"), [("resnet18_2d", 2), ("resnet10_3d", 3)])
def test_resnet_has_nothing_left_but_layers_and_pooling(name: str, rank: int) -> None:
    model, program = captured(name)
    convolutions = steps_of(program, Convolution)
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d | nn.Conv3d) for m in model.modules())
    assert all(s.norm is not None and len(s.stride) == rank for s in convolutions)
    assert not {"add", "relu", "batch_norm", "Affine"} & set(kinds(program))
    blocks = [s for s in convolutions if s.residual is not None]
    assert len(blocks) == len([m for m in model.modules() if type(m).__name__ == "ResNetBlock"])
    for block in blocks:  # defined before it is read
        residual = program.steps.index(block)
        assert any(s.result == block.residual for s in program.steps[:residual])


def test_densenet_prologues_are_affine_steps() -> None:
    _, program = captured("densenet121")
    affine = steps_of(program, Affine)
    assert len(affine) == 62
    assert all(s.activation == Activation("relu") for s in affine)
    assert not {"relu", "batch_norm"} & set(kinds(program))
    # The first convolution of a layer takes the norm after it, which no one else reads.
    assert sum(s.norm is not None for s in steps_of(program, Convolution)) == 59


def test_efficientnet_swishes_and_pads_are_fused() -> None:
    _, program = captured("efficientnet_b0")
    convolutions = steps_of(program, Convolution)
    assert Counter(s.activation.name for s in convolutions if s.activation) == {"silu": 49}
    assert sum(s.residual is not None for s in convolutions) == 9
    assert kinds(program).count("silu") == 0
    assert "pad" not in kinds(program)
    uneven = [s for s in convolutions if s.padding_behind is not None]
    assert len(uneven) == 5  # stride 2: more zeros on one side
    assert all(s.stride == (2, 2) for s in uneven)


def test_unet_takes_prelu_into_convolutions() -> None:
    _, program = captured("unet")
    fused = [s for s in program.steps if getattr(s, "activation", None)]
    assert len(fused) == 6
    assert "prelu" not in kinds(program)
    assert all(isinstance(s.activation.slope, TensorName) for s in fused)
    assert all(s.activation.slope in s.tensors() for s in fused)


def test_transformer_layers_are_linear_steps() -> None:
    _, program = captured("vit")
    linear = steps_of(program, Linear)
    assert sum(s.residual is not None for s in linear) == 4
    assert sum(s.activation == Activation("gelu") for s in linear) == 2


def test_shared_tensors_have_their_first_name() -> None:
    _, program = captured("tied")
    assert [s.weight for s in steps_of(program, Linear)] == ["first.weight"] * 2 + ["head.weight"]
    _, program = captured("reused")
    assert [s.weight for s in steps_of(program, Convolution)] == ["conv.weight"] * 3
    assert len({s.name for s in steps_of(program, Convolution)}) == 3
    assert program.tensors["bn.running_var"] == "buffer"
    assert program.tensors["conv.weight"] == "parameter"


# --- What is fused and what is not -------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (functional.relu, Activation("relu")),
        (functional.relu_, Activation("relu")),
        (lambda t: t.clamp(min=0), Activation("relu")),
        (lambda t: t.clamp_min(0.0), Activation("relu")),
        (functional.relu6, Activation("relu6")),
        (nn.ReLU6(inplace=True), Activation("relu6")),
        (lambda t: t.clamp(0, 6), Activation("relu6")),
        (functional.silu, Activation("silu")),
        (lambda t: t * torch.sigmoid(t), Activation("silu")),
        (lambda t: torch.sigmoid(t).mul_(t), Activation("silu")),
        (functional.gelu, Activation("gelu")),
        (lambda t: functional.gelu(t, approximate="tanh"), Activation("gelu_tanh")),
        (functional.hardswish, Activation("hardswish")),
        (lambda t: t * functional.hardsigmoid(t), Activation("hardswish")),
        (nn.LeakyReLU(0.2, inplace=True), Activation("leaky_relu", 0.2)),
        (nn.RReLU(0.1, 0.3).eval(), Activation("leaky_relu", 0.2)),
        (torch.tanh, None),
        (lambda t: t.clamp(0, 5), None),
        (lambda t: t.clamp(max=6), None),
        (lambda t: t * torch.sigmoid(t + 1), None),
    ],
)
@pytest.mark.parametrize("layer", [conv(), nn.Linear(8, 8), norm()], ids=lambda m: type(m).__name__)
def test_activations(
    function: Callable[[Tensor], Tensor], want: Activation | None, layer: nn.Module
) -> None:
    program = check(lambda m, x: function(m.layer(x)), image(), layer=layer)
    assert isinstance(program.steps[0], Convolution | Linear | Affine)
    if want is None:
        assert program.steps[0].activation is None
        assert len(program.steps) > 1
    else:
        assert len(program.steps) == 1
        got = program.steps[0].activation
        assert (got.name, got.slope) == (want.name, pytest.approx(want.slope))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 5, stride=2, dilation=2, groups=2), (2, 4, 31)),
        (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=4), (3, 4, 9, 8)),
        (nn.Conv3d(2, 3, 3, padding=1, bias=False), (2, 2, 5, 4, 3)),
        (nn.Conv2d(3, 3, 3, padding="same", dilation=2), (2, 3, 9, 9)),
        (nn.Conv2d(3, 3, 3, padding="valid"), (2, 3, 9, 9)),
        (nn.Conv2d(3, 3, 3, dtype=torch.float64), (2, 3, 9, 9)),
        (nn.Sequential(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 9, 9)),
        (nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 9, 9)),
        (nn.Conv2d(3, 3, (4, 2), padding="same", dilation=(1, 3)), (2, 3, 9, 9)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    dtype = next(layer.parameters()).dtype
    (step,) = check(layer, image(*shape, dtype=dtype)).steps
    plain = list(layer.modules())[-1]
    assert isinstance(step, Convolution)
    assert (step.stride, step.dilation, step.groups) == (plain.stride, plain.dilation, plain.groups)
    if plain.padding == "same":
        want = ((1, 1), (2, 2)) if plain.dilation == (1, 3) else ((2, 2), None)
        assert (step.padding, step.padding_behind) == want
    elif isinstance(layer, nn.Sequential):
        even = layer[0].padding == (2, 2, 1, 1)
        want = ((2, 3), None) if even else ((3, 1), (1, 2))
        assert (step.padding, step.padding_behind) == want


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("layer", "want"),
    [
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), ["pad", "Convolution"]),
        (nn.Sequential(nn.ZeroPad2d((0, -1, 0, 1)), conv()), ["pad", "Convolution"]),
        (nn.Sequential(nn.ConstantPad2d(1, 0.5), conv()), ["pad", "Convolution"]),
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 2), norm()), ["conv_transpose2d", "Affine"]),
        (nn.utils.parametrizations.weight_norm(conv()), ["_weight_norm", "conv2d"]),
        (nn.Sequential(nn.Linear(8, 8), norm(kind=nn.BatchNorm2d)), ["Linear", "Affine"]),
        (nn.Sequential(conv(), norm(), norm()), ["Convolution", "Affine"]),
        (nn.Sequential(conv(), nn.ReLU(), norm()), ["Convolution", "Affine"]),
        (norm(kind=nn.InstanceNorm2d, track_running_stats=True), ["Affine"]),
        (nn.Sequential(conv(), nn.PReLU(3)), ["Convolution", "prelu"]),
        (nn.Sequential(conv(), nn.Dropout(0.5), nn.Identity(), norm()), ["Convolution"]),
        (nn.Sequential(conv(), nn.ReplicationPad2d(0), norm()), ["Convolution"]),
    ],
)
def test_what_stays_a_call(layer: nn.Module, want: list[str]) -> None:
    assert kinds(check(layer, image())) == want


def test_batch_statistics_stay_a_call() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    program = capture(model, (image(),))
    assert kinds(program) == ["Convolution", "batch_norm"]
    assert_same(model, program, (image(4, 3, 8, 8),))


def test_convolution_without_a_batch_stays_a_call() -> None:
    program = check(lambda m, x, y: m.c(y).sum() + x, image(2, 1), image(3, 8, 8), c=conv())
    assert kinds(program)[0] == "conv2d"


def test_linear_takes_a_norm_of_its_features_only() -> None:
    layers = {"fc": nn.Linear(8, 3), "bn": norm(kind=nn.BatchNorm1d)}
    (step,) = check(lambda m, x: m.bn(m.fc(x)).relu(), image(2, 8), **layers).steps
    assert step.norm is not None
    assert step.activation is not None
    program = check(lambda m, x: m.bn(m.fc(x)), image(2, 3, 8), **layers)
    assert kinds(program) == ["Linear", "Affine"]


@pytest.mark.parametrize(
    ("function", "fused"),
    [
        (lambda m, x: x + m.a(x), True),
        (lambda m, x: m.a(x) + x, True),
        (lambda m, x: m.a(x).add_(x).relu_(), True),
        (lambda m, x: torch.add(m.a(x), x, alpha=2), False),
        (lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), False),
        (lambda m, x: m.a(x) + 1, False),
        (lambda m, x: m.a(x) + m.scale, False),
        (lambda m, x: [y := m.a(x), y + x], False),
        (lambda m, x: (y := m.a(x)) + y, False),
        (lambda m, x: m.a(x).relu() + x, False),
        (lambda m, x: m.a(x) + x.double(), False),
    ],
)
def test_residuals(function: Callable[..., Any], fused: bool) -> None:
    program = check(function, image(), a=conv(), scale=nn.Parameter(torch.randn(8)))
    (step,) = steps_of(program, Convolution)
    assert (step.residual == program.inputs[0]) is fused
    assert ("add" not in kinds(program)) is fused


@pytest.mark.parametrize("swapped", [False, True])
def test_the_later_of_two_convolutions_adds(swapped: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        b = m.n(m.b(torch.tanh(a)))
        return torch.relu(b + a.sigmoid() if swapped else m.c(a.sigmoid()) + b)

    program = check(forward, image(), a=conv(), b=conv(), c=conv(), n=norm())
    last = program.steps[-1]
    assert isinstance(last, Convolution)
    assert last.residual
    assert last.activation
    assert last.weight == ("b.weight" if swapped else "c.weight")


# --- In place ----------------------------------------------------------------------------------


def test_operations_in_place_need_no_second_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = functional.relu_(m.bn(m.a(x)))
        y += x
        y.mul_(2)
        return functional.dropout(y.relu_(), 0.5, m.training, inplace=True)

    program = check(forward, image(), a=conv(), bn=norm())
    assert kinds(program) == ["Convolution", "add", "mul", "relu"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y := m.a(x), y[:, :1].zero_(), y)[2],
        lambda m, x: (y := m.a(x), v := y.view(y.shape[0], -1), y.relu_(), v)[3],
        lambda m, x: (y := m.a(x), v := y.flatten(1), v.relu_(), y)[3],
        lambda m, x: (y := m.a(x), d := functional.dropout(y, 0.5, False), d.relu_(), y)[3],
        lambda m, x: (y := m.a(x), d := y.detach(), d.relu_().add_(1), y * d)[3],
        lambda m, x: (y := m.a(x), p := y.chunk(3, 1), p[0].neg_(), y)[3],
        lambda m, x: m.a(x).half().add_(x),
        lambda m, x: m.a(x).mean((2, 3)).squeeze(),
        lambda m, x: (y := x.clone(), y.add_(m.a(x)), x * y)[2],
        lambda m, x: (y := m.a(x), z := y.relu_(), y.add_(1), y * z)[3],
    ],
)
def test_memory_that_is_read_under_two_names(forward: Callable[..., Any]) -> None:
    check(forward, image(), a=conv())


# --- Inputs and outputs ------------------------------------------------------------------------


def test_outputs_of_any_structure() -> None:
    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        y = m.a(x)
        return {"y": y, "n": None, "rest": (x, [y.shape[0] * 2, "text", 3]), "p": m.a.bias}

    program = check(forward, image(), a=conv())
    assert program.output.tensors() == ["a.bias"]
    assert program.outputs()[1] == program.inputs[0]


def test_inputs_of_any_structure() -> None:
    def forward(m: Any, x: Tensor, more: dict[str, Any], scale: float, flag: Any) -> Tensor:
        return (m.a(x) + more["bias"]) * scale if flag is None else more["y"]

    x, y = image(), torch.randn(8)
    model = Function(forward, a=conv())
    program = capture(model, (x, {"bias": y}, 2.0, None))
    assert_same(model, program, (image(5, 3, 8, 8), {"bias": y}, 2.0, None))
    assert len(program.inputs) == 2
    for bad, message in [
        ((x, {"bias": y}, 3.0, None), "Expected 2.0, a constant"),
        ((x, {"bias": y}, 2, None), "Expected 2.0, a constant"),
        ((x, {"other": y}, 2.0, None), "structure of the example"),
        ((x, {"bias": y[:7]}, 2.0, None), r"input 1 .* shape \[8\] .* got shape \[7\]"),
        ((x[:, :, 1:], {"bias": y}, 2.0, None), r"input 0 .* shape \[N, 3, 8, 8\]"),
        ((x.double(), {"bias": y}, 2.0, None), "float64"),
        (("x", {"bias": y}, 2.0, None), "got <class 'str'>"),
    ]:
        with pytest.raises(FastpieError, match=message):
            program.flatten(bad)


def test_inputs_share_one_batch_size() -> None:
    program = captured("several_inputs")[1]
    with pytest.raises(FastpieError, match="one batch size"):
        program.flatten((image(2, 3, 6, 6), image(3, 2)))
    with pytest.raises(FastpieError, match="at least one dimension"):
        capture(nn.Identity(), (torch.tensor(1.0),))


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_example_of_any_batch_gives_the_same_program(batch: int) -> None:
    model = ResidualCNN().eval()
    program = capture(model, (image(batch, 3, 8, 8).to(memory_format=torch.channels_last),))
    assert str(program) == str(capture(model, (image(3, 3, 8, 8),)))
    assert_same(model, program, (image(4, 3, 8, 8),))


def test_constants_are_kept_by_value() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x) * torch.tensor([1.0, 2.0] * 4) + m.kept + m.hidden

    model = Function(forward, a=conv(), kept=torch.randn(8))
    model.register_buffer("hidden", torch.randn(1), persistent=False)
    program = check(model, image())
    assert (
        sorted(program.tensors.values()) == ["buffer", "constant", "constant"] + ["parameter"] * 2
    )
    assert any(t is model.kept or torch.equal(t, model.kept) for t in program.constants.values())


def test_views_work_on_any_layout() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x).contiguous().view(x.shape[0], -1)

    model = Function(forward, a=conv())
    program = check(model, image())
    assert kinds(program) == ["Convolution", "reshape"]
    assert_same(model, program, (image(4, 3, 8, 8).to(memory_format=torch.channels_last),))


# --- Features ----------------------------------------------------------------------------------


def test_feature_is_what_the_module_returned() -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, 2))
    model.eval()
    program = capture(model, (image(),), feature_module="1")
    x = image(3, 3, 8, 8)
    output, feature = run(model, program, (x,))
    torch.testing.assert_close(feature, model[:2](x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)
    assert (feature < 0).any()  # not what the ReLU made of it
    assert kinds(program) == ["Convolution", "relu", "flatten", "Linear"]  # the feature is a reader
    assert not any(m._forward_hooks for m in model.modules())


def test_feature_may_be_a_structure_or_the_whole_model() -> None:
    network = by_name("dict_output")
    model, x = network.build(), network.inputs(3)
    output, feature = run(model, capture(model, x, feature_module=""), x)
    assert pytree.tree_structure(output) == pytree.tree_structure(feature)
    assert torch.equal(output["aux"]["embedding"], feature["aux"]["embedding"])


def test_bad_feature_modules_are_refused() -> None:
    network = by_name("reused")
    with pytest.raises(FastpieError, match="'conv' to be called once, but the model called it 3"):
        capture(network.build(), network.inputs(), feature_module="conv")
    with pytest.raises(FastpieError, match="no module 'nowhere'"):
        capture(network.build(), network.inputs(), feature_module="nowhere")
    unused = Function(lambda m, x: x * 2, a=conv())
    with pytest.raises(FastpieError, match="called it 0 times"):
        capture(unused, (image(),), feature_module="a")


# --- Refusals ----------------------------------------------------------------------------------


@torch.library.custom_op("fastpie_test::no_fake", mutates_args=())
def no_fake(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: x if x.sum() > 0 else -x, r"depends on the data .* at .*test_capture.py:\d+"),
        (
            lambda m, x: x + torch.rand_like(x),
            r"random numbers .* aten.rand_like.default, at .*:\d+",
        ),
        (lambda m, x: functional.dropout(x, 0.5, True), "aten.dropout.default"),
        (lambda m, x: torch.bernoulli(x.sigmoid()), "bernoulli"),
        (lambda m, x: x + m.count.add_(1), r"writes to buffer 'count', at .*:\d+"),
        (lambda m, x: functional.batch_norm(x, m.mean, m.var, training=True), "buffer 'mean'"),
        (lambda m, x: x.relu_() * 2, "writes to its own input"),
        (lambda m, x: x + torch.ones(2, 1, 1, 1), "fixes the batch size to 2"),
        (lambda m, x: x.reshape(len(x), -1), r"fixes the batch size to 2 \(len\(x\) does"),
        (lambda m, x: x * 2 if x.shape[0] > 4 else x, "some batch sizes only"),
        (lambda m, x: x * 2 if x.shape[0] % 2 else x, "some batch sizes only|fixes the batch"),
        (lambda m, x: x * 2 if x.shape[0] == 1 else x, "batch of one like any other"),
        (lambda m, x: setattr(m, "mean", x.mean((0, 2, 3))) or x, "writes to buffer 'mean'"),
        (lambda m, x: torch.ops.fastpie_test.no_fake(x), "fastpie_test::no_fake"),
        (lambda m, x: torch.from_numpy(x.numpy()), r"numpy.* at .*test_capture.py:\d+"),
        (lambda m, x: torch.as_strided(x, (2, 2), (1, 2)), "aten.as_strided.default"),
        (lambda m, x: torch.cond(x.sum() > 0, torch.relu, torch.tanh, (x,)), "'cond'"),
        (lambda m, x: "nothing", "returns a tensor"),
        (lambda m, x: x.no_such_method(), "AttributeError"),
    ],
)
def test_refusals(
    forward: Callable[..., Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Function(forward)
    for name in ("count", "mean", "var"):
        model.register_buffer(name, torch.ones(3) if name != "count" else torch.ones(()))
    with pytest.raises(CaptureError, match=message) as caught:
        capture(model, (image(),))
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_script_modules_are_refused() -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(conv())
    with pytest.raises(CaptureError, match="ScriptModule"):
        capture(nn.Sequential(scripted), (image(),))


def test_control_flow_network_is_refused_with_its_line() -> None:
    network = by_name("control_flow")
    with pytest.raises(CaptureError, match=r"tests/networks.py:\d+ in forward") as caught:
        capture(network.build(), network.inputs())
    assert caught.value.__cause__ is not None


# --- The model is left as it was ---------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.last = m.a(x)
        m.state = m.last * 2
        return m.last if not fails or m.last.sum() > 0 else x

    model = Function(forward, a=conv(), bn=norm(), calls=0)
    model.register_buffer("state", torch.zeros(1))
    model.train()
    model.bn.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.backends.mha.set_fastpath_enabled(True)
    draws = torch.get_rng_state()
    if fails:
        with pytest.raises(CaptureError):
            capture(model, (image(),))
    else:
        with pytest.raises(CaptureError, match="buffer 'state'"):
            capture(model, (torch.ones(2, 3, 8, 8),))
        assert torch.equal(draws, torch.get_rng_state())
    assert model.training
    assert model.a.training
    assert not model.bn.training
    assert model.calls == 0
    assert not hasattr(model, "last")
    assert torch.backends.mha.get_fastpath_enabled()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("context", ["autocast", "inference_mode", "enable_grad"])
def test_contexts_of_the_caller_do_not_show(context: str) -> None:
    network = by_name("residual")
    model = network.build()
    entered = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference_mode": torch.inference_mode(),
        "enable_grad": torch.enable_grad(),
    }[context]
    with entered:
        program = capture(model, network.inputs())
    assert str(program) == str(captured("residual")[1])


def test_model_in_training_mode_is_captured_as_in_eval_mode() -> None:
    model = by_name("dropout").build().train()
    program = capture(model, by_name("dropout").inputs())
    assert model.drop.training
    assert kinds(program) == ["Linear", "Linear"]


# --- Program -----------------------------------------------------------------------------------


def test_liveness_and_views() -> None:
    def forward(m: Any, x: Tensor) -> list[Tensor]:
        y = m.a(x)
        t = y.transpose(2, 3)
        return [t.tanh() + y, y.amax((2, 3))]

    program = check(forward, image(), a=conv())
    (conv2d,) = steps_of(program, Convolution)
    transpose = next(s for s in program.steps if s.name == "transpose")
    assert isinstance(transpose, Call)
    assert transpose.aliased() == [conv2d.result]
    assert program.last_use()[conv2d.result] == kinds(program).index("amax")
    assert program.users()[program.inputs[0]] == [0]
    assert {program.last_use()[v] for v in program.outputs()} == {len(program.steps)}
    assert conv2d.values() == [program.inputs[0]]
    assert conv2d.tensors() == ["a.weight", "a.bias"]
    assert all(isinstance(v, Value) for v in program.meta)
    assert str(program).splitlines()[1].startswith(f"{conv2d.result} = Convolution [a/conv2d]")


class _Scaled(nn.Module):
    """Makes a constant in its forward and casts it to what the input is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.tensor([1, 2, 3]).to(x.device, x.dtype).view(1, 3, 1, 1)


def test_a_cast_of_a_constant_is_done_once() -> None:
    model, x = _Scaled().eval(), torch.randn(2, 3, 4, 5)
    program = capture(model, (x,))
    called = [str(step.target) for step in program.steps if isinstance(step, Call)]
    assert called == ["aten.mul.Tensor"]
    assert {t.dtype for t in program.constants.values()} == {torch.float32}
    tensors = {**dict(model.named_parameters()), **program.constants}
    got, _ = interpret(program, [x], tensors.__getitem__)
    torch.testing.assert_close(got, model(x))
