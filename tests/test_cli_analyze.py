"""`fastpie analyze` and `fastpie report` on a run of the command line."""

from __future__ import annotations

import csv
import json
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
from fastpie.analysis import Analysis
from fastpie.demo import small_resnet

Call = Callable[..., SimpleNamespace]
COUNT = 60


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; images of two splits with attributes, one broken, one there twice."""
    root = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    save_file(small_resnet().state_dict(), root / "w.safetensors")
    generator = np.random.default_rng(0)
    with (root / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "group", "split", "sex", "age"])
        for i in range(COUNT):
            pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{i:02d}.png")
            split = "test" if i < 40 else "train"
            rows.writerow([f"{i:02d}.png", i % 10, f"p{i}", split, "FM"[i % 2], 20 + i])
    (root / "07.png").write_bytes(b"\x89PNG torn")
    (root / "31.png").write_bytes((root / "21.png").read_bytes())
    return root


def mined(cli: Call, project: Path, out: Path, *more: Any) -> Path:
    done = cli(
        "mine", "--model", "fastpie.demo:small_resnet", "--weights", project / "w.safetensors",
        "--data", project / "data.csv", "--labels", "label", "--channels", "1", "--size", "8",
        "--split", "test", "--no-report", "--out", out, *more,
    )  # fmt: skip
    assert done.code == 0, done.err
    return out


def test_a_run_with_everything_kept(cli: Call, project: Path, tmp_path: Path) -> None:
    run = mined(cli, project, tmp_path / "run", "--keep-logits", "--keep-features")
    record = fastpie.MiningResult(run).record
    assert record["config"]["features"] == "3:pooled+4:pooled"  # the stages but the last
    assert record["config"]["keep_features"] == "dense"

    done = cli(
        "analyze", run, "--train-split", "train", "--thumbnails", "20", "--heat-maps", "2",
        "--intersections", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    analysis = Analysis.load(run / "analysis")
    assert found["sentences"] == analysis.sentences
    assert found["tables"].keys() == analysis.tables.keys()
    assert analysis.tables["classes"]["n_train"].to_pylist() == [2] * 10
    assert "sex, age" in analysis.tables["subgroups"]["attribute"].to_pylist()
    assert analysis.samples.num_rows == 39
    by_id = dict(
        zip(
            analysis.samples["sample_id"].to_pylist(),
            analysis.samples["duplicate_of"].to_pylist(),
            strict=True,
        )
    )
    assert by_id["31.png"] == "21.png"
    assert (run / "analysis" / "plots" / "subgroups.svg").is_file()
    page = (run / "report.html").read_text()
    names = [f"{i:02d}.png" for i in range(COUNT)]
    assert not any(name in page for name in names)  # ids are hidden
    assert "Grad-CAM" in page

    again = cli("report", run, "--show-ids", "--thumbnails", "20", "--heat-maps", "0")
    assert again.code == 0, again.err
    assert again.out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert sum(name in page for name in names) == 21  # with the broken one, among the errors


def test_a_run_that_kept_nothing(cli: Call, project: Path, tmp_path: Path) -> None:
    run = mined(cli, project, tmp_path / "run")
    done = cli("analyze", run, "--no-images", "--no-report", "--out", tmp_path / "elsewhere")
    assert done.code == 0, done.err
    analysis = Analysis.load(tmp_path / "elsewhere")
    assert done.out.splitlines() == analysis.sentences
    assert not (run / "analysis").exists()
    assert not (run / "report.html").exists()


def test_a_model_that_has_changed_gives_a_report_without_heat_maps(
    cli: Call, project: Path, tmp_path: Path
) -> None:
    run = mined(cli, project, tmp_path / "run")
    weights = project / "w.safetensors"
    before = weights.read_bytes()
    try:
        torch.manual_seed(1)
        save_file(small_resnet().state_dict(), weights)
        done = cli("report", run)
    finally:
        weights.write_bytes(before)
    assert done.code == 0, done.err
    assert "There are no heat maps: Expected the weights" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "0.42"], "`sparsity` to be one of"),
        (["--definition", "magic"], "`definition` to be one of"),
        (["--compat", "pandas"], "`compat` to be None or 'prunecxr'"),
        (["--metric", "f1"], "`metric` to be one of"),
        (["--records", "nowhere"], "Expected the records of a training"),
        (["--attributes", "hair"], "hair"),
        (["--train-split", "nothing"], "'nothing'"),
    ],
)
def test_bad_options(
    cli: Call,
    project: Path,
    tmp_path_factory: pytest.TempPathFactory,
    arguments: list[str],
    message: str,
) -> None:
    run = tmp_path_factory.getbasetemp() / "bad-options"
    if not run.exists():
        mined(cli, project, run, "--keep-logits")
    done = cli("analyze", run, "--no-images", "--no-report", *arguments)
    assert done.code == 1
    assert message in done.err.replace("\n", " ")


def test_no_run(cli: Call, tmp_path: Path) -> None:
    done = cli("analyze", tmp_path)
    assert done.code == 1
    assert "run.json" in done.err
