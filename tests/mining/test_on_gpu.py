"""DualModel, its engine and `mine` on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastpie

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    sample_ids = tuple(f"s{i:03d}" for i in range(70))

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)), index % 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_masks_do_not_depend_on_the_device() -> None:
    model = network()
    on_cpu = fastpie.prune(model, [0.3, 0.8])
    assert fastpie.prune(model.cuda(), [0.3, 0.8]) == on_cpu


def test_dual_model_equals_the_one_on_the_cpu() -> None:
    model, x = network(), torch.randn(4, 3, 16, 16)
    masks = fastpie.prune(model, [0.3, 0.8])
    expected = fastpie.DualModel(model, masks)(x)
    got = fastpie.DualModel(model, masks).cuda()(x.cuda())
    torch.testing.assert_close(got.dense.cpu(), expected.dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.pruned.cpu(), expected.pruned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_masks_of_ones_give_no_disagreement_bit_for_bit(training: bool) -> None:
    model = network().train(training).cuda()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.0))
    out = dual(torch.randn(6, 3, 16, 16, device="cuda"))  # the same dropout in both
    assert torch.equal(out.dense, out.pruned)


def test_mining_agrees_with_the_cpu_and_resumes(tmp_path: Path) -> None:
    model = network()
    cpu = fastpie.mine(model, Images(), tmp_path / "cpu", batch_size=32, progress=False)
    gpu = fastpie.mine(
        model, Images(), tmp_path / "gpu", batch_size=32, device="cuda", progress=False
    )
    for name in ("hardness", "js", "margin_pruned", "drift"):
        a, b = (torch.tensor(r.table.column(name).to_pylist()) for r in (cpu, gpu))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    again = fastpie.mine(
        model, Images(), tmp_path / "gpu", batch_size=32, device="cuda", progress=False
    )
    assert again.table.equals(gpu.table)
    assert next(model.parameters()).device.type == "cpu"


def test_bf16_engine(tmp_path: Path) -> None:
    model = network().cuda()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    x = torch.randn(6, 3, 16, 16, device="cuda")
    out = dual.compile(x, precision="bf16")(x)
    torch.testing.assert_close(out.pruned.float(), dual(x).pruned, rtol=0.1, atol=0.1)
