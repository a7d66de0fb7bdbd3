"""Runs made by the real `mine` as FiftyOne data sets: FiftyOne's own where it and a database are there.

Else a stand-in with what `to_fiftyone` uses, as strict as FiftyOne about names and types of fields.
"""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

import fastpie
from fastpie import FastpieError
from fastpie.analysis import Analysis
from fastpie.integrations.fiftyone import to_fiftyone

COUNT, CLASSES = 30, 3


class Label:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class StandInSample:
    def __init__(self, filepath, tags=(), **fields):
        for name in fields:
            if "." in name or "@" in name or name.startswith(("$", "_")) or name == "id":
                raise ValueError(f"invalid field name {name!r}")
        self.fields = {"filepath": str(Path(filepath).absolute()), "tags": list(tags), **fields}

    def __getitem__(self, name):
        return self.fields.get(name)


class StandInDataset:
    made: dict = {}  # noqa: RUF012

    def __init__(self, name=None):
        self.name = name or f"made-up-{len(self.made)}"
        self.made[self.name] = self
        self.samples, self.views, self.info, self.types = [], {}, {}, {}

    def save(self):
        pass

    def add_samples(self, samples, progress=None):
        for sample in samples:
            for name, value in sample.fields.items():
                if self.types.setdefault(name, type(value)) is not type(value):
                    raise TypeError(f"{name} is {self.types[name]}, but got {value!r}")
            self.samples.append(sample)

    def has_field(self, name):
        return name in self.types

    def sort_by(self, field, reverse=False):
        present = [s for s in self.samples if s[field] is not None]
        return sorted(present, key=lambda s: s[field], reverse=reverse)

    def save_view(self, name, view):
        self.views[name] = view

    def list_saved_views(self):
        return list(self.views)

    def load_saved_view(self, name):
        return self.views[name]

    def __iter__(self):
        return iter(self.samples)

    def __len__(self):
        return len(self.samples)

    def delete(self):
        del self.made[self.name]


def stand_in():
    module = types.ModuleType("fiftyone")
    module.Dataset, module.Sample = StandInDataset, StandInSample
    module.Classification = module.Classifications = Label
    module.dataset_exists = StandInDataset.made.__contains__
    module.list_datasets = lambda: list(StandInDataset.made)
    return module


@pytest.fixture(params=["stand-in", "real"])
def fo(request, monkeypatch):
    if request.param == "stand-in":
        StandInDataset.made.clear()
        monkeypatch.setitem(sys.modules, "fiftyone", stand_in())
        yield sys.modules["fiftyone"]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("fiftyone")
        try:
            before = set(module.list_datasets())
        except Exception as error:  # whatever keeps the database from starting
            pytest.skip(f"FiftyOne has no database: {error}")
        yield module
        for name in set(module.list_datasets()) - before:
            module.delete_dataset(name)


class Data(torch.utils.data.Dataset):
    class_names = ("cat", "dog", "gnu")

    def __init__(self, multilabel=False):
        self.multilabel = multilabel
        self.sample_ids = [f"s{i:02d}" for i in range(COUNT)]
        self.paths = [f"/data/{i}.png" for i in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(index))
        if self.multilabel:
            return image, torch.tensor([1.0, float(index % 2), torch.nan])
        return image, index % CLASSES


def mined(path, multilabel=False, levels=(0.3, 0.6)):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
    dual = fastpie.DualModel(net, fastpie.prune(net, levels))
    return fastpie.mine(
        dual, Data(multilabel), path, task="multilabel" if multilabel else "multiclass", batch_size=10,
        backend="reference", recalibrate=False, progress=False,
    )  # fmt: skip


def test_samples_scores_and_views(fo, tmp_path):
    run = mined(tmp_path)
    rows = {row["sample_id"]: row for row in run.table.to_pylist()}
    ids = list(rows)
    samples = pa.table({
        "sample_id": ids[::-1][1:],
        "label_in_doubt": [float(i) for i in range(COUNT - 1)],
        "pie": [i == 0 for i in range(COUNT - 1)],
        "duplicate_of": pa.array([None] * (COUNT - 2) + ["s07"], pa.string()),
    })  # fmt: skip
    made = to_fiftyone(run, Data(), Analysis(samples, {}, {}, []), "fastpie-test", hardest=0.1)
    assert made.name == "fastpie-test"
    assert len(made) == COUNT
    hard = run.select(0.1)
    for sample in made:
        row = rows[sample["sample_id"]]
        number = int(row["sample_id"][1:])
        assert sample["filepath"] == f"/data/{number}.png"
        assert sample["ground_truth"].label == Data.class_names[number % CLASSES]
        assert sample["prediction_dense"].label == Data.class_names[row["prediction_dense"]]
        pruned = sample["prediction_pruned_0_6"].label
        assert pruned == Data.class_names[row["prediction_pruned@0.6"]]
        assert sample["js_0_6"] == row["js@0.6"]
        assert sample["hardness"] == row["hardness"]
        assert sample["label_in_doubt"] == (None if number == 29 else float(28 - number))
        tags = {"hard"} if row["sample_id"] in hard else set()
        tags |= {"flip"} if row["flip"] else set()
        tags |= {28: {"pie"}, 0: {"duplicate"}}.get(number, set())
        assert set(sample["tags"]) == tags
    assert made.list_saved_views() == ["hardest first", "label in doubt"]
    view = made.load_saved_view("hardest first")
    assert [s["sample_id"] for s in view] == run.select(1.0)
    assert next(iter(made.load_saved_view("label in doubt")))["sample_id"] == "s00"
    with pytest.raises(FastpieError, match="'fastpie-test'"):
        to_fiftyone(run, Data(), name="fastpie-test")


def test_several_labels_and_a_single_level(fo, tmp_path):
    run = mined(tmp_path, multilabel=True, levels=0.5)
    made = to_fiftyone(str(tmp_path), Data(True), class_names=["a", "b", "c"])
    for sample in made:
        odd = int(sample["sample_id"][1:]) % 2
        labels = [c.label for c in sample["ground_truth"].classifications]
        assert labels == (["a", "b"] if odd else ["a"])
    scores = {s["sample_id"]: s["js"] for s in made}
    assert scores == dict(
        zip(*(run.table[c].to_pylist() for c in ("sample_id", "js")), strict=True)
    )


def test_files_that_nobody_names(fo, tmp_path):
    run = mined(tmp_path)
    with pytest.raises(FastpieError, match=r"30 of 30 none is known. Pass `dataset`"):
        to_fiftyone(run)
    assert fo.list_datasets() == []


def test_nothing_is_left_of_one_that_failed(fo, tmp_path, monkeypatch):
    run = mined(tmp_path)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpie.integrations.fiftyone._tags", fail)
    with pytest.raises(KeyboardInterrupt):
        to_fiftyone(run, Data(), name="fastpie-test")
    assert not fo.dataset_exists("fastpie-test")


def test_without_fiftyone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(FastpieError, match=r"fastpie\[fiftyone\]"):
        to_fiftyone(mined(tmp_path), Data())
