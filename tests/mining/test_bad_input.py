"""Data, models and options that cannot be: a clear error, or a row in the errors table."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import fastpie

Dual = Callable[..., fastpie.DualModel]


class Files(Dataset):
    """PNG files and labels, as a user would write it."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.png"))
        self.sample_ids = [path.stem for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.paths[index]) as image:
            pixels = np.asarray(image, dtype=np.float32) / 255
        return torch.from_numpy(pixels).unsqueeze(0), index % 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path / "images"
    path.mkdir()
    for i in range(12):
        pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02d}.png")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_among_good_ones(workers: int, folder: Path, dual: Dual, tmp_path: Path) -> None:
    clean = fastpie.mine(dual(), Files(folder), tmp_path / "clean", batch_size=4).table
    (folder / "02.png").write_bytes(b"")
    whole = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(whole[: len(whole) // 2])
    (folder / "09.png").write_bytes(b"not an image at all")
    data = Files(folder)
    (folder / "11.png").unlink()
    result = fastpie.mine(dual(), data, tmp_path / "run", batch_size=4, num_workers=workers)
    errors = result.errors.to_pylist()
    assert [row["sample_id"] for row in errors] == ["02", "05", "09", "11"]
    assert {row["stage"] for row in errors} == {"read"}
    for row in errors:
        assert row["path"] == str(folder / f"{row['sample_id']}.png")
        assert row["error"]
    good = [i for i in range(12) if i not in (2, 5, 9, 11)]
    assert result.table.equals(clean.take(good))


def test_all_samples_unreadable(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    data = labelled(6, bad={i: OSError(f"gone {i}") for i in range(6)})
    with pytest.raises(fastpie.FastpieError, match="gone 0"):
        fastpie.mine(dual(), data, tmp_path, batch_size=4)
    # Mended, the same command does it all, and nothing is left of the failure.
    result = fastpie.mine(dual(), labelled(6), tmp_path, batch_size=4)
    assert len(result) == 6
    assert result.errors.num_rows == 0


def test_the_reason_is_told_when_no_image_is_usable(
    dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    bad = {i: (torch.full((1, 8, 8), math.nan), 0) for i in range(3)}
    with pytest.raises(fastpie.FastpieError, match="NaN"):
        fastpie.mine(dual(), labelled(3, bad=bad), tmp_path)


def test_an_empty_data_set(dual: Dual, samples: Any, tmp_path: Path) -> None:
    for ids in (None, []):
        with pytest.raises(fastpie.FastpieError, match="empty"):
            fastpie.mine(dual(), samples([], ids), tmp_path)


def test_duplicate_ids(dual: Dual, images: Any, samples: Any, tmp_path: Path) -> None:
    x = images(3)
    with pytest.raises(fastpie.FastpieError, match=r"unique.*'a'"):
        fastpie.mine(dual(), samples([(i, 0) for i in x], ["a", "b", "a"]), tmp_path / "1")
    with pytest.raises(fastpie.FastpieError, match=r"unique.*'7'"):
        fastpie.mine(dual(), samples([(i, 0, 7) for i in x]), tmp_path / "2")
    with pytest.raises(fastpie.FastpieError, match="each of the 3"):
        fastpie.mine(dual(), samples([(i, 0) for i in x]), tmp_path / "3", sample_ids=["a"])


def test_bad_images_among_good_ones(dual: Dual, labelled: Any, images: Any, tmp_path: Path) -> None:
    x = images(8)
    bad = {
        1: (x[1] * math.nan, 0),
        2: (x[2].where(x[2] < 1, math.inf), 0),
        4: (x[4, :, :5], 0),
        5: (x[5].repeat(3, 1, 1), 0),
        6: ("06.png", 0),
        7: None,
    }
    result = fastpie.mine(dual(), labelled(8, bad=bad), tmp_path, batch_size=3)
    errors = result.errors.to_pylist()
    assert [row["sample_id"] for row in errors] == ["s01", "s02", "s04", "s05", "s06", "s07"]
    assert [row["stage"] for row in errors] == ["image"] * 5 + ["read"]
    assert result.table.column("sample_id").to_pylist() == ["s00", "s03"]


def test_an_odd_first_image_does_not_condemn_the_rest(
    dual: Dual, labelled: Any, images: Any, tmp_path: Path
) -> None:
    bad = {0: (images(1)[0, :, :4], 0)}
    result = fastpie.mine(dual(), labelled(9, bad=bad), tmp_path, batch_size=4)
    assert result.errors.column("sample_id").to_pylist() == ["s00"]
    assert len(result) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["conv1.weight", "fc.bias", "bn1.running_var"])
def test_weights_that_are_not_finite(
    name: str, value: float, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    model = dual("normalised")
    model.model.state_dict()[name].view(-1)[1] = value
    with pytest.raises(fastpie.FastpieError, match=f"{name}.*1 NaN or infinite"):
        fastpie.mine(model, labelled(3), tmp_path)


def test_infinite_buffers_are_no_weights(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    """An additive attention mask of -inf is a constant that many transformers keep as a buffer."""
    model = dual()
    model.model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    assert len(fastpie.mine(model, labelled(3), tmp_path)) == 3


class Touchy(nn.Module):
    """Gives NaN or infinity for images whose first pixel is large."""

    def __init__(self, inner: nn.Module, value: float) -> None:
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, x: Tensor) -> Tensor:
        hit = x[:, 0, 0, :1] > 50
        return torch.where(hit, self.value, self.inner(x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sparsity", [0.5, [0.3, 0.7]])
@pytest.mark.parametrize("index", [0, 4])
def test_outputs_that_are_not_finite(
    index: int,
    sparsity: Any,
    value: float,
    network: Any,
    labelled: Any,
    images: Any,
    tmp_path: Path,
) -> None:
    model = Touchy(network(), value)
    dual = fastpie.DualModel(model, fastpie.prune(model, sparsity))
    clean = fastpie.mine(dual, labelled(7), tmp_path / "clean", batch_size=3).table
    image = images(7)[index].clone()
    image[0, 0, 0] = 99
    data = labelled(7, bad={index: (image, 0)})
    result = fastpie.mine(dual, data, tmp_path / "run", batch_size=3)
    (row,) = result.errors.to_pylist()
    assert (row["sample_id"], row["stage"]) == (f"s{index:02d}", "score")
    assert result.table.equals(clean.take([i for i in range(7) if i != index]))


def test_data_without_fixed_samples(dual: Dual, tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield torch.ones(1, 8, 8), 0

    with pytest.raises(fastpie.FastpieError, match=r"map-style.*Stream"):
        fastpie.mine(dual(), Stream(), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "regression"}, "'regression'"),
        ({"batch_size": -1}, "batch size.*-1"),
        ({"batch_size": 0}, "batch size.*0"),
        ({"precision": "fp8"}, "'fp8'"),
        ({"backend": "tpu"}, "'tpu'"),
        ({"device": "nonsense"}, "nonsense"),
        ({"note": {"file": Path("x")}}, "note"),
    ],
)
def test_bad_options(
    options: dict[str, Any], words: str, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    with pytest.raises(fastpie.FastpieError, match=words):
        fastpie.mine(dual(), labelled(3), tmp_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    with pytest.raises(fastpie.FastpieError, match="cuda"):
        fastpie.mine(dual(), labelled(3), tmp_path, device="cuda")


@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (1, 5, 5), (8,)], ids=["channels", "size", "dimensions"]
)
def test_images_that_the_model_does_not_take(
    shape: tuple[int, ...], dual: Dual, samples: Any, tmp_path: Path
) -> None:
    data = samples([(torch.zeros(shape), 0)] * 2, ["a", "b"])
    with pytest.raises(fastpie.FastpieError, match=f"{[64, *shape]}".replace("[", r"\[")):
        fastpie.mine(dual(), data, tmp_path)


def test_images_of_another_type(dual: Dual, images: Any, samples: Any, tmp_path: Path) -> None:
    for kind in (torch.uint8, torch.float64):
        data = samples([(x.to(kind), 0) for x in images(2)], ["a", "b"])
        with pytest.raises(fastpie.FastpieError, match="model to take a batch"):
            fastpie.mine(dual(), data, tmp_path / str(kind))


class WithExtraState(nn.Module):
    """state_dict() may hold more than tensors (torch: Module.get_extra_state)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_a_model_with_extra_state(network: Any, labelled: Any, tmp_path: Path) -> None:
    assert len(fastpie.mine(WithExtraState(network()), labelled(3), tmp_path)) == 3


def test_a_folder_that_cannot_be(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(fastpie.FastpieError, match="folder"):
        fastpie.mine(dual(), labelled(3), tmp_path / "file")
