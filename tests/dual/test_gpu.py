"""The engine of a GPU on a device that is none: planning, launches, graphs and results.

The kernels themselves are tested in tests/triton_kernels and tests/ops, and all of it together on a
GPU in test_on_gpu.py.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastpie
from dual_cases import relative_error
from fake_gpu import FakeDevice, families, launch_twin
from fastpie import DualModel, FastpieError
from fastpie.dual import tuning
from fastpie.dual.committee import Committee
from fastpie.dual.gpu import available
from fastpie.dual.gpu.sparse24 import SparseTensorCores
from fastpie.ops.sparse24 import Sparse24
from networks import MONAI, SMALL, Network

pytestmark = pytest.mark.usefixtures("captured_once")
captured = [n for n in SMALL if n.name != "control_flow"]
networks = pytest.mark.parametrize("network", captured, ids=lambda n: n.name)
monai = pytest.mark.parametrize(
    "network", [n for n in MONAI if n.name != "vit"], ids=lambda n: n.name
)
RESIDUAL = next(n for n in SMALL if n.name == "residual")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Backend "cuda" finds the device that is none, with twins for kernels."""
    device = FakeDevice()
    monkeypatch.setattr(available, "device_of", lambda _: device)
    monkeypatch.setattr(available, "families_of", lambda _: families())
    monkeypatch.setattr(available, "unusable_reason", lambda *_: None)
    return device


FORMS = ["together", "apart", "cut", "mixed"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, gpu: FakeDevice) -> str:
    """What is fastest: both models in one launch, one by one on two streams, or micro-batches."""
    force(monkeypatch, request.param)
    if request.param in ("cut", "mixed"):
        gpu.l2_bytes = 3000
    return request.param


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch, gpu: FakeDevice) -> None:
    """Some layers in each form."""
    force(monkeypatch, "mixed")
    gpu.l2_bytes = 3000


def force(patch: pytest.MonkeyPatch, form: str) -> None:
    """Put times in place of the tuner's; whatever would be timed is run once."""
    generator = random.Random(3)
    known: dict[str, float] = {}

    def seconds(self: tuning.Tuner, key: Any, work: Callable[[], Callable[[], Any]]) -> float:
        name = repr(key)
        if name not in known:
            work()()
            known[name] = generator.random()
        if key[0] == "pass":
            cut, streams = key[3], key[4]
            wanted = {"together": len(cut) == 1, "apart": streams == 2, "cut": cut[0][1] > 0}
            return 1e-6 if wanted.get(form, False) else known[name]
        pair = len(key[6][0]) == 2
        if form in ("together", "apart"):
            return known[name] * (1e-3 if pair == (form == "together") else 1)
        return known[name]

    patch.setattr(tuning.Tuner, "seconds", seconds)


def compiled(
    network: Network, sparsity: Any, batch: int = 5, **kwargs: Any
) -> tuple[DualModel, fastpie.DualEngine]:
    model, x = network.build().eval(), network.inputs(batch)
    dual = DualModel(model, fastpie.prune(model, sparsity, scope="layer")).eval()
    return dual, dual.compile(x if len(x) > 1 else x[0], backend="cuda", **kwargs)


@networks
def test_every_batch_gives_what_the_dual_model_gives(network: Network, form: str) -> None:
    dual, engine = compiled(network, [0.5, 0.9])
    assert engine.backend == "cuda"
    for batch in (5, 1, 3, 0):
        x = network.inputs(batch)
        assert relative_error(engine(*x), dual(*x)) < 1e-5


@monai
def test_networks_of_monai(
    network: Network, gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "families_of", lambda _: families(["triton"], tiles=1))
    force(monkeypatch, "cut")
    gpu.l2_bytes = 200_000
    dual, engine = compiled(network, 0.7, batch=3)
    for batch in (3, 1):
        x = network.inputs(batch)
        assert relative_error(engine(*x), dual(*x)) < 1e-4


@networks
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_are_near_the_model_in_fp32(
    network: Network, precision: str, mixed: None
) -> None:
    dual, engine = compiled(network, 0.7, precision=precision)
    x = network.inputs(4)
    assert relative_error(engine(*x), dual(*x)) < (0.1 if precision == "bf16" else 0.02)


@networks
def test_all_ones_masks_run_one_model_only(network: Network, form: str, gpu: FakeDevice) -> None:
    _, engine = compiled(network, 0.0)
    out = engine(*network.inputs(5))
    assert all(launch.models == (0,) for launch in gpu.launches)
    for a, b in zip(pytree.tree_leaves(out.dense), pytree.tree_leaves(out.pruned), strict=True):
        assert torch.equal(a, b)


def test_one_graph_launches_every_layer_of_both_models_once(
    gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, "together")
    _, engine = compiled(RESIDUAL, 0.5)
    graphs, replays = gpu.graphs, gpu.replays
    engine(*RESIDUAL.inputs(5))
    engine(*RESIDUAL.inputs(2))
    assert (gpu.graphs, gpu.replays) == (graphs, replays + 2)
    layers = [launch for launch in gpu.launches if launch.kernel]
    assert [launch.models for launch in layers] == [(0, 1)] * 4
    # The stem sees one image, the other layers two activations.
    assert [len(launch.reads) for launch in layers] == [1, 2, 4, 2]
    assert {launch.stream for launch in gpu.launches} == {0}


def test_the_prefix_that_is_not_pruned_runs_once(
    gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, "together")
    model, (x,) = RESIDUAL.build().eval(), RESIDUAL.inputs(4)
    masks = fastpie.prune(model, 0.5, exclude=["stem", "conv1"])
    engine = DualModel(model, masks).eval().compile(x, backend="cuda")
    engine(x)
    layers = [launch.models for launch in gpu.launches if launch.kernel]
    assert layers == [(0,), (0,), (0, 1), (0, 1)]


def test_levels_of_a_ladder_share_launches_two_by_two(
    gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, "together")
    _, engine = compiled(RESIDUAL, [0.3, 0.5, 0.7, 0.9])
    engine(*RESIDUAL.inputs(5))
    layers = [launch.models for launch in gpu.launches if launch.kernel]
    assert layers == [(0, 1), (2, 3), (4,)] * 4


def test_models_apart_run_on_two_streams(gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "apart")
    _, engine = compiled(RESIDUAL, 0.5)
    engine(*RESIDUAL.inputs(5))
    assert {(launch.models, launch.stream) for launch in gpu.launches} == {((0,), 0), ((1,), 1)}


def test_early_layers_run_on_as_many_images_as_fit_the_cache(
    gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, "cut")
    # Half of it holds three 8x8 activations of six channels, of both models, of four images.
    gpu.l2_bytes = 2 * 4 * (3 * 6 * 64) * 4 * 2
    dual, engine = compiled(RESIDUAL, 0.5, batch=11)
    images = [images for _, images in engine.plan["segments"]]
    assert images == [8, 4, 0]  # the stem reads three channels, the mean leaves one pixel
    x = RESIDUAL.inputs(11)
    assert relative_error(engine(*x), dual(*x)) < 1e-5
    dense = [launch for launch in gpu.launches if 0 in launch.models]
    assert sum(launch.step.startswith("stem") for launch in dense) == -(-11 // images[0])


def test_a_plan_is_json_and_gives_the_same_launches(form: str, gpu: FakeDevice) -> None:
    dual, engine = compiled(RESIDUAL, [0.5, 0.8])
    x = RESIDUAL.inputs(5)
    want, launches = engine(*x), gpu.launches
    again = dual.compile(x[0], plan=json.loads(json.dumps(engine.plan)))
    assert again.plan == engine.plan
    got = again(*x)
    assert [(a.step, a.kernel, a.models) for a in launches] == [
        (b.step, b.kernel, b.models) for b in gpu.launches
    ]
    assert torch.equal(got.pruned, want.pruned)


def test_times_are_remembered(gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    seconds = gpu.seconds
    monkeypatch.setattr(gpu, "seconds", lambda call: measured.append(1) or seconds(call))
    dual, engine = compiled(RESIDUAL, 0.5)
    assert measured
    measured.clear()
    assert dual.compile(RESIDUAL.inputs(5)[0], backend="cuda").plan == engine.plan
    assert not measured
    monkeypatch.setattr(gpu, "scope", "another GPU")
    dual.compile(RESIDUAL.inputs(5)[0], backend="cuda")
    assert measured


def test_a_plan_of_kernels_that_are_not_here_is_refused(gpu: FakeDevice) -> None:
    dual, engine = compiled(RESIDUAL, 0.5)
    plan = json.loads(json.dumps(engine.plan).replace("triton tile", "vulkan tile"))
    plan = json.loads(json.dumps(plan).replace("cuda tile", "vulkan tile"))
    plan["steps"]["stem/conv2d"][0][1] = "vulkan tile 3"
    with pytest.raises(FastpieError, match="vulkan tile 3"):
        dual.compile(RESIDUAL.inputs(5)[0], plan=plan)
    with pytest.raises(FastpieError, match="plan"):
        dual.compile(RESIDUAL.inputs(5)[0], plan={"backend": "cuda", "steps": {"x": []}})


@pytest.mark.parametrize("fault", ["wrong", "unwritten", "raises"])
def test_a_kernel_that_is_wrong_is_left_out(
    fault: str, gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*args: Any, activation: Any, tile: int) -> None:
        if tile == 1 and fault == "raises":
            raise RuntimeError("out of shared memory")
        launch_twin(*args, activation=activation, tile=tile)
        if tile == 1:
            args[6][-1][..., -1, -1] = torch.nan if fault == "unwritten" else 7.0

    found = families(["triton"])
    object.__setattr__(found[1], "launch", launch)
    monkeypatch.setattr(available, "families_of", lambda _: found)
    force(monkeypatch, "together")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dual, engine = compiled(RESIDUAL, 0.5)
    said = [str(w.message) for w in caught if "wrong results" in str(w.message)]
    assert bool(said) == (fault != "raises")
    kernels = {kernel for groups in engine.plan["steps"].values() for _, kernel in groups}
    assert "triton tile 1" not in kernels
    refused = [r for row in engine.report() for r in row["refused"]]
    assert {r["kernel"] for r in refused} == {"triton tile 1"}
    assert all(
        ("shared memory" if fault == "raises" else "differs by") in r["reason"] for r in refused
    )
    assert "triton tile 0" in kernels
    x = RESIDUAL.inputs(5)
    assert relative_error(engine(*x), dual(*x)) < 1e-5


@networks
def test_refresh_takes_new_weights_and_masks(network: Network, mixed: None) -> None:
    dual, engine = compiled(network, [0.5, 0.9])
    with torch.no_grad():
        for parameter in dual.model.parameters():
            parameter.mul_(1.3)
    masks = fastpie.prune(dual.model, [0.5, 0.9], method="random", seed=1)
    engine.refresh(masks)
    dual.masks = masks
    x = network.inputs(5)
    assert relative_error(engine(*x), dual(*x)) < 1e-5


@networks
@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_an_engine_is_a_snapshot(network: Network, backend: str, gpu: FakeDevice) -> None:
    model, x = network.build().eval(), network.inputs(3)
    dual = DualModel(model, fastpie.prune(model, 0.5)).eval()
    engine = dual.compile(x if len(x) > 1 else x[0], backend=backend)
    before = engine(*x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1)
    after = engine(*x)
    for a, b in zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


def test_refresh_with_another_prefix_plans_again(gpu: FakeDevice) -> None:
    model, (x,) = RESIDUAL.build().eval(), RESIDUAL.inputs(4)
    drawn = model.stem.weight.detach().clone()
    with torch.no_grad():
        model.stem.weight.fill_(10)  # nothing of it is removed
    dual = DualModel(model, fastpie.prune(model, 0.5)).eval()
    engine = dual.compile(x, backend="cuda")
    assert [models for models, _ in engine.plan["steps"]["stem/conv2d"]] == [[0]]
    with torch.no_grad():
        model.stem.weight.copy_(drawn)
    dual.masks = fastpie.prune(model, 0.5)
    engine.refresh()
    assert sum(len(models) for models, _ in engine.plan["steps"]["stem/conv2d"]) == 2
    assert relative_error(engine(x), dual(x)) < 1e-5


def test_a_nan_stays_with_its_image(form: str) -> None:
    dual, engine = compiled(RESIDUAL, 0.5)
    (x,) = RESIDUAL.inputs(5)
    x[2, 0, 1, 1] = torch.nan
    out = engine(x)
    for got, want in zip((out.dense, out.pruned), (dual(x).dense, dual(x).pruned), strict=True):
        assert got[2].isnan().all()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(got[others], want[others].detach(), rtol=1e-4, atol=1e-5)
    again = engine(torch.zeros(1, *x.shape[1:]))  # what lies behind a smaller batch does not show
    assert again.dense.isfinite().all()


def test_outputs_are_fresh(gpu: FakeDevice) -> None:
    _, engine = compiled(RESIDUAL, 0.5)
    entered, left = gpu.entered, gpu.left
    first = engine(*RESIDUAL.inputs(5))
    kept = first.dense.clone(), first.pruned.clone()
    engine(RESIDUAL.inputs(5)[0] + 1)
    assert torch.equal(first.dense, kept[0])
    assert torch.equal(first.pruned, kept[1])
    assert (gpu.entered, gpu.left) == (entered + 2, left + 2)


class _NoWaiting(TorchDispatchMode):
    """Fails where a number is read off the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), func
        return func(*args, **(kwargs or {}))


@networks
def test_a_call_never_waits_for_the_device(network: Network, mixed: None) -> None:
    _, engine = compiled(network, [0.5, 0.9])
    x = network.inputs(5)
    with _NoWaiting():
        engine(*x)


def test_report_shares_out_the_time_of_the_graph(form: str) -> None:
    _, engine = compiled(RESIDUAL, 0.5)
    rows = engine.report()
    assert sum(r["seconds"] for r in rows) == pytest.approx(1e-3)
    layers = [r for r in rows if "bytes" in r]
    # A multiply-add for each weight, result and model: 8x8 results.
    stem = sum(r["multiply_adds"] for r in layers if r["layer"].startswith("stem"))
    assert stem == 2 * 5 * 64 * 6 * 27
    assert json.loads(json.dumps(rows)) == rows


def test_features(gpu: FakeDevice) -> None:
    model, (x,) = RESIDUAL.build().eval(), RESIDUAL.inputs(4)
    dual = DualModel(model, fastpie.prune(model, 0.5), features="bn2").eval()
    out, want = dual.compile(x, backend="cuda")(x), dual(x)
    assert out.features is not None
    assert relative_error(tuple(out.features), tuple(want.features)) < 1e-5


def test_copies_with_weights_of_their_own(form: str) -> None:
    """Kernels that hold one tensor of weights for all models must not run here."""
    model, (x,) = RESIDUAL.build().eval(), RESIDUAL.inputs(4)
    committee = Committee(model, copies=3)
    engine = committee.compile(x, backend="cuda")
    assert relative_error(tuple(engine(x)[:2]), tuple(committee(x)[:2])) < 1e-5
    refused = [row for row in engine.report() if row.get("refused")]
    assert refused == []


def test_what_cannot_be_captured_says_so(gpu: FakeDevice) -> None:
    network = next(n for n in SMALL if n.name == "control_flow")
    with pytest.warns(UserWarning, match="runs as DualModel"):
        dual, engine = compiled(network, 0.5)
    assert engine.backend == "reference"
    x = network.inputs(5)
    assert relative_error(engine(*x), dual(*x)) == 0


def test_a_model_of_another_dtype_says_so(gpu: FakeDevice) -> None:
    model = RESIDUAL.build().double().eval()
    dual = DualModel(model, fastpie.prune(model, 0.5)).eval()
    with pytest.warns(UserWarning, match="float64"):
        engine = dual.compile(RESIDUAL.inputs(3)[0].double(), backend="cuda")
    assert engine.backend == "reference"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_without_a_gpu_the_reason_is_said(backend: str) -> None:
    model, (x,) = RESIDUAL.build().eval(), RESIDUAL.inputs(2)
    dual = DualModel(model, fastpie.prune(model, 0.5)).eval()
    with pytest.raises(FastpieError, match="not on a GPU"):
        dual.compile(x, backend=backend)
    with pytest.raises(FastpieError, match="fp16"):
        dual.compile(x, precision="fp16")


class _Wide(nn.Module):
    """Padding by one more behind, as a layer with padding="same" of an even filter has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, padding="same")
        self.act = nn.PReLU()
        self.mix = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.act(self.conv(x))).mean((2, 3))


def test_uneven_padding_and_a_learnt_slope(form: str) -> None:
    network = Network("wide", _Wide, ((3, 9, 7),))
    dual, engine = compiled(network, 0.5)
    x = network.inputs(5)
    assert relative_error(engine(*x), dual(*x)) < 1e-5


class _Blocks(nn.Module):
    """Channels by 32, as sparse tensor cores want them, and a layer that has too few."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(32, 70, 3, padding=1)
        self.back = nn.Conv2d(70, 32, 1)
        self.mix = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        y = functional.silu(self.wide(x))
        x = functional.relu(self.mix(x) + self.back(y))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sparse_tensor_cores_take_what_is_sparse_enough(
    precision: str, gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(
        x: Tensor, packed: Sparse24, scale: Any, bias: Any, residual: Any, output: Tensor,
        stride: Any, padding: Any, dilation: Any, *, activation: Any,
    ) -> None:  # fmt: skip
        weight = packed.unpack()
        launch_twin(
            [x], weight, [None], [scale], [bias], [residual], [output],
            stride, padding, dilation, 1, activation=activation, tile=0,
        )  # fmt: skip

    monkeypatch.setattr(
        available, "families_of", lambda _: [*families(["triton"], 1), SparseTensorCores(launch)]
    )

    def seconds(self: Any, key: Any, work: Any) -> float:
        work()()
        if str(key[-1]).startswith("sparse24"):
            return 1e-3
        return 5.0 if key[0] == "layer" and len(key[6][0]) == 2 else 1.0

    monkeypatch.setattr(tuning.Tuner, "seconds", seconds)
    network = Network("blocks", _Blocks, ((3, 12, 10),))
    for sparsity, layers in ((0.9, {"wide", "mix"}), (0.3, set())):
        dual, engine = compiled(network, sparsity, precision=precision)
        x = network.inputs(5)
        assert relative_error(engine(*x), dual(*x)) < (0.1 if precision == "bf16" else 0.02)
        found = {
            (name.split("/")[0], *models)
            for name, groups in engine.plan["steps"].items()
            for models, kernel in groups
            if kernel.startswith("sparse24")
        }
        assert found == {(name, 1) for name in layers}
