"""NIH-CXR-LT and MIMIC-CXR-LT label files, with the columns that they have."""

import pytest

from fastpie import FastpieError
from fastpie.data import read_manifest

NIH = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Effusion,Emphysema,Fibrosis,Hernia,Infiltration,Mass,"
    "Nodule,{thickening},Pneumonia,Pneumothorax,Pneumoperitoneum,Pneumomediastinum,"
    "Subcutaneous Emphysema,Tortuous Aorta,Calcification of the Aorta,No Finding"
)
MIMIC = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices,"
    "Pneumoperitoneum,Pneumomediastinum,Subcutaneous Emphysema,Tortuous Aorta,Calcification of the Aorta"
)


def one_hot(*places, count=20):
    return ",".join("1" if i in places else "0" for i in range(count))


def nih(path, rows, patient="subj_id", thickening="Pleural Thickening"):
    header = f"id,{NIH},{patient}".format(thickening=thickening)
    lines = [f"{image},{one_hot(*places)},{image[:8]}" for image, *places in rows]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


@pytest.fixture
def multilabel(tmp_path):
    stem = "miccai2023_nih-cxr-lt_labels"
    nih(tmp_path / f"{stem}_train.csv", [("00000001_000.png", 1), ("00000001_001.png", 1, 5)])
    nih(tmp_path / f"{stem}_val.csv", [("00000003_000.png", 7)])
    nih(tmp_path / f"{stem}_test.csv", [("00000042_000.png", 19)])
    (tmp_path / "images").mkdir()
    (tmp_path / "images/00000001_001.png").write_bytes(b"png")
    return tmp_path


def test_multilabel_file_and_folder(multilabel):
    manifest = read_manifest(multilabel / "miccai2023_nih-cxr-lt_labels_train.csv")
    assert manifest.task == "multilabel"
    assert manifest.class_names == NIH.format(thickening="Pleural Thickening").split(",")
    assert manifest.table["label"].to_pylist() == [
        [float(i == 1) for i in range(20)],
        [float(i in (1, 5)) for i in range(20)],
    ]
    assert manifest.table["group"].to_pylist() == ["00000001", "00000001"]
    assert manifest.table["path"].to_pylist() == ["00000001_000.png", "images/00000001_001.png"]
    whole = read_manifest(multilabel)
    assert whole.splits == ["test", "train", "val"]
    assert whole.subset("test").sample_ids == ["00000042_000.png"]
    assert whole.subset("train").sample_ids == manifest.sample_ids


def test_a_patient_in_two_files_is_leakage(multilabel):
    nih(multilabel / "miccai2023_nih-cxr-lt_labels_test.csv", [("00000003_001.png", 0)])
    with pytest.raises(FastpieError, match=r"00000003 \(test, val\)"):
        read_manifest(multilabel)


@pytest.fixture
def single_label(tmp_path):
    stem = "nih-cxr-lt_single-label"
    old = {"patient": "subject_id", "thickening": "Pleural_Thickening"}
    nih(tmp_path / f"{stem}_train.csv", [("00000001_000.png", 1), ("00000001_001.png", 19)], **old)
    nih(tmp_path / f"{stem}_balanced-val.csv", [("00003109_004.png", 0)], **old)
    test = [("00000032_000.png", 11), ("00000032_001.png", 2)]
    nih(tmp_path / f"{stem}_test.csv", test, **old)
    nih(tmp_path / f"{stem}_balanced-test.csv", test[1:], **old)
    return tmp_path


def test_single_label_file_and_folder(single_label):
    manifest = read_manifest(single_label / "nih-cxr-lt_single-label_balanced-test.csv")
    assert manifest.task == "multiclass"
    assert manifest.table["label"].to_pylist() == [2]
    assert manifest.splits == ["test"]
    assert manifest.class_names[11] == "Pleural_Thickening"
    # The balanced test set is a part of the test set: its images come once.
    manifest = read_manifest(single_label)
    assert manifest.table["label"].to_pylist() == [0, 11, 2, 1, 19]
    assert manifest.table["split"].to_pylist() == ["val", "test", "test", "train", "train"]
    assert manifest.table["balanced"].to_pylist() == [False, False, True, False, False]
    names = manifest.class_names[::-1]
    manifest = read_manifest(single_label, class_names=names)
    assert manifest.table["label"].to_pylist() == [19, 8, 17, 18, 0]
    assert read_manifest(single_label, task="multilabel").task == "multilabel"


def test_two_classes_in_a_single_label_file(single_label):
    nih(
        single_label / "nih-cxr-lt_single-label_train.csv",
        [("a.png", 1), ("b.png", 1, 2)],
        "subject_id",
    )
    with pytest.raises(FastpieError, match="row 2 has 2"):
        read_manifest(single_label / "nih-cxr-lt_single-label_train.csv")


@pytest.mark.parametrize(
    ("name", "task", "label"),
    [
        ("mimic-cxr-lt_single-label_balanced-val.csv", "multiclass", 0),
        ("miccai2023_mimic-cxr-lt_labels_val.csv", "multilabel", [1.0] + [0.0] * 18),
    ],
)
def test_mimic(tmp_path, name, task, label):
    image = "12dbbf3b-fad94744-7f9a37f6-524dc2cf-8a14f471"
    path = f"files/p15/p15479539/s50984563/{image}.jpg"
    row = f"15479539,50984563,{image},{path},{one_hot(0, count=19)}"
    (tmp_path / name).write_text(f"subject_id,study_id,dicom_id,path,{MIMIC}\n{row}\n")
    manifest = read_manifest(tmp_path / name, root=tmp_path)
    table = manifest.table.to_pydict()
    assert (manifest.task, manifest.class_names) == (task, MIMIC.split(","))
    assert (table["sample_id"], table["path"], table["label"]) == ([image], [path], [label])
    assert (table["group"], table["split"], table["study_id"]) == (
        ["15479539"],
        ["val"],
        ["50984563"],
    )


def test_files_of_several_data_sets_are_not_joined(single_label, multilabel):
    assert single_label == multilabel
    with pytest.raises(FastpieError, match="of one data set"):
        read_manifest(single_label)
