"""Hugging Face data sets, in memory and saved."""

import io
import math
import pickle

import pytest
from PIL import Image as Pillow

from fastpie import FastpieError
from fastpie.data import Manifest, read_manifest

datasets = pytest.importorskip("datasets")


def png(value):
    buffer = io.BytesIO()
    Pillow.new("L", (3, 2), value).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def make(count=6, **columns):
    names = ["edema", "mass", "none"]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    features.update({n: datasets.Value("string") for n in columns})
    rows = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)],
        "label": [i % 3 for i in range(count)],
        **columns,
    }
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def test_a_data_set_in_memory():
    data = make(patient=[f"p{i // 2}" for i in range(6)], sex=list("FMFMFM"))
    manifest = read_manifest(data, group="patient")
    assert (manifest.task, manifest.class_names) == ("multiclass", ["edema", "mass", "none"])
    table = manifest.table.to_pydict()
    assert table["label"] == [0, 1, 2, 0, 1, 2]
    assert table["group"] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert table["sex"] == list("FMFMFM")
    assert "image" not in table
    assert [manifest.files.open(p) for p in table["path"]] == [png(i) for i in range(6)]
    stamps = {manifest.files.stamp(p) for p in table["path"]}
    assert len(stamps) == 6
    assert read_manifest(data, class_names=["none", "mass", "edema"]).table[
        "label"
    ].to_pylist() == ([2, 1, 0, 2, 1, 0])
    with pytest.raises(FastpieError, match="in any order"):
        read_manifest(data, class_names=["none", "mass"])
    with pytest.raises(FastpieError, match="save_to_disk"):
        manifest.save("nowhere.parquet")


def test_rows_of_a_shuffled_and_formatted_data_set():
    data = make(10).shuffle(seed=1).select(range(4)).with_format("torch")
    manifest = read_manifest(data)
    originals = list(data.with_format(None).cast_column("image", datasets.Image(decode=False)))
    for row, original in zip(manifest.table.to_pylist(), originals, strict=True):
        assert manifest.files.open(row["path"]) == original["image"]["bytes"]
        assert row["label"] == original["label"]
    assert pickle.loads(pickle.dumps(manifest.files)).open("2") == manifest.files.open("2")


def test_a_saved_data_set_with_splits(tmp_path):
    parts = datasets.DatasetDict(train=make(4), test=make(2, sample_id=["7", "8"]))
    parts["train"] = parts["train"].add_column("sample_id", ["1", "2", "3", "4"])
    parts.save_to_disk(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    table = manifest.table.to_pydict()
    assert table["sample_id"] == ["1", "2", "3", "4", "7", "8"]
    assert table["split"] == ["train"] * 4 + ["test"] * 2
    assert table["path"][-1] == "test::1"
    manifest.subset("test").save(tmp_path / "saved.parquet")
    loaded = Manifest.load(tmp_path / "saved.parquet")
    assert [loaded.files.open(p) for p in loaded.table["path"].to_pylist()] == [png(0), png(1)]
    assert loaded.files.name("test::1") == f"{tmp_path}/data::test::1"
    assert loaded.files.stamp("test::1") == manifest.files.stamp("test::1")
    for bad in ("test::2", "val::0", "x", "-1"):
        with pytest.raises(FastpieError, match="row"):
            loaded.files.open(bad)


def test_several_labels_an_image():
    labels = datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))
    features = datasets.Features(image=datasets.Image(), findings=labels)
    rows = [{"bytes": png(i), "path": None} for i in range(3)]
    data = datasets.Dataset.from_dict({"image": rows, "findings": [[0, 2], [], None]}, features)
    manifest = read_manifest(data)
    values = manifest.table["label"].to_pylist()
    assert (manifest.task, manifest.class_names) == ("multilabel", ["a", "b", "c"])
    assert values[:2] == [[1, 0, 1], [0, 0, 0]]
    assert all(map(math.isnan, values[2]))


def test_one_of_two_columns_of_images():
    data = make(2)
    data = data.add_column("mask", [{"bytes": png(7), "path": None}] * 2)
    data = data.cast_column("mask", datasets.Image())
    with pytest.raises(FastpieError, match=r"got \['image', 'mask'\]"):
        read_manifest(data)
    manifest = read_manifest(data, path_column="mask")
    assert manifest.table.column_names == ["sample_id", "path", "label"]
    assert manifest.files.open("1") == png(7)


def test_files_that_rows_name_stay_below_the_root(tmp_path):
    for folder in ("data", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(png(9))
    names = [str(tmp_path / "data/x.png"), str(tmp_path / "other/x.png")]
    data = datasets.Dataset.from_dict({"image": names}).cast_column("image", datasets.Image())
    with pytest.raises(FastpieError, match="`root`"):
        read_manifest(data).files.open("0")
    files = read_manifest(data, root=tmp_path / "data").files
    assert files.open("0") == tmp_path / "data/x.png"
    stamp = files.stamp("0")
    (tmp_path / "data/x.png").write_bytes(png(1) + b"more")
    assert files.stamp("0") != stamp
    with pytest.raises(FastpieError, match="allow_outside"):
        files.open("1")
    assert read_manifest(data, allow_outside=True).files.open("1") == tmp_path / "other/x.png"


def test_a_data_set_without_images_and_one_that_streams():
    with pytest.raises(FastpieError, match="one column of images"):
        read_manifest(datasets.Dataset.from_dict({"x": [1]}))
    with pytest.raises(FastpieError, match="streaming"):
        read_manifest(make().to_iterable_dataset())
