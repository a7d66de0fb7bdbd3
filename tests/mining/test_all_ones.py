"""Masks that keep every weight: no disagreement, bit for bit, on every network, through `mine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastpie
from networks import MONAI, SMALL, Network

SAMPLES, BATCH = 7, 3  # the last batch is padded


class Inputs(Dataset[Any]):
    def __init__(self, network: Network) -> None:
        self.inputs = network.inputs(SAMPLES)
        self.sample_ids = [f"s{i}" for i in range(SAMPLES)]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Any]:
        image = tuple(x[index] for x in self.inputs)
        return (image[0] if len(image) == 1 else image,)


@pytest.mark.parametrize("network", [*SMALL, *MONAI], ids=lambda n: n.name)
def test_no_disagreement_bit_for_bit(network: Network, tmp_path: Path) -> None:
    if network in MONAI:
        pytest.importorskip("monai", reason="MONAI is an extra of the tests")
    model = network.build()
    with torch.no_grad():
        result: Any = model(*network.inputs(2))
    output = None
    if not isinstance(result, Tensor):
        output = next(iter(result)) if isinstance(result, dict) else 0
        result = result[output]
    task = "multiclass" if result.ndim == 2 else "segmentation"
    dual = fastpie.DualModel(model, fastpie.prune(model, [0.0]))
    run = fastpie.mine(
        dual, Inputs(network), tmp_path, task=task, batch_size=BATCH, output=output, progress=False
    )
    assert run.errors.num_rows == 0
    table = run.table
    assert table.column("sample_id").to_pylist() == [f"s{i}" for i in range(SAMPLES)]
    if task == "segmentation":
        exact = {"hardness": 0, "iou": 1, "iou_soft": 1}
    else:
        exact = {
            "hardness": 0,
            "js": 0,
            "kl": 0,
            "kl_reverse": 0,
            "drift": 0,
            "spearman": 1,
            "flip": 0,
        }
    for name, value in exact.items():
        assert set(table.column(name).to_pylist()) == {value}, name
