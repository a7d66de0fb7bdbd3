"""The lowered engine, with its kernels chosen by the test instead of by timing."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fastpie
from dual_cases import relative_error
from fastpie import _C, DualModel, FastpieError
from fastpie.dual import tuning
from fastpie.dual.cpu import segment
from networks import MONAI, SMALL, Network

pytestmark = pytest.mark.usefixtures("captured_once")
captured = [n for n in SMALL if n.name != "control_flow"]
networks = pytest.mark.parametrize("network", captured, ids=lambda n: n.name)
monai = pytest.mark.parametrize("network", MONAI, ids=lambda n: n.name)


def on_positions(engine: fastpie.DualEngine) -> int:
    passes = engine.plan["passes"]
    return sum(positions for p in passes for _, positions, _, _ in p["steps"].values())


def compiled(
    network: Network, sparsity: Any, batch: int = 5, **kwargs: Any
) -> tuple[DualModel, fastpie.DualEngine]:
    model, x = network.build().eval(), network.inputs(batch)
    dual = DualModel(model, fastpie.prune(model, sparsity, scope="layer")).eval()
    return dual, dual.compile(x if len(x) > 1 else x[0], backend="cpu", **kwargs)


@networks
def test_every_batch_gives_what_the_dual_model_gives(network: Network, form: str) -> None:
    dual, engine = compiled(network, [0.5, 0.9])
    assert engine.backend == "cpu"
    for batch in (5, 1, 3):
        x = network.inputs(batch)
        assert relative_error(engine(*x), dual(*x)) < 1e-5


@networks
def test_bf16_is_near_the_model_in_fp32(network: Network, form: str) -> None:
    dual, engine = compiled(network, 0.7, precision="bf16")
    x = network.inputs(4)
    assert relative_error(engine(*x), dual(*x)) < 0.1


@monai
def test_networks_of_monai(network: Network, form: str) -> None:
    dual, engine = compiled(network, [0.5, 0.9], batch=3)
    for batch in (3, 1):
        x = network.inputs(batch)
        assert relative_error(engine(*x), dual(*x)) < 1e-4


@networks
def test_all_ones_masks_give_the_same_bits(network: Network, form: str) -> None:
    for precision in ("fp32", "bf16"):
        _, engine = compiled(network, 0.0, precision=precision)
        out = engine(*network.inputs(5))
        for a, b in zip(pytree.tree_leaves(out.dense), pytree.tree_leaves(out.pruned), strict=True):
            assert not isinstance(a, Tensor) or torch.equal(a, b)


class Stages(nn.Module):
    """Strides, max pooling, a dense block, odd sizes, a downsample branch, grouped layers."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        self.dims = dims
        self.stem = conv(3, 16, 7, 2, 3, bias=False)
        self.norm0 = norm(16)
        self.pool = getattr(nn, f"MaxPool{dims}d")(3, 2, 1)
        self.norm1 = norm(16)
        self.grow1 = conv(16, 8, 3, padding=1)
        self.norm2 = norm(24)
        self.grow2 = conv(24, 8, 3, padding=1)
        self.shrink = conv(32, 16, 1)
        self.halve = getattr(nn, f"AvgPool{dims}d")(2)
        self.down = conv(16, 24, 3, 2, 1, groups=4)
        self.depthwise = conv(24, 24, 3, padding=2, dilation=2, groups=24)
        self.branch = conv(16, 24, 1, 2)
        self.valid = conv(24, 20, 2)
        self.head = nn.Linear(20, 7)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.norm0(self.stem(x))))
        y = torch.cat([x, self.grow1(functional.relu(self.norm1(x)))], 1)
        y = torch.cat([y, self.grow2(functional.relu(self.norm2(y)))], 1)
        x = self.halve(functional.silu(self.shrink(y)))
        y = functional.relu(self.depthwise(functional.hardswish(self.down(x))) + self.branch(x))
        y = functional.gelu(self.valid(y))
        return self.head(y.flatten(2).mean(2))


@pytest.mark.parametrize(
    ("dims", "size"), [(2, (64, 64)), (2, (61, 90)), (1, (131,)), (3, (33, 40, 35))]
)
@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_stages_at_odd_sizes_on_every_instruction_set(
    dims: int,
    size: tuple[int, ...],
    capability: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    torch.manual_seed(1)
    model = Stages(dims).eval()
    dual = DualModel(model, fastpie.prune(model, 0.9, scope="layer")).eval()
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
        engine = dual.compile(torch.randn(17, 3, *size), backend="cpu", precision=precision)
        if form == "positions":
            assert on_positions(engine) > 8
        for batch in (17, 1, 3, 16):
            x = torch.randn(batch, 3, *size)
            assert relative_error(engine(x), dual(x)) < tolerance


class WideToNarrow(nn.Module):
    """Maps of 7 x 7 pixels, where images are interleaved, between wide ones; linear residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 3, padding=1)
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.narrow = nn.Conv2d(16, 16, 3, padding=1)
        self.again = nn.Conv2d(16, 16, 1)
        self.up = nn.Upsample(scale_factor=4)
        self.last = nn.Conv2d(16, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool2(self.pool1(functional.relu(self.wide(x))))
        x = self.again(functional.relu(self.narrow(x)))
        x = functional.relu(self.last(self.up(torch.sigmoid(x)))).mean((2, 3))
        return functional.relu(self.fc2(functional.relu(self.fc1(x))) + x)


class Stem(nn.Module):
    """Convolutions whose results are pooled: kept whole, used twice, in a concatenation."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{dims}d")
        self.pool = getattr(nn, f"MaxPool{dims}d")(3, 2, 1)
        self.first, self.second = conv(3, 37, 5, 2, 2), conv(37, 21, 3, padding=1)
        self.third, self.last = conv(21, 8, 1), conv(29, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(functional.relu(self.first(x)))
        x = self.pool(functional.silu(self.second(x)))
        y = self.third(x)
        z = functional.relu(self.last(torch.cat([x, y], 1)))
        return z, self.pool(z)


@pytest.mark.parametrize(
    ("dims", "size"), [(1, (777,)), (2, (90, 77)), (2, (224, 224)), (3, (20, 22, 18))]
)
@pytest.mark.parametrize("at_once", [1, 50_000, 10_000_000])
def test_pooled_convolutions(
    dims: int, size: tuple[int, ...], at_once: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "_POOLED_BYTES", at_once)
    model = Stem(dims).eval()
    dual = DualModel(model, fastpie.prune(model, 0.7, scope="layer")).eval()
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
        engine = dual.compile(torch.randn(5, 3, *size), backend="cpu", precision=precision)
        if form == "positions" and at_once == 1:
            kernels = [row["kernel"] for row in engine.report() if row["model"] != "dense"]
            assert sum("with max_pool" in kernel for kernel in kernels) == 2
        for batch in (5, 1, 4):
            x = torch.randn(batch, 3, *size)
            assert relative_error(engine(x), dual(x)) < tolerance


class Gates(nn.Module):
    """Squeeze-and-excitation in the ways it is written, on wide and on narrow maps."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{dims}d")
        self.dims = dims
        self.average = getattr(nn, f"AdaptiveAvgPool{dims}d")(1)
        self.stem, self.middle = conv(3, 16, 3, padding=1), conv(16, 16, 3, 2, 1)
        self.squeeze, self.excite = conv(16, 4, 1), conv(4, 16, 1)
        self.fc1, self.fc2 = nn.Linear(16, 4), nn.Linear(4, 16)
        self.last, self.head = conv(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spatial = list(range(2, self.dims + 2))
        x = functional.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(functional.silu(self.squeeze(self.average(x)))))
        x = functional.relu(self.middle(x * gate))
        gate = self.fc2(functional.relu(self.fc1(x.mean(spatial)))).sigmoid()
        x = gate.view(-1, 16, *[1] * self.dims) * x
        means = x.mean(spatial, keepdim=True)
        return self.head(self.last(x).mean(spatial)), means


@pytest.mark.parametrize(
    ("dims", "size"), [(1, (67,)), (2, (56, 55)), (2, (13, 14)), (3, (9, 8, 12))]
)
def test_squeeze_and_excitation(dims: int, size: tuple[int, ...], form: str) -> None:
    model = Gates(dims).eval()
    dual = DualModel(model, fastpie.prune(model, 0.7, scope="layer")).eval()
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
        engine = dual.compile(torch.randn(17, 3, *size), backend="cpu", precision=precision)
        if form == "positions":
            kernels = [row["kernel"] for row in engine.report() if row["model"] != "dense"]
            assert kernels.count("positions") >= 5  # averages and factors
        for batch in (17, 1, 4):
            x = torch.randn(batch, 3, *size)
            assert relative_error(engine(x), dual(x)) < tolerance
        x[1, 0, 0] = torch.nan
        got = engine(x)
        assert got.pruned[0][1].isnan().all()
        rest = [0, 2, 3]
        assert relative_error(got.pruned[0][rest], dual(x[rest]).pruned[0]) < tolerance


def test_micro_batches_hold_whole_groups_of_interleaved_images(form: str) -> None:
    model = WideToNarrow().eval()
    dual = DualModel(model, fastpie.prune(model, 0.6, scope="layer")).eval()
    for batch in (17, 40):
        x = torch.randn(batch, 3, 28, 28)
        engine = dual.compile(x, backend="cpu")
        assert relative_error(engine(x), dual(x)) < 1e-5
        assert relative_error(engine(x[:9]), dual(x[:9])) < 1e-5


def test_a_plan_of_other_threads_is_still_right(form: str, restore_threads: None) -> None:
    model = WideToNarrow().eval()
    dual = DualModel(model, fastpie.prune(model, 0.6, scope="layer")).eval()
    x = torch.randn(33, 3, 28, 28)
    plan = dual.compile(x, backend="cpu").plan
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert relative_error(dual.compile(x, plan=plan)(x), dual(x)) < 1e-5


def single_weight(model: nn.Module) -> dict[str, Tensor]:
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
            masks[name].view(-1)[parameter.numel() // 2] = True
    return masks


@pytest.mark.parametrize("kept", ["one", "none"])
def test_layers_with_one_kept_weight_or_none(kept: str, form: str) -> None:
    torch.manual_seed(2)
    model = Stages().eval()
    masks = single_weight(model)
    if kept == "none":
        masks = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    dual = DualModel(model, masks).eval()
    x = torch.randn(4, 3, 40, 40)
    assert relative_error(dual.compile(x, backend="cpu")(x), dual(x)) < 1e-5


def test_bits_do_not_depend_on_threads_or_neighbours_in_the_batch(form: str) -> None:
    if form != "positions":
        pytest.skip("oneDNN makes no such promise")
    torch.manual_seed(3)
    model = Stages().eval()
    dual = DualModel(model, fastpie.prune(model, 0.8, scope="layer")).eval()
    x = torch.randn(8, 3, 64, 64)
    engine = dual.compile(x, backend="cpu")
    want = engine(x).pruned
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(engine(x).pruned, want)
    finally:
        torch.set_num_threads(threads)
    y = torch.randn_like(x)
    y[2] = x[2]
    y[3] = torch.nan
    assert torch.equal(engine(y).pruned[2], want[2])
    assert engine(y).pruned[3].isnan().all()
    assert torch.equal(engine(x).pruned, want)  # nothing of the NaN is left behind


def test_threads_share_an_engine(form: str) -> None:
    torch.manual_seed(4)
    model = Stages().eval()
    dual = DualModel(model, fastpie.prune(model, [0.5, 0.9], scope="layer")).eval()
    batches = [torch.randn(n, 3, 48, 48) for n in (6, 1, 4, 6, 3, 2)]
    engine = dual.compile(batches[0], backend="cpu")
    want = [engine(x) for x in batches]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(5):
            if relative_error(engine(batches[k]), want[k]) > 1e-6:
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_refresh_takes_weights_and_masks(form: str) -> None:
    torch.manual_seed(6)
    model = Stages().eval()
    dual = DualModel(model, fastpie.prune(model, 0.9, scope="layer")).eval()
    x = torch.randn(4, 3, 64, 64)
    engine = dual.compile(x, backend="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.refresh()
    assert relative_error(engine(x), dual(x)) < 1e-5
    engine.refresh(fastpie.prune(model, 0.9, scope="global"))
    dual.masks = fastpie.prune(model, 0.9, scope="global")
    assert relative_error(engine(x), dual(x)) < 1e-5


def test_a_plan_is_json_and_gives_the_same_choices(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    model = Stages().eval()
    dual = DualModel(model, fastpie.prune(model, 0.9, scope="layer")).eval()
    x = torch.randn(6, 3, 64, 64)
    engine = dual.compile(x, backend="cpu")
    plan = json.loads(json.dumps(engine.plan))
    monkeypatch.setattr(tuning.Tuner, "seconds", None)  # nothing may be timed
    again = dual.compile(x, plan=plan)
    assert again.plan == engine.plan
    assert torch.equal(again(x).pruned, engine(x).pruned)
    assert torch.equal(again(x).dense, engine(x).dense)
    plan["passes"][0]["steps"]["no such layer"] = ["onednn", False, 8, True]
    with pytest.raises(FastpieError, match="plan"):
        dual.compile(x, plan=plan)


def test_report_names_layer_kernel_and_what_it_was_chosen_over(form: str) -> None:
    torch.manual_seed(8)
    model = Stages().eval()
    dual = DualModel(model, fastpie.prune(model, 0.9, scope="layer")).eval()
    engine = dual.compile(torch.randn(4, 3, 64, 64), backend="cpu")
    rows = engine.report()
    assert {row["model"] for row in rows} == {"dense", "pruned at 0.9"}
    for row in rows:
        assert set(row) >= {"layer", "kernel", "seconds", "over"}
        assert row["seconds"] >= 0
    stems = [row for row in rows if row["layer"].startswith("stem") and row["over"]]
    assert len(stems) == 1
    assert stems[0]["over"][0].keys() == {"kernel", "seconds"}


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(2, 3, 32, 64), torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.zeros(2, 3)],
    ids=["size", "dtype", "rank"],
)
def test_inputs_of_another_kind_are_refused(inputs: Tensor) -> None:
    torch.manual_seed(9)
    model = Stages().eval()
    dual = DualModel(model, fastpie.prune(model, 0.9, scope="layer")).eval()
    engine = dual.compile(torch.randn(4, 3, 64, 64), backend="cpu")
    with pytest.raises(FastpieError, match=r"shape \[N, 3, 64, 64\]"):
        engine(inputs)


def test_other_dtypes_run_as_dual_model_with_a_warning() -> None:
    model = Stages().eval().double()
    dual = DualModel(model, fastpie.prune(model, 0.9, scope="layer")).eval()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with pytest.warns(UserWarning, match="float64"):
        engine = dual.compile(x)
    assert engine.backend == "reference"
    assert torch.equal(engine(x).pruned, dual(x).pruned)
