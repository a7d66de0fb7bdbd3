"""What a run in a folder may be taken up with, and what its files must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import fastpie
import fastpie.mining.session as run_module


class Rows(Dataset[Any]):
    def __init__(self, fingerprint: str | None = None, kind: str = "<f4", bad: int = -1) -> None:
        self.sample_ids = [f"s{i:02d}" for i in range(12)]
        self.bad = bad
        self.kind = kind
        if fingerprint is not None:
            self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        values = np.random.default_rng(index).random((2, 4, 4)).astype("<f4")
        return (values.astype(self.kind) if index == self.bad else values), index % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)
    ).eval()


def mined(path: Path, data: Any = None, **options: Any) -> fastpie.MiningResult:
    options = {"batch_size": 4, "progress": False, **options}
    return fastpie.mine(network(), Rows() if data is None else data, path, **options)


def test_a_data_set_of_another_fingerprint_is_refused(tmp_path: Path) -> None:
    mined(tmp_path, Rows("labels of May"))
    mined(tmp_path, Rows("labels of May"))
    with pytest.raises(fastpie.FastpieError, match="samples: labels of May in the folder"):
        mined(tmp_path, Rows("labels of June"))
    with pytest.raises(fastpie.FastpieError, match="samples: labels of May in the folder"):
        mined(tmp_path, torch.utils.data.Subset(Rows("labels of May"), range(12)))


def test_scores_without_a_record_are_not_taken_over(tmp_path: Path) -> None:
    mined(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(fastpie.FastpieError, match=r"without a run\.json"):
        mined(tmp_path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"torn")])
def test_statistics_that_are_gone_are_named(damage: Any, tmp_path: Path) -> None:
    mined(tmp_path)
    next((tmp_path / "scores").iterdir()).unlink()
    damage(tmp_path / "recalibration.safetensors")
    with pytest.raises(fastpie.FastpieError, match=r"recalibration\.safetensors"):
        mined(tmp_path)


@pytest.mark.parametrize("kind", [">f4", "O"])
def test_an_array_that_torch_cannot_read_is_one_error(kind: str, tmp_path: Path) -> None:
    result = mined(tmp_path, Rows(kind=kind, bad=5))
    assert result.errors.column("sample_id").to_pylist() == ["s05"]
    assert len(result) == 11


def test_levels_that_differ_in_the_seventh_digit_have_columns_of_their_own(tmp_path: Path) -> None:
    model = network()
    dual = fastpie.DualModel(model, fastpie.prune(model, [0.5000001, 0.5000002]))
    table = fastpie.mine(dual, Rows(), tmp_path, progress=False).table
    assert {"js@0.5000001", "js@0.5000002"} <= set(table.column_names)


def test_the_record_says_whether_the_masks_were_made_from_these_weights(tmp_path: Path) -> None:
    model = network()
    masks = fastpie.prune(model, 0.5)
    for number, expected in enumerate((True, False)):
        out = tmp_path / str(number)
        result = fastpie.mine(fastpie.DualModel(model, masks), Rows(), out, progress=False)
        assert result.record["masks_of_these_weights"] is expected
        with torch.no_grad():
            model[0].weight.mul_(2)


def test_parts_hold_no_more_than_their_share_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_PART_BYTES", 1)
    result = mined(tmp_path, keep_logits=True)
    assert json.loads((tmp_path / "run.json").read_text())["batches_per_part"] == 1
    assert len(list((tmp_path / "logits").iterdir())) == 3
    assert [len(x) for x in result.logits()] == [12, 4]


def test_pie_takes_the_folder_of_a_run(tmp_path: Path) -> None:
    result = mined(tmp_path, keep_logits=True)
    assert fastpie.pie(str(tmp_path), fraction=0.5) == fastpie.pie(result, fraction=0.5)
    with pytest.raises(fastpie.FastpieError, match="a run"):
        fastpie.pie(7)  # type: ignore[arg-type]
