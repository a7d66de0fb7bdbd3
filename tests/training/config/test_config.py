"""Configurations of `fastpie train`: what is refused, by which name, and what is resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastpie
from fastpie.training.config.augment import Compose, Flip, Noise, Shift
from fastpie.training.config.file import config_data, config_text, parse_overrides, read_config

WHOLE: dict[str, Any] = {
    "model": "fastpie.demo:small_resnet",
    "data": {
        "source": "all.csv",
        "labels": "label",
        "channels": 1,
        "train": {"split": "train"},
        "valid": {"split": "valid", "channels": 3},
        "test": {"source": "s3://bucket/test.csv"},
    },
    "optimizer": {"name": "SGD", "lr": 0.1},
    "epochs": 2,
    "out": "run",
}


def written(folder: Path, text: str | None = None) -> Path:
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(WHOLE) if text is None else text)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=ten", "x.yaml: Expected `epochs` to be a valid integer, but got 'ten'"),
        ("epochs=true", "`epochs`"),
        ("epochs=0", "`epochs` to be greater than or equal to 1, but got 0"),
        ("epoch=3", "`epoch` to be a field.*mean 'epochs'"),
        ("data.train.lables=x", "`data.train.lables` to be a field.*mean 'labels'"),
        ("data.train=null", "`data.train`"),
        ("data.channels=2", "`data.channels` to be 1 or 3, but got 2"),
        ("data.size=[8]", "`data.size`"),
        ("precision=fp8", "`precision` to be 'fp32', 'bf16' or 'fp16', but got 'fp8'"),
        ("clip=0", "`clip`"),
        ("model.factory=null", "`model.factory`"),
        ("optimizer.name=Sgd", "`optimizer.name` to be a class of torch.optim.*mean 'SGD'"),
        ("optimizer.learning_rate=1", "`optimizer.learning_rate` to be an option of SGD"),
        ("scheduler.per=day", "`scheduler.per`"),
        ("scheduler={name: StepLR, step: 3}", "`scheduler.step` to be an option of StepLR"),
        ("recipe=sdcrl", "`recipe.name` to be one of .*mean 'sdclr'"),
        ("recipe={name: consistency, sparsty: 1}", "`recipe.sparsty`.*mean 'sparsity'"),
        ("attention.evry=2", "`attention.evry` to be an option of Attention.*mean 'every'"),
        ("masks={name: gradual, finl: 0.9}", "`masks.finl`.*mean 'final'"),
        ("masks.sparsity=0.9", "`masks.name`, but it is missing"),
        ("augment=[flip, {name: shift, pixel: 2}]", "`augment.1.pixel`.*mean 'pixels'"),
        ("augment_second=[flip]", "`augment_second`"),
        ("then.epochs=-1", "`then.epochs`.*got -1"),
        ("then.optimizer.momentm=1", "`then.optimizer"),
        ("then.model=other:net", "`then.model` to be that of the first stage"),
        ("epochs.x=1", "`epochs` to have fields"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_path(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(fastpie.FastpieError, match=rf"(?s){message}"):
        read_config(written(tmp_path), parse_overrides([override]))


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(fastpie.FastpieError, match=r"(?s)`data.train.x`.*`epochs`"):
        read_config(written(tmp_path), {"epochs": 0, "data.train.x": 1})


@pytest.mark.parametrize("text", ["a: [", "- 1", "epochs: 1\nepochs: 2", "3"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(fastpie.FastpieError, match=r"x\.yaml"):
        read_config(written(tmp_path, text))
    with pytest.raises(fastpie.FastpieError, match=r"y\.yaml"):
        read_config(tmp_path / "y.yaml")


@pytest.mark.parametrize("text", ["epochs", "=3", "a..b=1", "epochs=["])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(fastpie.FastpieError, match="Expected"):
        parse_overrides([text])


def test_paths_and_parts_are_resolved_and_read_again_alike(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = ["optimizer.lr=1e-3", "then={epochs: 3, attention: {every: 2}}", "model.weights=w.st"]
    config = read_config(path, parse_overrides(lines))
    assert config.out == str(tmp_path / "run")
    assert config.model.weights == str(tmp_path / "w.st")
    assert config.optimizer.options == {"lr": 0.001}
    parts = [config.data.part(name) for name in ("train", "valid", "test", "unlabelled")]
    train, valid, test, unlabelled = parts
    assert train
    assert valid
    assert test
    assert (train.source, train.split, train.channels) == (str(tmp_path / "all.csv"), "train", 1)
    assert (valid.labels, valid.channels) == (["label"], 3)
    assert test.source == "s3://bucket/test.csv"
    assert unlabelled is None
    first, second = config.stages
    assert (first.epochs, first.attention) == (2, None)
    assert (second.epochs, second.attention) == (3, {"every": 2})
    assert second.optimizer == first.optimizer
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    again = read_config(written(folder, config_text(config)))
    assert config_data(again) == config_data(config)


def test_augmentations_are_what_they_say() -> None:
    image = torch.rand(2, 5, 7)
    assert Flip(1.0)(image).equal(image.flip(2))
    assert Flip(0.0)(image).equal(image)
    assert Noise(0.0)(image).equal(image)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), value=-1.0)
    windows = [padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)]
    seen = set()
    for _ in range(200):
        moved = Shift(2, fill=-1.0)(image)
        seen.add(next(i for i, window in enumerate(windows) if moved.equal(window)))
    assert len(seen) > 20
    assert Shift(9)(torch.rand(1, 3, 3)).shape == (1, 3, 3)


class Generator:
    """A transform with a generator of its own, as MONAI's have."""

    def set_random_state(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand(image.shape, generator=self.generator)


def test_transforms_with_generators_of_their_own_follow_torchs() -> None:
    compose = Compose([Generator()])
    image = torch.rand(1, 4, 4)
    torch.manual_seed(3)
    first, other = compose(image), compose(image)
    torch.manual_seed(3)
    assert compose(image).equal(first)
    assert not other.equal(first)
