"""One run shared by processes under torchrun, bit for bit that of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastpie

SCRIPT = """
import copy, sys
import torch
import torch.distributed as dist
from torch import nn
import fastpie, fastpie.mining.session

fastpie.mining.session._PART_SECONDS = 0.0  # a batch a part
torch.set_num_threads(1)
torch.manual_seed(0)


class Generated(torch.utils.data.Dataset):
    sample_ids = [f"case-{(i * 7919) % 200:03d}" for i in range(200)]

    def __len__(self):
        return 200

    def __getitem__(self, index):
        number = int(self.sample_ids[index][5:])
        if number % 31 == 4:
            raise OSError(f"cannot read {number}")
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(number)), number % 3


def model(seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    network = nn.Sequential(*layers).eval()
    return fastpie.DualModel(network, fastpie.prune(network, [0.3, 0.6]))


if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
data = Generated()
for name, models in (("one", model(0)), ("two", [model(0), model(1)])):
    fastpie.mine(models, data, f"{sys.argv[1]}/{name}", batch_size=4, keep_logits=True)
if dist.is_initialized():
    if dist.get_rank() == 1:
        broken = [torch.zeros(1)] * 3  # refused by rank 0, and so by all
    else:
        broken = [torch.zeros(2)] * 3
    try:
        fastpie.mine(model(0), broken, f"{sys.argv[1]}/bad", sample_ids=["a", "a", "b"])
    except fastpie.FastpieError as error:
        print(f"rank {dist.get_rank()} refuses: {error}")
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "script.py").write_text(SCRIPT)
    launch([sys.executable, str(folder / "script.py"), str(folder)])
    return folder


def launch(command: list[str]) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_number_of_processes_changes_no_bit(
    processes: int, alone: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes)]
    out = launch([*command, str(alone / "script.py"), str(tmp_path)])
    for name in ("one", "two"):
        result, want = fastpie.MiningResult(tmp_path / name), fastpie.MiningResult(alone / name)
        assert len(want) == 193
        assert result.table.equals(want.table)
        assert result.errors.equals(want.errors)
        for one, two in zip(result.members or [result], want.members or [want], strict=True):
            for a, b in zip(one.logits(), two.logits(), strict=True):
                assert a.tobytes() == b.tobytes()
        assert not [p for p in (tmp_path / name).rglob(".*") if p.name != ".lock"]
    for rank in range(processes):
        assert f"rank {rank} refuses" in out
    assert out.count("more than once") == processes
