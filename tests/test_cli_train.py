"""`fastpie train`: the examples, stages, mining with what was trained, resuming, torchrun."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastpie.demo import make_data, small_resnet

Call = Callable[..., SimpleNamespace]
EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["--set", "epochs=1", "--set", "batch_size=128"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples beside the data of the demo."""
    root = tmp_path_factory.mktemp("project")
    make_data(root / "demo-run", 0)
    shutil.copytree(EXAMPLES, root / "examples")
    return root


@pytest.mark.parametrize(
    ("name", "more", "stages"),
    [
        ("plain", ["epochs=2"], 1),
        ("attention", ["epochs=2", "attention.warmup=1", "attention.every=1"], 1),
        ("few_labels", ["recipe.threshold=0.2"], 1),
        ("sdclr", ["then.epochs=1", "then.batch_size=128"], 2),
        ("masked", ["masks={name: gradual, final: 0.9, begin: 0, end: 3, every: 1}"], 1),
    ],
)
def test_an_example_trains_and_its_weights_can_be_mined(
    cli: Call, project: Path, tmp_path: Path, name: str, more: list[str], stages: int
) -> None:
    out = tmp_path / "run"
    sets = [part for text in more for part in ("--set", text)]
    command = ["train", "--config", project / "examples" / f"{name}.yaml", "--out", out]
    done = cli(*command, *SHORT, *sets, "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data == json.loads((out / "result.json").read_text())
    assert len(data["epochs"]) == stages
    assert 0 <= data["test"]["balanced_accuracy"] <= 1
    assert (out / "config.yaml").is_file()
    weights = load_file(data["weights"])
    model = small_resnet()
    model.load_state_dict(weights)
    if name == "masked":
        convolutions = [w for w in weights.values() if w.ndim > 1]
        removed = sum(int((w == 0).sum()) for w in convolutions)
        assert removed == round(0.9 * sum(w.numel() for w in convolutions))
    if name == "attention":
        with (out / "log.csv").open() as file:
            assert all(float(row["mining_seconds"]) > 0 for row in csv.DictReader(file))
    if name != "plain":
        return
    again = cli(*command, *SHORT, *sets)  # done: nothing is trained, the same is printed
    assert again.code == 0, again.err
    assert f"test_accuracy            {data['test']['accuracy']:.4f}" in again.out
    assert load_file(data["weights"])["0.weight"].equal(weights["0.weight"])
    other = cli(*command, *SHORT, *sets, "--set", "optimizer.lr=0.01", "--set", "scheduler=null")
    assert other.code == 1
    assert "differs" in other.err
    mined = cli(
        "mine", "--model", "fastpie.demo:small_resnet", "--weights", data["weights"],
        "--data", project / "demo-run/train.csv", "--labels", "label", "--channels", "1",
        "--sparsity", "0.5", "--no-report", "--out", tmp_path / "mined",
    )  # fmt: skip
    assert mined.code == 0, mined.err
    assert len(mined.out.split()) == 22


def test_check_builds_everything_and_trains_nothing(
    cli: Call, project: Path, tmp_path: Path
) -> None:
    command = ["train", "--config", project / "examples/sdclr.yaml", "--out", tmp_path / "run"]
    done = cli(*command, "--check", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["then"]["recipe"] == {"name": "supervised"}
    assert "364 train, 79 valid, 500 test" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("nonsense", 2, "--set"),
        ("epochs=x", 1, "plain.yaml: Expected `epochs`"),
        ("criterion.gamma=1", 1, "`criterion.gamma` to be an option of logit_adjusted"),
        ("criterion.tau=x", 1, "`criterion.tau`"),
        ("attention.warmup=0", 1, "`attention.warmup`"),
        ("attention.per=sex", 1, "`attention.per`"),
        ("optimizer.lr=-1", 1, "`optimizer` that can be used"),
        ("model=fastpie.demo:large_resnet", 1, "`model.factory`"),
        ("model.weights=none.safetensors", 1, "`model.weights`"),
        ("data.valid.split=dev", 1, "`data.valid`"),
        ("data.valid={split: train}", 1, "`data.valid` to have no image of the training set"),
        ("data.train.source=none.csv", 1, "`data.train`"),
        ("recipe={name: care, layer: nowhere, rare_classes: [9]}", 1, "`recipe.layer`"),
        ("augment=['fastpie.demo:nothing']", 1, "`augment.0`"),
    ],
)
def test_what_cannot_be_built_is_named(
    cli: Call, project: Path, tmp_path: Path, override: str, code: int, message: str
) -> None:
    config = project / "examples/plain.yaml"
    done = cli("train", "--config", config, "--set", override, "--out", tmp_path / "run", "--check")
    assert done.code == code, done.err
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        "{recipe: {name: care, layer: '5', rare_classes: [8, 9], boxes: saliency}}",
        "{recipe: weakly_supervised, attention: {score: cam, warmup: 1}}",
        "{recipe: {name: consistency, strength: 0.5}, criterion: focal, precision: bf16}",
        "{recipe: metric_learning, then: {recipe: head_retraining, draw: balanced}}",
        "{masks: {name: iterative, fraction: 0.5, every: 1}, attention: {per: path, warmup: 1}}",
        "{masks: {name: fixed, sparsity: 0.9, exclude: ['0']}, criterion: ldam, draw: balanced}",
    ],
)
def test_other_recipes_train(cli: Call, project: Path, tmp_path: Path, recipe: str) -> None:
    from fastpie.training.config.file import parse_overrides

    fields = parse_overrides([f"x={recipe}"])["x"]
    sets = [part for k, v in fields.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    config = project / "examples/plain.yaml"
    done = cli("train", "--config", config, "--out", tmp_path / "run", *SHORT, *sets, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["epochs"] == [1] * (1 + ("then" in fields))


def test_samples_are_left_out(cli: Call, project: Path, tmp_path: Path) -> None:
    with (project / "demo-run/train.csv").open() as file:
        ids = [row["sample_id"] for row in csv.DictReader(file)]
    (tmp_path / "out.txt").write_text("\n".join(ids[:40]))
    (tmp_path / "out.csv").write_text("rank,sample_id\n" + "".join(f"0,{i}\n" for i in ids[:40]))
    for name in ("out.txt", "out.csv"):
        done = cli(
            "train", "--config", project / "examples/masked.yaml", "--check",
            "--set", f"data.train.leave_out={tmp_path / name}",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert f"{len(ids) - 40} train, 500 test" in done.err


def test_under_torchrun(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fastpie", "train", "--json"]
    command += ["--config", str(project / "examples/masked.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *SHORT, "--set", "masks=null"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=project,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(done.stdout)  # from one process alone
    assert data["epochs"] == [1]
    assert torch.isfinite(load_file(data["weights"])["0.weight"]).all()
    assert done.stderr.count("parameters to train") == 1
