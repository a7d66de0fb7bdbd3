"""`nt_xent` against the formula term by term, pytorch-metric-learning, and itself in two processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor

from fastpie import FastpieError
from fastpie.training.objectives.contrastive import nt_xent


def literal(a: Tensor, b: Tensor, t: float) -> list[float]:
    """Term by term, in Python's numbers."""
    n = len(a)
    z = [(row / row.norm()).tolist() for row in torch.cat([a, b])]

    def similarity(i: int, j: int) -> float:
        return math.exp(sum(x * y for x, y in zip(z[i], z[j], strict=True)) / t)

    def loss(i: int, j: int) -> float:
        return -math.log(similarity(i, j) / sum(similarity(i, k) for k in range(2 * n) if k != i))

    return [(loss(i, i + n) + loss(i + n, i)) / 2 for i in range(n)]


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("t", [0.07, 0.2, 1.0])
def test_is_the_formula(n: int, t: float) -> None:
    a, b = torch.randn(2, n, 5, dtype=torch.float64)
    got = nt_xent(a, b, t)
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, torch.tensor(literal(a, b, t), dtype=torch.float64))


def test_is_pytorch_metric_learning_s_mean_with_its_gradient() -> None:
    a, b = (torch.randn(9, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.arange(9).repeat(2)
    theirs = NTXentLoss(temperature=0.2)(torch.cat([a, b]), labels)
    ours = nt_xent(a, b, 0.2).mean()
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(
        torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck() -> None:
    a, b = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (a, b))


def test_low_temperatures_do_not_overflow() -> None:
    a, b = torch.randn(2, 6, 8)
    got = nt_xent(a, b, 1e-3)  # exp(1000) is infinite in fp32 and fp64
    assert got.isfinite().all()
    exact = nt_xent(a.double(), b.double(), 1e-3)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_fp32_under_autocast_and_for_half_embeddings(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 6, 8).to(dtype)
    want = nt_xent(a.float(), b.float(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = nt_xent(a, b, 0.1)
        of_floats = nt_xent(a.float(), b.float(), 0.1)
    assert got.dtype is torch.float32
    assert torch.equal(got, want)
    assert torch.equal(of_floats, want)


def test_no_sample_and_strided_embeddings() -> None:
    assert nt_xent(torch.empty(0, 4), torch.empty(0, 4)).shape == (0,)
    wide = torch.randn(10, 6)
    a, b = wide.t()[:, ::2], wide.t()[:, 1::2]
    assert not a.is_contiguous()
    assert torch.equal(nt_xent(a, b), nt_xent(a.contiguous(), b.contiguous()))


def test_length_and_common_order_do_not_matter() -> None:
    a, b = torch.randn(2, 5, 4, dtype=torch.float64)
    want = nt_xent(a, b)
    torch.testing.assert_close(nt_xent(3 * a, 0.1 * b), want)
    order = torch.randperm(5)
    torch.testing.assert_close(nt_xent(a[order], b[order]), want[order])
    torch.testing.assert_close(nt_xent(b, a), want)


def test_bad_input() -> None:
    a = torch.randn(3, 4)
    for b in (torch.randn(2, 4), torch.randn(3, 5), torch.randn(12)):
        with pytest.raises(FastpieError, match="one shape"):
            nt_xent(a, b)
    for t in (0.0, -1.0, math.nan):
        with pytest.raises(FastpieError, match="temperature"):
            nt_xent(a, a, t)


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from fastpie.training.objectives.contrastive import nt_xent

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
a, b = torch.load(sys.argv[3], weights_only=True)
mine = slice(4 * rank, 4 * rank + 4)
a, b = a[mine].clone().requires_grad_(), b[mine].clone().requires_grad_()
losses = nt_xent(a, b, 0.2)
losses.mean().backward()
alone = nt_xent(a.detach(), b.detach(), 0.2, gather=False)
torch.save([losses.detach(), a.grad, b.grad, alone], f"{sys.argv[3]}.{rank}")
dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    a, b = (torch.randn(8, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.save([a.detach(), b.detach()], tmp_path / "views")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    files = [str(tmp_path / "store"), str(tmp_path / "views")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), *files], env=environment) for rank in range(2)
    ]
    assert [process.wait(100) for process in running] == [0, 0]
    parts = [torch.load(tmp_path / f"views.{rank}", weights_only=True) for rank in range(2)]
    want = nt_xent(a, b, 0.2)
    want.mean().backward()
    losses, of_a, of_b = (torch.cat([part[i] for part in parts]) for i in range(3))
    torch.testing.assert_close(losses, want.detach())
    # DistributedDataParallel takes the mean of the processes' gradients.
    torch.testing.assert_close(of_a / 2, a.grad)
    torch.testing.assert_close(of_b / 2, b.grad)
    torch.testing.assert_close(parts[1][3], nt_xent(a[4:], b[4:], 0.2, gather=False).detach())
