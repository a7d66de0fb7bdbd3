"""Data sets and loaders of MONAI: dicts, transforms on paths, MetaTensor, list_data_collate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ScaleIntensityd
from PIL import Image

import fastpie


@pytest.fixture
def files(tmp_path: Path) -> list[dict[str, Any]]:
    """Entries of ten PNG files, out of order."""
    generator = np.random.default_rng(0)
    entries = []
    for i in (3, 1, 9, 0, 7, 5, 2, 8, 6, 4):
        path = tmp_path / f"{i}.png"
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
        entries.append({"image": str(path), "label": i % 3, "sample_id": f"p{i}"})
    return entries


def transform() -> Compose:
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            ScaleIntensityd("image"),
        ]
    )


def expected_of(dual: fastpie.DualModel, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    item = transform()(entry)
    image = torch.as_tensor(np.asarray(item["image"])).unsqueeze(0)
    with torch.no_grad():
        out = dual(image)
    return fastpie.disagreement(out.dense, out.pruned, torch.tensor([item["label"]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_monai_loader(
    workers: int,
    files: list[dict[str, Any]],
    dual: Callable[..., fastpie.DualModel],
    rows_of: Any,
    tmp_path: Path,
) -> None:
    model = dual("normalised", 0.5)
    data = Dataset(files, transform())
    assert isinstance(data[0]["image"], MetaTensor)
    loader = DataLoader(
        data, batch_size=4, shuffle=True, num_workers=workers, collate_fn=list_data_collate
    )
    result = fastpie.mine(model, loader, tmp_path / "run", recalibrate=False)
    rows = rows_of(result.table)
    assert list(rows) == [f"p{i}" for i in range(10)]
    for entry in files:
        want = expected_of(model, entry)
        row = rows[entry["sample_id"]]
        assert row["label"] == entry["label"]
        assert row["js"] == pytest.approx(want["js"].item(), abs=1e-5)
        assert row["hardness"] == pytest.approx(want["loss_pruned"].item(), rel=1e-4)
    assert result.errors.num_rows == 0


def test_monai_tells_the_path_of_a_bad_file(
    files: list[dict[str, Any]], dual: Callable[..., fastpie.DualModel], tmp_path: Path
) -> None:
    Path(files[4]["image"]).write_bytes(b"")
    result = fastpie.mine(
        dual(), DataLoader(Dataset(files, transform()), batch_size=4), tmp_path / "run"
    )
    (row,) = result.errors.to_pylist()
    assert row["sample_id"] == files[4]["sample_id"]
    assert row["path"] == files[4]["image"]
    assert row["stage"] == "read"
    assert result.table.num_rows == 9


def test_monai_data_set_without_a_loader(
    files: list[dict[str, Any]], dual: Callable[..., fastpie.DualModel], tmp_path: Path
) -> None:
    """torch's collate function serves for MetaTensors too."""
    one = fastpie.mine(dual(), Dataset(files, transform()), tmp_path / "a", batch_size=4)
    two = fastpie.mine(
        dual(), DataLoader(Dataset(files, transform()), batch_size=4), tmp_path / "b"
    )
    assert one.table.equals(two.table)
