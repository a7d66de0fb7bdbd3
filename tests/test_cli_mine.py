"""`fastpie mine`: splits, caches, shares of a run, several checkpoints, processes of torchrun."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastpie

Call = Callable[..., SimpleNamespace]
COUNT = 60
NETWORK = """
from torch import nn


def network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
"""


@pytest.fixture
def cli(cli: Call, monkeypatch: pytest.MonkeyPatch, project: Path) -> Call:
    """Finds the project's network, too."""
    monkeypatch.syspath_prepend(project)
    return cli


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, and images of 20 patients in two splits, one image broken."""
    root = tmp_path_factory.mktemp("project")
    (root / "cli_network.py").write_text(NETWORK)
    network = runpy.run_path(str(root / "cli_network.py"))["network"]
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(network().state_dict(), root / f"w{seed}.safetensors")
    generator = np.random.default_rng(0)
    with (root / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "group", "split", "sex", "note"])
        for i in range(COUNT):
            pixels = generator.integers(0, 256, (9, 9), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{i:02d}.png")
            split = "test" if i % 20 < 5 else "train"
            rows.writerow([f"{i:02d}.png", i % 10, f"p{i % 20}", split, "FM"[i % 2], "=1+1"])
    (root / "07.png").write_bytes(b"\x89PNG torn")
    return root


def arguments(project: Path, out: Path, *more: Any) -> list[Any]:
    return [
        "mine", "--model", "cli_network:network", "--weights", project / "w0.safetensors",
        "--data", project / "data.csv", "--labels", "label", "--size", "8", "--channels", "1",
        "--batch-size", "8", "--no-report", "--out", out, *more,
    ]  # fmt: skip


def test_one_split_and_the_manifest_beside_the_scores(
    cli: Call, project: Path, tmp_path: Path
) -> None:
    done = cli(*arguments(project, tmp_path, "--split", "train", "--json"))
    assert done.code == 0, done.err
    result = fastpie.MiningResult(tmp_path)
    assert len(result) == 44
    assert json.loads(done.out)["telemetry"]["images"] == 45
    manifest = result.manifest
    assert manifest is not None
    assert set(manifest.column("split").to_pylist()) == {"train"}
    assert manifest.column("group")[0].as_py() == "p5"
    assert set(manifest.column("sex").to_pylist()) == {"F", "M"}
    wrong = cli(*arguments(project, tmp_path / "x", "--split", "validation"))
    assert wrong.code == 1
    assert "'test', 'train'" in wrong.err


def test_leaking_splits_are_refused(cli: Call, project: Path, tmp_path: Path) -> None:
    text = (project / "data.csv").read_text().replace("p19,train", "p0,train")
    (project / "leak.csv").write_text(text)
    done = cli(*arguments(project, tmp_path), "--data", project / "leak.csv")
    assert done.code == 1
    assert "p0 (test, train)" in done.err


def test_a_cache_gives_the_same_table_without_the_files(
    cli: Call, project: Path, tmp_path: Path
) -> None:
    cache = ["--cache", tmp_path / "cache", "--cache-limit", "0.5"]
    plain = cli(*arguments(project, tmp_path / "plain", "--workers", "2", "--json"))
    first = cli(*arguments(project, tmp_path / "first", *cache, "--json"))
    again = cli(*arguments(project, tmp_path / "again", *cache, "--workers", "2", "--json"))
    assert [plain.code, first.code, again.code] == [0, 0, 0]
    tables = [fastpie.MiningResult(tmp_path / n).table for n in ("plain", "first", "again")]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file()) > 0
    without = cli(*arguments(project, tmp_path / "x", *cache), "--size", "")
    assert without.code == 1
    assert "size" in without.err


def test_shares_and_limits_make_the_whole(
    cli: Call, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpie.mining.session._PART_SECONDS", 0.0)  # a batch a part
    assert cli(*arguments(project, tmp_path / "whole")).code == 0
    run = tmp_path / "run"
    sizes = []
    for more in (["--shard", "2/2", "--limit", "10"], ["--shard", "2/2"], ["--shard", "1/2"]):
        done = cli(*arguments(project, run, *more))
        assert done.code == 0, done.err
        sizes.append(len(fastpie.MiningResult(run)))
    assert sizes == [16, 28, 59]
    assert fastpie.MiningResult(run).table.equals(fastpie.MiningResult(tmp_path / "whole").table)


def test_several_checkpoints(cli: Call, project: Path, tmp_path: Path) -> None:
    more = ["--weights", project / "w1.safetensors", "--keep-logits", "--log", "csv"]
    done = cli(*arguments(project, tmp_path, *more, "--models-at-once", "1"))
    assert done.code == 0, done.err
    result = fastpie.MiningResult(tmp_path)
    assert len(result.members) == 2
    assert len(result) == 59
    assert "mean over 2 models" in done.err
    assert len(fastpie.pie(result, fraction=0.1)) == 5
    with (tmp_path / "log" / "rank-0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert float(rows[-1]["samples"]) == 2 * COUNT  # a pass a group
    masks = cli(*arguments(project, tmp_path / "x", *more), "--masks", "m.safetensors")
    assert masks.code == 2
    assert "--masks" in masks.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--shard", "0/2"], 2, "--shard"),
        (["--shard", "3/2"], 2, "--shard"),
        (["--window", "5"], 2, "--window"),
        (["--manifest-args", "[1]"], 2, "--manifest-args"),
        (["--manifest-args", '{"group": "nobody"}'], 1, "nobody"),
        (["--format", "dicom"], 1, "nih"),
        (["--uncertain", "u_ones"], 1, "uncertain"),
        (["--log", "wandb"], 2, "--log"),
    ],
)
def test_wrong_options_say_so(
    cli: Call, project: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    done = cli(*arguments(project, tmp_path), *options)
    assert done.code == code, done.err
    assert message in done.err


def test_under_torchrun(cli: Call, project: Path, tmp_path: Path) -> None:
    one = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it
    try:
        assert cli(*arguments(project, tmp_path / "one")).code == 0
    finally:
        torch.set_num_threads(one)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fastpie"]
    done = subprocess.run(
        [*command, *map(str, arguments(project, tmp_path / "two", "--telemetry", "csv"))],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=project,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one_result, two_result = (fastpie.MiningResult(tmp_path / n) for n in ("one", "two"))
    assert two_result.table.equals(one_result.table)
    assert two_result.errors.equals(one_result.errors)
    assert done.stdout.split() == one_result.select(0.05)  # from one process alone
    assert {p.name for p in (tmp_path / "two" / "log").iterdir()} == {"rank-0.csv", "rank-1.csv"}
