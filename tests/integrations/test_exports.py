"""Exports of runs made by the real `mine`, read back by other libraries."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from fastpie.analysis import Analysis
from fastpie.integrations.exports import export

IDS = ["=cmd|' /C calc'!A0", "+1", "-2", "@x", 'a "quoted", one', "line\nbreak", "ü\u2028<script>"]
IDS += [f"s{i}" for i in range(20)]


class Data(torch.utils.data.Dataset):
    sample_ids = IDS
    paths = tuple(f"/data/{i}.png" for i in range(len(IDS)))

    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, 4, 4, generator=generator), index % 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    dual = fastpie.DualModel(net, fastpie.prune(net, [0.3, 0.6]))
    path = tmp_path_factory.mktemp("run")
    options = {"batch_size": 9, "backend": "reference", "recalibrate": False, "progress": False}
    return fastpie.mine(dual, Data(), path, **options)


def analysis_of(run):
    ids = run.table["sample_id"].to_pylist()[::-1][:-1]  # another order, and one is missing
    doubt = pa.array([float(i) if i else None for i in range(len(ids))])
    samples = pa.table({"sample_id": ids, "label_in_doubt": doubt, "pie": [True] * len(ids)})
    return Analysis(samples, {}, {}, [])


def test_csv(run, tmp_path):
    path = tmp_path / "hard.csv"
    assert export(run, path, fraction=0.5, dataset=Data()) == 13
    text = path.read_bytes()
    assert text.count(b"\r\n") == 14
    table = pandas.read_csv(path, keep_default_na=False)
    assert list(table.columns[:2]) == ["sample_id", "file_name"]
    ids = [i[1:] if i[0] == "'" else i for i in table.sample_id]
    assert ids == run.select(0.5)
    assert list(table.file_name) == [f"/data/{IDS.index(i)}.png" for i in ids]
    assert table.hardness.is_monotonic_decreasing
    by_id = {r["sample_id"]: r for r in run.table.to_pylist()}
    assert table["js@0.6"].tolist() == pytest.approx([by_id[i]["js@0.6"] for i in ids])


def test_csv_holds_no_formula(run, tmp_path):
    export(run, tmp_path / "all.csv", columns=["hardness"])
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["sample_id", "file_name", "hardness"]
    assert len(rows) == 1 + len(IDS)
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row[:1])
    assert {"'=cmd|' /C calc'!A0", 'a "quoted", one', "line\nbreak"} <= {row[0] for row in rows}


def test_parquet(run, tmp_path):
    export(str(run.path), tmp_path / "hard.parquet", fraction=0.3, by="js", per="label")
    table = pq.read_table(tmp_path / "hard.parquet")
    assert table["sample_id"].to_pylist() == run.select(0.3, "js", "label")
    assert table.schema.field("js").type == run.table.schema.field("js").type
    assert table["file_name"].null_count == len(table)
    assert json.loads(table.schema.metadata[b"fastpie"])["by"] == "js"


def test_json_is_a_list_of_images_as_coco_has_it(run, tmp_path):
    export(run, tmp_path / "hard.json", fraction=0.5, dataset=Data(), analysis=analysis_of(run))
    content = json.loads((tmp_path / "hard.json").read_text(), parse_constant=pytest.fail)
    assert content.keys() == {"info", "images", "categories", "annotations"}
    assert content["info"]["hardness"] == run.record["hardness"]
    images = content["images"]
    assert [image["sample_id"] for image in images] == run.select(0.5)
    ids = run.table["sample_id"].to_pylist()
    doubts = {i: float(n) if n else None for n, i in enumerate(ids[::-1][:-1])}
    for image in images:
        assert image["id"] == ids.index(image["sample_id"]) + 1
        assert image["file_name"] == f"/data/{IDS.index(image['sample_id'])}.png"
        assert image["label_in_doubt"] == doubts.get(image["sample_id"])
        assert image["pie"] is (True if image["sample_id"] in doubts else None)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_nan_and_lists(run, tmp_path, suffix, monkeypatch):
    """A run whose table has what JSON has not."""
    table = run.table
    table = table.append_column("odd", pa.array([np.nan, np.inf, None] + [0.5] * (len(table) - 3)))
    pairs = pa.array([[1.0, np.nan]] * len(table), pa.list_(pa.float32(), 2))
    table = table.append_column("pair", pairs)
    folder = tmp_path / "run"
    (folder / "scores").mkdir(parents=True)
    (folder / "run.json").write_bytes((run.path / "run.json").read_bytes())
    pq.write_table(table, folder / "scores" / "part-000000.parquet")
    path = tmp_path / f"x.{suffix}"
    monkeypatch.setattr("fastpie.integrations.exports._ROWS", 4)  # several batches
    assert export(folder, path, columns=["odd", "pair"], by="js") == len(table)
    if suffix == "json":
        images = json.loads(path.read_text(), parse_constant=pytest.fail)["images"]
        assert sorted(map(str, (i["odd"] for i in images)))[-3:] == ["None"] * 3
        assert images[0]["pair"] == [1.0, None]
    elif suffix == "csv":
        read = pandas.read_csv(path)
        assert read.odd.isna().sum() == 3
        assert read["pair"][0] == "[1.0, null]"
    else:
        assert pq.read_table(path)["pair"].type == pairs.type


def test_nothing_is_left_of_a_failed_export(run, tmp_path):
    with pytest.raises(FastpieError, match=r"'hard.xlsx'"):
        export(run, tmp_path / "hard.xlsx")
    with pytest.raises(FastpieError, match="no_such"):
        export(run, tmp_path / "hard.csv", columns=["no_such"])
    with pytest.raises(FastpieError, match="Expected to write"):
        export(run, tmp_path / "missing" / "hard.csv")
    (tmp_path / "hard.csv").write_text("old")
    with pytest.raises(FastpieError, match="names no sample ids"):
        export(run, tmp_path / "hard.csv", dataset=[1, 2])
    assert [p.name for p in tmp_path.iterdir()] == ["hard.csv"]
    assert (tmp_path / "hard.csv").read_text() == "old"
    assert export(run, tmp_path / "none.json", fraction=0) == 0
    assert json.loads((tmp_path / "none.json").read_text())["images"] == []
