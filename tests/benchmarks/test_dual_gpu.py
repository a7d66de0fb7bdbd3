"""The GPU benchmark on the CPU, with a device that is none; nothing here asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_dual_gpu, gpu_roofline
from fake_gpu import FakeDevice, families
from fastpie.dual.gpu import available


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "device_of", lambda _: FakeDevice())
    monkeypatch.setattr(available, "families_of", lambda _: families(["triton"], tiles=1))
    monkeypatch.setattr(available, "unusable_reason", lambda *_: None)


ARGUMENTS = [
    "--networks", "tiny", "--batches", "2", "--precision", "fp32", "bf16", "--repeats", "1",
    "--providers", "fastpie", "own-dense", "eager", "--device", "cpu",
    "--backend", "cuda",
]  # fmt: skip


def test_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_dual_gpu.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("dual-forward-*.json")
    rows = json.loads(path.read_text())["rows"]
    for precision in ("fp32", "bf16"):
        own = [r for r in rows if r["precision"] == precision]
        against = {r["baseline"] for r in own if "ratio" in r}
        assert against == {"two eager channels_last passes", "two passes of fastpie's dense model"}
        (described,) = (r for r in own if r["provider"] == "fastpie" and "report" in r)
        assert described["deviation"] < bench_dual_gpu.TOLERANCE[precision]
        rated = [r for r in described["report"] if "gigabytes_per_second" in r]
        assert {r["layer"] for r in rated} >= {"stem.0/conv2d", "body.0/conv2d"}
    assert capsys.readouterr().out.splitlines()[-1].endswith("passes")


def test_a_provider_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(self: bench_dual_gpu.Contest) -> None:
        self.forwards["eager"] = lambda x: (torch.ones(2, 10), torch.ones(2, 10))

    monkeypatch.setattr(bench_dual_gpu.Contest, "_eager", wrong)
    with pytest.raises(RuntimeError, match="eager's outputs differ"):
        bench_dual_gpu.main(ARGUMENTS)


def test_a_layer_bound_by_bytes_reaches_their_roofline() -> None:
    # A copy of 4.3 GB at 4.3 TB/s.
    row = {"seconds": 1e-3, "bytes": 4_300_000_000, "multiply_adds": 1_000_000}
    (rated,) = bench_dual_gpu.with_rates([row], "bf16")
    assert rated["roofline"] == 1.0
    assert rated["gigabytes_per_second"] == 4300.0
    (rated,) = bench_dual_gpu.with_rates([{**row, "multiply_adds": 395_000_000_000}], "bf16")
    assert rated["roofline"] == 1.0
    assert rated["teraflops"] == 790.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_dual_gpu.main([]) == 1
    assert "No GPU here" in capsys.readouterr().out


def test_floors_count_each_activation_once() -> None:
    by_name = {str(f.layer): f for f in gpu_roofline.floors("resnet50", 2)}
    floor = by_name["1x1-64to256-at-56x56"]
    pixels = 2 * 56 * 56
    assert floor.bytes == 2 * (2 * pixels * (64 + 256) + 64 * 256)
    assert floor.flops == 2 * 2 * pixels * 64 * 256
    assert floor.seconds == floor.seconds_of_bytes
    assert by_name["3x3-512to512-at-7x7"].flops == 2 * 2 * 2 * 49 * 512 * 512 * 9
    dense = sum(f.flops * f.layer.count for f in by_name.values()) / 2 / 2 / 2
    assert dense == pytest.approx(4.09e9, rel=0.01)  # multiply-adds of ResNet-50
