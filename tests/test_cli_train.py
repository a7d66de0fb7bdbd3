"""`fastpie train`: configurations, recipes, and what is said of wrong ones."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastpie import FastpieError

pytest.importorskip("pydantic")
yaml = pytest.importorskip("yaml")

from fastpie.training.config import read_config

Call = Callable[..., SimpleNamespace]
EXAMPLES = Path(__file__).parents[1] / "examples"
CODE = """
import torch
from torch import nn


def network(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(16 * width, 3),
    )


def augment(noise=0.05):
    return lambda image: image + noise * torch.randn(image.shape)
"""


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], project: Path) -> Call:
    monkeypatch.syspath_prepend(project)
    monkeypatch.chdir(project)

    def call(*arguments: Any) -> SimpleNamespace:
        from fastpie import cli

        monkeypatch.setattr(sys, "argv", ["fastpie", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(code=stop.value.code or 0, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes that a small network can tell apart."""
    root = tmp_path_factory.mktemp("project")
    (root / "train_network.py").write_text(CODE)
    generator = np.random.default_rng(5)
    with (root / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "kind", "split"])
        for i in range(72):
            pixels = generator.integers(0, 90, (12, 12), dtype=np.uint8)
            pixels[:, 4 * (i % 3) : 4 * (i % 3) + 4] += 140
            Image.fromarray(pixels).save(root / f"{i}.png")
            writer.writerow([f"{i}.png", "abc"[i % 3], "valid" if i % 4 == 0 else "train"])
    return root


def config(folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "model": {"factory": "train_network:network"},
        "data": {
            "train": "images.csv",
            "train_split": "train",
            "valid_split": "valid",
            "manifest": {"labels": "kind"},
            "preprocessing": {"size": [12, 12], "channels": 1, "mean": [0.4], "std": [0.3]},
            "augment": "train_network:augment",
            "augment_args": {"noise": 0.1},
        },
        "optimizer": {"name": "AdamW", "lr": 0.01},
        "epochs": 4,
        "batch_size": 9,
        "out": str(folder / "run"),
    }
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] = {**values[name], **value}
        else:
            values[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def test_trains_and_goes_on(cli: Call, tmp_path: Path) -> None:
    path = config(tmp_path, scheduler={"name": "StepLR", "step_size": 2})
    done = cli("train", "--config", path, "--json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)["trainings"]
    assert found["epochs"] == 4
    assert found["last"]["valid_accuracy"] > 0.9
    assert found["last"]["lr"] == pytest.approx(1e-3)
    run = tmp_path / "run"
    assert {"checkpoint.pt", "model.safetensors", "log.csv"} <= {p.name for p in run.iterdir()}
    again = cli("train", "--config", path)
    assert again.code == 0
    assert again.out.strip() == str(run)
    assert "4 epochs" in again.err
    other = cli("train", "--config", config(tmp_path, seed=1))
    assert other.code == 1
    assert "seed: 0 there, 1 now" in other.err


def test_the_model_is_what_was_trained(cli: Call, tmp_path: Path, project: Path) -> None:
    assert cli("train", "--config", config(tmp_path, epochs=2)).code == 0
    weights = tmp_path / "run" / "model.safetensors"
    done = cli(
        "train", "--config", config(tmp_path, epochs=1, model={"weights": str(weights)}), "--out",
        tmp_path / "second", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["trainings"][0]["last"]["loss"] < 0.9
    assert load_file(tmp_path / "second" / "model.safetensors").keys() == load_file(weights).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": {"name": "ldam"}},
        {"recipe": {"name": "mean_teacher", "weight": 0.5}},
        {"recipe": {"name": "care", "layer": "0", "rare_classes": [2], "boxes": "saliency"}},
        {"recipe": {"name": "consistency"}, "attention": {"attend": "consistency", "warmup": 1}},
        {"attention": {"attend": "oversample", "warmup": 1, "every": 1}},
        {"masks": {"sparsity": 0.5}},
        {"masks": {"sparsity": 0.5, "begin": 1, "end": 5, "every": 2}},
        {"precision": "bf16", "clip": 1, "patience": 1},
    ],
)
def test_recipes(cli: Call, tmp_path: Path, changes: dict[str, Any]) -> None:
    done = cli("train", "--config", config(tmp_path, epochs=2, **changes), "--json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)["trainings"]
    assert np.isfinite(found["last"]["loss"])
    if "masks" in changes:
        weights = load_file(tmp_path / "run" / "model.safetensors")
        removed = sum(int((weights[name] == 0).sum()) for name in ("0.weight", "5.weight"))
        assert removed == round(0.5 * (weights["0.weight"].numel() + weights["5.weight"].numel()))


def test_two_stages(cli: Call, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    done = cli(
        "train", "--config", config(tmp_path, epochs=2, recipe={"name": "two_stage"}), "--json"
    )
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["trainings"]) == 2
    first, second = (
        load_file(tmp_path / "run" / f"stage-{n}" / "model.safetensors") for n in (1, 2)
    )
    last = torch.load(tmp_path / "run" / "stage-1" / "checkpoint.pt")["parts"]["objective"]
    assert torch.equal(last["model.0.weight"], second["0.weight"])
    assert not torch.equal(first["5.weight"], second["5.weight"])


def test_contrastive(cli: Call, tmp_path: Path) -> None:
    done = cli("train", "--config", config(tmp_path, epochs=2, recipe={"name": "sdclr"}), "--json")
    assert done.code == 0, done.err
    assert "valid_loss" not in json.loads(done.out)["trainings"][0]["last"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "`epoch` is not known"),
        ({"epochs": None}, "`epochs` is missing"),
        ({"epochs": "ten"}, "`epochs`: .* but got 'ten'"),
        ({"epochs": 0}, "`epochs`: .* greater than or equal to 1, but got 0"),
        ({"optimizer": {"name": None}}, "`optimizer.name`"),
        ({"model": {"factory": "network"}}, "`model.factory`"),
        ({"data": {"trian": "x"}}, "`data.trian` is not known"),
        ({"precision": "fp8"}, "`precision`: .* but got 'fp8'"),
        ({"masks": {"sparsity": 0.5, "begin": 3}}, "`masks`: `begin` and `end` go together"),
    ],
)
def test_a_wrong_configuration_is_bad_usage(
    cli: Call, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = config(tmp_path, **changes)
    with pytest.raises(FastpieError, match=message):
        read_config(path)
    done = cli("train", "--config", path)
    assert done.code == 2
    assert "--config" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"momentun": 1}}, "Expected other options in `optimizer`"),
        ({"optimizer": {"name": "Adamm"}}, "`optimizer.name` to be one of"),
        ({"optimizer": {"lr": -1.0}}, "`optimizer`: Invalid learning rate"),
        ({"scheduler": {"name": "Cosine"}}, "`scheduler.name` to be one of"),
        ({"criterion": {"name": "hinge"}}, "`criterion`: "),
        ({"recipe": {"name": "magic"}}, "`recipe.name` to be one of"),
        ({"recipe": {"name": "care"}}, "Expected other options in `recipe`"),
        ({"attention": {"warmupp": 1}}, "Expected other options in `attention`"),
        ({"data": {"augment": "train_network:nothing"}}, "`data.augment`"),
        ({"data": {"preprocessing": {"sizes": 3}}}, "other options in `data`"),
    ],
)
def test_wrong_options_name_their_section(
    cli: Call, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    done = cli("train", "--config", config(tmp_path, **changes))
    assert done.code == 1
    assert message in done.err


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_right(example: Path) -> None:
    found = read_config(example)
    assert isinstance(found.optimizer.options["lr"], float)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(FastpieError, match="a configuration in"):
        read_config(path)
    path.write_text("a: [1, 2")
    with pytest.raises(FastpieError, match="a configuration in"):
        read_config(path)
    path.write_text("- 1\n")
    with pytest.raises(FastpieError, match="but got list"):
        read_config(path)
