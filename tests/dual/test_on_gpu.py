"""The engine on a GPU, with its real kernels."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fastpie
from dual_cases import relative_error
from fastpie import DualModel, DualOutput, FastpieError
from fastpie.dual.gpu import available
from fastpie.dual.gpu.device import fp32_convolutions
from fastpie.dual.gpu.kernels import Torch
from networks import MONAI, SMALL, Network

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
captured = [n for n in SMALL if n.name != "control_flow"]
networks = pytest.mark.parametrize("network", captured, ids=lambda n: n.name)
RESIDUAL = next(n for n in SMALL if n.name == "residual")

# Largest deviation from the model in fp32, of the largest output.
WITHIN = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}


@pytest.fixture(autouse=True)
def without_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for seconds each kind of layer: its own test is enough."""
    families_of = available.families_of
    if "triton" not in request.node.name:
        monkeypatch.setattr(available, "families_of", lambda _: families_of("cuda"))


def on_gpu(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, tree)


def compiled(
    network: Network, sparsity: Any, batch: int = 5, **kwargs: Any
) -> tuple[DualModel, fastpie.DualEngine]:
    model, x = network.build().eval().cuda(), on_gpu(network.inputs(batch))
    dual = DualModel(model, fastpie.prune(model, sparsity, scope="layer")).eval()
    return dual, dual.compile(x if len(x) > 1 else x[0], **kwargs)


def exact(dual: DualModel, x: Any) -> DualOutput:
    with fp32_convolutions(allow_tf32=False), torch.no_grad():
        return dual(*x)


@networks
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_batch_gives_what_the_dual_model_gives(network: Network, precision: str) -> None:
    dual, engine = compiled(network, [0.5, 0.9], precision=precision)
    assert engine.backend == "cuda"
    for batch in (5, 1, 3, 0):
        x = on_gpu(network.inputs(batch))
        assert relative_error(engine(*x), exact(dual, x)) < WITHIN[precision]


@pytest.mark.parametrize("network", MONAI, ids=lambda n: n.name)
def test_networks_of_monai(network: Network) -> None:
    pytest.importorskip("monai")
    dual, engine = compiled(network, 0.7, batch=3, precision="bf16")
    x = on_gpu(network.inputs(3))
    assert relative_error(engine(*x), exact(dual, x)) < WITHIN["bf16"]


def test_cuda_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("bf16", "fp16"):
        for network in captured:
            check_alone("cuda", network, precision, monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_triton_kernels_alone(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_alone("triton", RESIDUAL, precision, monkeypatch)


def check_alone(
    family: str, network: Network, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer that the family serves runs on it, whatever is faster."""
    reason = available.unusable_reason(family, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    (ours,) = (f for f in available.families_of(family) if getattr(f, "name", None) == family)
    monkeypatch.setattr(available, "families_of", lambda _: [ours, Torch()])

    def seconds(self: Any, key: Any, work: Any) -> float:
        work()()
        return 1.0 if key[-1] == "torch" else 1e-3

    monkeypatch.setattr("fastpie.dual.tuning.Tuner.seconds", seconds)
    dual, engine = compiled(network, 0.6, precision=precision)
    x = on_gpu(network.inputs(5))
    assert relative_error(engine(*x), exact(dual, x)) < WITHIN[precision], network.name
    if network is RESIDUAL:
        kernels = [k for groups in engine.plan["steps"].values() for _, k in groups if k]
        assert all(k.startswith(family) for k in kernels), kernels


def test_all_ones_masks_give_the_same_bits() -> None:
    for network in captured:
        _, engine = compiled(network, 0.0, precision="bf16")
        out = engine(*on_gpu(network.inputs(5)))
        for a, b in zip(pytree.tree_leaves(out.dense), pytree.tree_leaves(out.pruned), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_call_never_waits_for_the_gpu() -> None:
    _, engine = compiled(RESIDUAL, [0.5, 0.9])
    x = on_gpu(RESIDUAL.inputs(5))
    engine(*x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        engine(*x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_images_in_pinned_memory_are_taken_as_they_are() -> None:
    dual, engine = compiled(RESIDUAL, 0.5)
    (x,) = RESIDUAL.inputs(5)
    assert relative_error(engine(x.pin_memory()), exact(dual, (x.cuda(),))) < WITHIN["fp32"]


def test_threads_and_streams_do_not_meet() -> None:
    dual, engine = compiled(RESIDUAL, 0.5)
    inputs = [torch.randn(5, 3, 8, 8, device="cuda") for _ in range(8)]
    want = [exact(dual, (x,)) for x in inputs]
    torch.cuda.synchronize()
    errors: list[float] = []

    def work(k: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                out = engine(inputs[k])
                errors.append(relative_error(out, want[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 160
    assert max(errors) < WITHIN["fp32"]


def test_a_nan_stays_with_its_image() -> None:
    _, engine = compiled(RESIDUAL, 0.5, precision="bf16")
    (x,) = on_gpu(RESIDUAL.inputs(5))
    x[2, 0, 1, 1] = torch.nan
    out = engine(x)
    assert out.dense[2].isnan().all()
    assert out.pruned[2].isnan().all()
    assert out.dense[[0, 1, 3, 4]].isfinite().all()
    assert engine(torch.zeros_like(x)).dense.isfinite().all()


def test_a_plan_gives_the_same_bits() -> None:
    dual, engine = compiled(RESIDUAL, 0.5, precision="bf16")
    x = on_gpu(RESIDUAL.inputs(5))
    again = dual.compile(x[0], precision="bf16", plan=json.loads(json.dumps(engine.plan)))
    assert again.plan == engine.plan
    assert torch.equal(engine(*x).pruned, again(*x).pruned)


def test_refresh() -> None:
    dual, engine = compiled(RESIDUAL, 0.5)
    with torch.no_grad():
        for parameter in dual.model.parameters():
            parameter.mul_(1.3)
    dual.masks = fastpie.prune(dual.model, 0.5, method="random", seed=1)
    engine.refresh()
    x = on_gpu(RESIDUAL.inputs(5))
    assert relative_error(engine(*x), exact(dual, x)) < WITHIN["fp32"]


def test_tf32_only_where_the_user_allows_it() -> None:
    network = next(n for n in MONAI if n.name == "resnet18_2d")
    pytest.importorskip("monai")
    before = torch.get_float32_matmul_precision()
    try:
        for setting, within in (("highest", 1e-4), ("high", 2e-2)):
            torch.set_float32_matmul_precision(setting)
            dual, engine = compiled(network, 0.5, batch=3)
            x = on_gpu(network.inputs(3))
            torch.set_float32_matmul_precision("highest")
            assert relative_error(engine(*x), exact(dual, x)) < within
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_engine_of_the_cpu_takes_no_gpu() -> None:
    model, (x,) = RESIDUAL.build().eval().cuda(), on_gpu(RESIDUAL.inputs(2))
    dual = DualModel(model, fastpie.prune(model, 0.5)).eval()
    with pytest.raises(FastpieError, match="on the CPU"):
        dual.compile(x, backend="cpu")
