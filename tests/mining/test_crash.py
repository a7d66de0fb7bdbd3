"""A run killed with SIGKILL and resumed, against an undisturbed run; tests/faults has many more."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fastpie

COUNT = 240

SCRIPT = """
import os, sys, time
import torch
from torch import nn
from torch.utils.data import Dataset
import fastpie, fastpie.mining.session

folder, pause, workers = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
fastpie.mining.session._PART_SECONDS = 0.0  # a batch a part
torch.set_num_threads(1)
torch.manual_seed(0)


class Generated(Dataset):
    sample_ids = [f"case-{(i * 7919) % COUNT:03d}" for i in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        number = int(self.sample_ids[index][5:])
        if os.path.exists(folder + "/run.json"):  # a quick start
            # With workers to be killed: each is caught in a slow read.
            time.sleep(8 if workers and pause and number >= 24 else pause)
        if number % 31 == 4:
            raise OSError(f"cannot read {number}")
        label = 99 if number % 53 == 7 else number % 3
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(number)), label


model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
).eval()
dual = fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6]))
print("ready", flush=True)
fastpie.mine(
    dual,
    Generated(),
    folder,
    batch_size=4,
    num_workers=workers,
    keep_logits=True,
    recalibrate=not workers,
)
""".replace("COUNT", str(COUNT))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@contextmanager
def started(
    script: Path, folder: Path, *, pause: float = 0.0, workers: int = 0
) -> Iterator[subprocess.Popen]:
    """The script at the start of `mine`; killed at the end of the block if it still runs."""
    with script.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(pause), str(workers)],
            stdout=subprocess.PIPE,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", errors_of(script)
        try:
            yield process
        finally:
            process.kill()


def errors_of(script: Path) -> str:
    return script.with_suffix(".err").read_text()


def finish(script: Path, folder: Path, workers: int = 0) -> None:
    with started(script, folder, workers=workers) as process:
        assert process.wait(timeout=120) == 0, errors_of(script)


def parts_in(folder: Path) -> int:
    return len(list(folder.glob("scores/part-*.parquet")))


def check_equal(folder: Path, whole: Path) -> None:
    result, want = fastpie.MiningResult(folder), fastpie.MiningResult(whole)
    assert result.table.equals(want.table)
    assert result.errors.equals(want.errors)
    assert want.errors.num_rows > 0
    ids = result.table.column("sample_id").to_pylist()
    failed = result.errors.column("sample_id").to_pylist()
    assert sorted(ids + failed) == [f"case-{i:03d}" for i in range(COUNT)]
    for one, two in zip(result.logits(), want.logits(), strict=True):
        assert one.tobytes() == two.tobytes()
    # Nothing is left of the interrupted writes.
    assert not [p for p in folder.rglob(".*") if p.name != ".lock"]


def test_a_kill_with_worker_processes(script: Path, tmp_path: Path) -> None:
    """A resume right after the kill is not refused, though the workers outlive the run a while."""
    finish(script, tmp_path / "whole", workers=2)
    folder = tmp_path / "run"
    with started(script, folder, pause=0.01, workers=2) as process:
        deadline = time.monotonic() + 60
        while parts_in(folder) < 5:
            assert process.poll() is None, errors_of(script)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
    assert process.returncode == -9
    finish(script, folder, workers=2)
    check_equal(folder, tmp_path / "whole")
