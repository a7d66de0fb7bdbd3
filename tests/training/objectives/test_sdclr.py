"""`SDCLR` against the published step, transcribed, and what it promises beside."""

from __future__ import annotations

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.published_sdclr import published_network, published_step
from torch import Tensor, nn
from torch.nn import functional

import fastpie
from fastpie import FastpieError
from fastpie.training.objectives.objective import TrainBatch
from fastpie.training.objectives.sdclr import SDCLR, projection_head
from networks import ResidualCNN

DTYPE = torch.float64


def batch_of(*views: Any) -> TrainBatch:
    return TrainBatch(views, None, [str(i) for i in range(len(views[0]))])


def two_views(n: int = 6, channels: int = 3, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, n, channels, 8, 8, dtype=dtype).unbind())  # type: ignore[return-value]


# ---------------------------------------------------------------------------- the published step


def published_names(name: str) -> tuple[str, str]:
    """Of a parameter or buffer of our embedder, in the published network: dense and pruned."""
    name = name.removeprefix("backbone.").replace("projection.", "fc.")
    layer, _, own = name.rpartition(".")
    return f"{layer}.bn_list.0.{own}", f"{layer}.bn_list.1.{own}"


def test_gradients_and_statistics_are_those_of_the_published_step() -> None:
    backbone = ResidualCNN().to(DTYPE).train()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    sdclr = SDCLR(backbone, sparsity=0.6, projection=(6, 6, 5))
    sdclr.begin_epoch(0)
    network = published_network(backbone, sdclr.projection, sdclr.masks)
    views = two_views()

    want = published_step(network, *views, 0.2)
    losses = sdclr(batch_of(*views))
    losses.mean().backward()
    torch.testing.assert_close(losses.mean().detach(), want, rtol=0, atol=1e-12)

    theirs = dict(network.named_parameters())
    checked = set()

    def check(name: str, gradient: Tensor | None) -> None:
        torch.testing.assert_close(gradient, theirs[name].grad, rtol=0, atol=1e-10)
        assert gradient is not None
        assert gradient.abs().max() > 0 or name.endswith(".bias")  # a bias in front of BatchNorm
        checked.add(name)

    for name, parameter in sdclr.dual.model.named_parameters():
        if name.startswith("backbone.fc."):
            assert parameter.grad is None
            continue
        dense, _ = published_names(name)
        plain = name.removeprefix("backbone.").replace("projection.", "fc.")
        check(dense if dense in theirs else plain, parameter.grad)
    for name, parameter in sdclr.dual._affine.items():
        check(published_names(name.replace("/", "."))[1], parameter.grad)
    assert checked == set(theirs)

    buffers = dict(network.named_buffers())
    norms = {n: m for n, m in sdclr.dual.model.named_modules() if hasattr(m, "running_mean")}
    for name, own in sdclr.dual.statistics(0).items():
        dense, pruned = (buffers[n] for n in published_names(name))
        torch.testing.assert_close(sdclr.dual.model.get_buffer(name), dense, rtol=0, atol=1e-12)
        # Theirs has seen the batch twice: by (1-m)^2 nearer to it.
        if name.endswith("num_batches_tracked"):
            assert (own.item(), pruned.item()) == (1, 2)
            continue
        initial = 1.0 if name.endswith("var") else 0.0
        m = norms[name.rpartition(".")[0]].momentum
        of_batch = (own - (1 - m) * initial) / m
        twice = (1 - m) ** 2 * initial + (1 - (1 - m) ** 2) * of_batch
        torch.testing.assert_close(twice, pruned, rtol=0, atol=1e-12)


def test_with_shared_norm_weights_their_gradients_are_summed() -> None:
    backbone = ResidualCNN().to(DTYPE).train()
    other = copy.deepcopy(backbone)
    head = projection_head(6, (6, 5)).to(DTYPE)
    own = SDCLR(backbone, sparsity=0.5, projection=copy.deepcopy(head))
    shared = SDCLR(other, sparsity=0.5, projection=copy.deepcopy(head), own_affine=False)
    views = two_views()
    for sdclr in (own, shared):
        sdclr(batch_of(*views)).mean().backward()
    of_dense = dict(own.dual.model.named_parameters())
    of_pruned = {name.replace("/", "."): p for name, p in own.dual._affine.items()}
    assert len(of_pruned) == 10
    for name, parameter in shared.dual.model.named_parameters():
        if name.startswith("backbone.fc."):
            continue
        want = of_dense[name].grad
        if name in of_pruned:
            want = want + of_pruned[name].grad
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=1e-10)


def test_masked_weights_get_the_dense_branch_s_gradient_alone() -> None:
    backbone = ResidualCNN().to(DTYPE).train()
    sdclr = SDCLR(backbone, sparsity=0.7)
    out = sdclr.dual.pair(*two_views())
    weight = backbone.conv1.weight
    (of_dense,) = torch.autograd.grad(out.dense.square().sum(), weight, retain_graph=True)
    (of_pruned,) = torch.autograd.grad(out.pruned[:, 0].sum(), weight)
    keep = sdclr.masks["conv1.weight"]
    assert (of_pruned[~keep] == 0).all()
    assert (of_dense[~keep] != 0).any()


# ---------------------------------------------------------------------------- sparse kernels


class WideCNN(nn.Module):
    """Large and sparse enough for the sparse kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 96, 3, padding=1)
        self.fc = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.fc(functional.relu(self.conv2(x)).mean((2, 3)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sparse_kernels_give_the_same_gradients(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpie.ops import masked_conv_sparse

    calls = {"forward": 0, "input_gradient": 0, "weight_gradient": 0}

    def counted(name: str) -> Any:
        function = getattr(masked_conv_sparse, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    for name in calls:
        monkeypatch.setattr(masked_conv_sparse, name, counted(name))
    backbone = WideCNN().train().to(memory_format=memory_format)
    first = SDCLR(backbone, sparsity=0.95)
    second = copy.deepcopy(first)
    second.dual.sparse_kernels = False
    views = [torch.randn(16, 3, 16, 16).contiguous(memory_format=memory_format) for _ in range(2)]
    gradients = []
    for sdclr in (first, second):
        for step in range(2):  # the second with what was packed in the first
            sdclr.zero_grad()
            losses = sdclr(batch_of(*views))
            losses.mean().backward()
            assert losses.dtype is torch.float32, step
        gradients.append({n: p.grad for n, p in sdclr.named_parameters() if p.grad is not None})
        assert all(count == 2 for count in calls.values()), calls
    got, want = gradients
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        error, size = (gradient - want[name]).abs().max(), want[name].abs().max()
        assert error < 1e-3 * size.clamp(min=0.1), name


def test_masks_changed_between_steps_are_seen_by_the_sparse_kernels() -> None:
    sdclr = SDCLR(WideCNN().train(), sparsity=0.95)
    views = two_views(16, dtype=torch.float32)
    first = sdclr(batch_of(*views))
    other = fastpie.prune(
        sdclr.dual.model, 0.95, method="random", seed=1, exclude=["projection", "backbone.fc"]
    )
    sdclr.dual.masks = other
    second = sdclr(batch_of(*views))
    assert not torch.equal(first, second)
    (
        first.mean() + second.mean()
    ).backward()  # the first graph keeps the masks that it was made with
    sdclr.dual.sparse_kernels = False
    torch.testing.assert_close(sdclr(batch_of(*views)), second, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- the rest


def test_masks_are_chosen_anew_each_epoch_and_kept_within() -> None:
    backbone = ResidualCNN().train()
    sdclr = SDCLR(backbone, sparsity=0.5)
    assert set(sdclr.masks) == {"stem.weight", "conv1.weight", "conv2.weight"}
    sdclr.begin_epoch(0)
    before = sdclr.masks
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn_like(parameter))
    sdclr.begin_epoch(0)  # as when an epoch is taken up in its middle
    assert sdclr.masks == before
    sdclr.begin_epoch(1)
    wanted = fastpie.prune(backbone, 0.5, modules=(nn.Conv2d,))
    assert sdclr.masks == wanted
    assert wanted != before


def test_random_masks_are_the_same_in_every_process_and_others_in_every_epoch() -> None:
    backbone = ResidualCNN()
    one, two = (SDCLR(copy.deepcopy(backbone), sparsity=0.5, method="random") for _ in range(2))
    seen = []
    for epoch in range(2):
        one.begin_epoch(epoch)
        two.begin_epoch(epoch)
        assert one.masks == two.masks
        seen.append(one.masks)
    assert seen[0] != seen[1]


def test_state_dict_holds_all_and_each_tensor_once(tmp_path: Path) -> None:
    sdclr = SDCLR(ResidualCNN().train(), sparsity=0.5)
    sdclr.begin_epoch(3)
    optimizer = torch.optim.SGD(sdclr.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sdclr(batch_of(*two_views(dtype=torch.float32))).mean().backward()
        optimizer.step()
    state = sdclr.state_dict()
    assert len({t.data_ptr() for t in state.values() if t.numel()}) == len(state)
    torch.save(state, tmp_path / "state.pt")
    other = SDCLR(ResidualCNN().train(), sparsity=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.begin_epoch(3)
    assert other.masks == sdclr.masks
    views = two_views(dtype=torch.float32)
    assert torch.equal(other(batch_of(*views)), sdclr(batch_of(*views)))


def test_the_backbone_learns_to_tell_samples_apart_and_is_mined_by_drift(tmp_path: Path) -> None:
    backbone = ResidualCNN().train()
    sdclr = SDCLR(backbone, sparsity=0.5, temperature=0.5)
    assert sdclr.model is backbone
    optimizer = torch.optim.Adam(sdclr.parameters(), 1e-2)
    images = torch.randn(16, 3, 8, 8)
    losses = []
    for epoch in range(3):
        sdclr.begin_epoch(epoch)
        for _ in range(10):
            views = [images + 0.1 * torch.randn_like(images) for _ in range(2)]
            loss = sdclr(batch_of(*views)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    dual = fastpie.DualModel(sdclr.model, sdclr.masks, features=sdclr.features)
    data = [(image, 0, f"s{i:02d}") for i, image in enumerate(images)]
    table = fastpie.mine(dual.eval(), data, tmp_path / "run", task="embedding", batch_size=8).table
    assert table.num_rows == 16
    drift = torch.tensor(table["drift"].to_pylist())
    assert drift.isfinite().all()
    assert drift.max() > 0


def test_features_that_the_backbone_returns_and_of_a_module() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    pooled = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    views = two_views(dtype=torch.float32)
    returned = SDCLR(pooled, sparsity=0.5, features=None, width=8)
    assert not returned.has_unused_parameters
    returned(batch_of(*views)).sum().backward()
    assert all(p.grad is not None for p in returned.parameters())
    named = SDCLR(copy.deepcopy(body), sparsity=0.5, features="2:pooled", width=16)
    assert named.projection[0].in_features == 16
    named(batch_of(*views)).sum().backward()
    own = nn.Identity()
    assert SDCLR(copy.deepcopy(pooled), features=None, projection=own).projection is own


def test_the_published_head_is_the_default() -> None:
    head = SDCLR(WideCNN()).projection
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    sizes = [(layer.in_features, layer.out_features) for layer in linear]
    assert sizes == [(96, 96), (96, 96), (96, 128)]
    assert [layer.bias is not None for layer in linear] == [True, False, False]
    assert isinstance(head[-1], nn.BatchNorm1d)


def test_autocast_gives_fp32_losses() -> None:
    sdclr = SDCLR(WideCNN().train(), sparsity=0.95)
    views = two_views(8, dtype=torch.float32)
    want = sdclr(batch_of(*views))
    with torch.autocast("cpu", torch.bfloat16):
        losses = sdclr(batch_of(*views))
    losses.mean().backward()
    assert losses.dtype is torch.float32
    torch.testing.assert_close(losses, want, rtol=0.2, atol=0.2)


def test_the_branches_draw_their_dropout_one_after_the_other() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 2))
    sdclr = SDCLR(backbone.train(), sparsity=0.0, projection=nn.Identity())
    view, _ = two_views(dtype=torch.float32)
    out = sdclr.dual.pair(view, view)
    assert not torch.equal(out.dense == 0, out.pruned == 0)
    both = (out.dense != 0) & (out.pruned != 0)
    assert torch.equal(out.dense[both], out.pruned[both])  # all weights are kept


def test_conversion_to_synchronised_batch_norm_keeps_everything() -> None:
    sdclr = SDCLR(ResidualCNN().train(), sparsity=0.5)
    views = two_views(dtype=torch.float32)
    sdclr(batch_of(*views))
    want, state = sdclr.eval()(batch_of(*views)), sdclr.state_dict()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(sdclr)
    assert isinstance(converted.model.bn0, nn.SyncBatchNorm)
    assert converted.state_dict().keys() == state.keys()
    assert torch.equal(converted(batch_of(*views)), want)  # SyncBatchNorm trains on GPUs alone


# Dynamo asks for the gradient of what it passes from one graph to the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_compile_gives_the_same_gradients_and_compiles_once() -> None:
    from torch._dynamo.utils import counters

    sdclr = SDCLR(ResidualCNN().train(), sparsity=0.5)
    other = copy.deepcopy(sdclr)
    counters.clear()
    compiled = torch.compile(other, backend="aot_eager")
    graphs = []
    for step in range(3):
        views = two_views(dtype=torch.float32)
        for objective, run in ((sdclr, sdclr), (other, compiled)):
            objective.begin_epoch(step)
            objective.zero_grad()
            run(batch_of(*views)).mean().backward()
            torch.optim.SGD(objective.parameters(), 0.01).step()
        for a, b in zip(sdclr.parameters(), other.parameters(), strict=True):
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 1


def test_bad_input() -> None:
    backbone = ResidualCNN()
    with pytest.raises(FastpieError, match="temperature"):
        SDCLR(backbone, temperature=0)
    with pytest.raises(FastpieError, match="sparsity"):
        SDCLR(backbone, sparsity=1.0)
    with pytest.raises(FastpieError, match="linear layer"):
        SDCLR(nn.Conv2d(3, 4, 3))
    with pytest.raises(FastpieError, match="width"):
        SDCLR(backbone, features="bn2:pooled")
    with pytest.raises(FastpieError, match="widths"):
        SDCLR(backbone, projection=(6, 0))
    with pytest.raises(FastpieError, match=":pooled"):
        SDCLR(backbone, features="bn2", width=6)(batch_of(*two_views(dtype=torch.float32)))
    sdclr = SDCLR(backbone)
    for views in ([torch.randn(2, 3, 8, 8)] * 3, torch.randn(2, 3, 8, 8)):
        with pytest.raises(FastpieError, match="two views"):
            sdclr(TrainBatch(views, None, ["a", "b"]))


# ---------------------------------------------------------------------------- two processes

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastpie.training.objectives.objective import TrainBatch
from fastpie.training.objectives.sdclr import SDCLR

def objective():
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3)
    ).double()
    head = nn.Sequential(nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    return SDCLR(backbone, sparsity=0.5, projection=head)

def train(sdclr, step, views):
    optimizer = torch.optim.SGD(sdclr.parameters(), 0.1, momentum=0.9)
    for epoch in range(2):
        sdclr.begin_epoch(epoch)
        for pair in views:
            optimizer.zero_grad()
            step(TrainBatch(tuple(pair), None, [""] * len(pair[0]))).mean().backward()
            optimizer.step()
    return sdclr.state_dict()

folder, rank = sys.argv[1], int(sys.argv[2])
views = torch.load(folder + "/views.pt", weights_only=True)  # [steps, 2, n, ...]
if rank < 0:
    sdclr = objective()
    torch.save(train(sdclr, sdclr, views), folder + "/alone.pt")
else:
    method = "file://" + folder + "/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    sdclr = objective()
    ddp = DistributedDataParallel(sdclr, find_unused_parameters=sdclr.has_unused_parameters)
    state = train(sdclr, ddp, views.chunk(2, 2)[rank])
    torch.save(state, folder + f"/rank{rank}.pt")
    dist.destroy_process_group()
"""


def test_two_processes_train_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torch.save(torch.randn(3, 2, 8, 3, 8, 8, dtype=DTYPE), tmp_path / "views.pt")
    running = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "-1"])
    runpy.run_path(str(tmp_path / "script.py"))
    assert [process.wait(100) for process in running] == [0, 0]
    alone, *ranks = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("alone", "rank0", "rank1")
    )
    for name, tensor in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-9, atol=1e-9, msg=name)
