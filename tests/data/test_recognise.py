"""What format="auto" tells apart, and what it says where it cannot."""

import os

import pytest

from fastpie import FastpieError
from fastpie.data import read_manifest


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"image")
    return folder


def test_an_image_folder_with_medical_files(tmp_path):
    folder = images(
        tmp_path, "b/1.dcm", "b/deep/2.NII.GZ", "a/3.png", "a/4.nii", "a/notes.txt", "a/.hidden/5.png",
        "top.png", "a/._3.png",
    )  # fmt: skip
    manifest = read_manifest(folder)
    assert manifest.sample_ids == ["a/3.png", "a/4.nii", "b/1.dcm", "b/deep/2.NII.GZ"]
    assert manifest.table["label"].to_pylist() == [0, 0, 1, 1]
    assert (manifest.task, manifest.class_names) == ("multiclass", ["a", "b"])
    assert read_manifest(folder, class_names=["b", "c", "a"]).table["label"].to_pylist() == [
        2,
        2,
        0,
        0,
    ]
    with pytest.raises(FastpieError, match="among the classes"):
        read_manifest(folder, class_names=["a"])


def test_a_folder_of_images_alone_has_no_labels(tmp_path):
    manifest = read_manifest(images(tmp_path, "2.png", "1.dcm"))
    assert manifest.sample_ids == ["1.dcm", "2.png"]
    assert (manifest.task, manifest.table.column_names) == (None, ["sample_id", "path"])


def test_linked_folders_are_followed_where_paths_may_leave(tmp_path):
    images(tmp_path / "store", "x.png")
    images(tmp_path / "data", "a/y.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "store")
    (tmp_path / "data/a/circle").symlink_to(tmp_path / "data")
    assert read_manifest(tmp_path / "data").sample_ids == ["a/y.png"]
    followed = read_manifest(tmp_path / "data", allow_outside=True)
    assert followed.sample_ids == ["a/y.png", "b/x.png"]  # nothing twice, and no endless walk


def test_names_of_files_in_another_encoding(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    os.close(os.open(bytes(folder) + b"/\xff.png", os.O_CREAT))
    with pytest.raises(FastpieError, match="UTF-8"):
        read_manifest(tmp_path)


def test_labels_make_a_file_a_table(tmp_path):
    header = "dicom_id,path,subject_id,Pneumoperitoneum,Pneumomediastinum,Subcutaneous Emphysema,Tortuous Aorta"
    source = tmp_path / "data.csv"
    source.write_text(f"{header}\nd,x.jpg,s,0,1,0,0\n")
    assert read_manifest(source).sample_ids == ["d"]
    assert read_manifest(source, labels="Tortuous Aorta").sample_ids == ["x.jpg"]
    assert read_manifest(source, format="table").sample_ids == ["x.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "file,label\nx.png,1\n", {}, r"'path' of paths in .*'nih'.*\['file', 'label'\]"),
        ("a.csv", "path\nx.png\n", {"format": "nih"}, r"columns \['Image Index'"),
        ("a.csv", "path\nx.png\n", {"format": "csv"}, "'auto' or of"),
        ("a.csv", "path\nx.png\n", {"task": "binary"}, "'multiclass' or 'multilabel'"),
        ("a.csv", "path\nx.png\n", {"uncertain": "u_ones"}, "'table', but got"),
        ("a.csv", "path\nx.png\n", {"class_names": ["a", "a"]}, "distinct"),
    ],
)
def test_what_was_seen_is_said(tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FastpieError, match=message):
        read_manifest(tmp_path / name, **options)


@pytest.mark.parametrize("source", [3, None, {"path": ["x.png"]}])
def test_what_is_no_source(source):
    with pytest.raises(FastpieError, match="path of a manifest"):
        read_manifest(source)


@pytest.mark.parametrize(
    "format", ["nih", "cxr-lt", "isic", "webdataset", "chexpert", "huggingface"]
)
def test_a_format_that_is_not_there(tmp_path, format):
    options = {"uncertain": "u_ones"} if format == "chexpert" else {}
    with pytest.raises(FastpieError, match="Expected"):
        read_manifest(tmp_path, format=format, **options)
    (tmp_path / "data.csv").write_text("path\nx.png\n")
    with pytest.raises(FastpieError, match="Expected"):
        read_manifest(tmp_path / "data.csv", format=format, **options)
