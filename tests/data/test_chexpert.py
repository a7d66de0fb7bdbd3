"""CheXpert's train.csv and valid.csv."""

import numpy as np
import pytest

from fastpie import FastpieError
from fastpie.data import read_manifest

HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,"
    "Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
    "Fracture,Support Devices"
)
SMALL = "CheXpert-v1.0-small"
TRAIN = [  # the first rows of the real file, and its patient of unknown sex
    "{0}/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
    "{0}/train/patient00002/study2/view1_frontal.jpg,Female,87,Frontal,AP,,,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,",
    "{0}/train/patient00002/study1/view2_lateral.jpg,Female,83,Lateral,,,,,1.0,,,-1.0,,,,,,1.0,",
    "{0}/train/patient64539/study1/view1_frontal.jpg,Unknown,0,Frontal,LL,,,,,,,,,,,,,,1.0",
]
VALID = [
    "{0}/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,PA,0.0,1.0,1.0,1.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / SMALL
    for name, rows in (("train.csv", TRAIN), ("valid.csv", VALID)):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join([HEADER, *(r.format(SMALL) for r in rows)]) + "\n")
    image = folder / "train/patient00001/study1/view1_frontal.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"jpeg")
    return folder


@pytest.mark.parametrize("uncertain", [None, "ones", "u_multi"])
def test_what_uncertain_means_is_a_required_choice(folder, uncertain):
    with pytest.raises(FastpieError, match=r"'u_ones', 'u_zeros' or 'u_ignore'"):
        read_manifest(folder / "train.csv", uncertain=uncertain)


@pytest.mark.parametrize(
    ("uncertain", "value"), [("u_ones", 1), ("u_zeros", 0), ("u_ignore", np.nan)]
)
def test_the_files_as_they_are(folder, uncertain, value):
    manifest = read_manifest(folder, uncertain=uncertain)
    table = manifest.table.to_pydict()
    assert (manifest.task, manifest.class_names) == ("multilabel", HEADER.split(",")[5:])
    nan = np.nan
    expected = [
        [1, nan, nan, nan, nan, nan, nan, nan, nan, 0, nan, nan, nan, 1],
        [nan, nan, value, 1, nan, value, value, nan, value, nan, value, nan, 1, nan],
        [nan, nan, nan, 1, nan, nan, value, nan, nan, nan, nan, nan, 1, nan],
        [nan] * 13 + [1],
        [0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(np.array(table["label"]), expected)
    assert table["group"][1:3] == ["patient00002"] * 2
    assert table["split"] == ["train"] * 4 + ["val"]
    assert table["sex"] == ["F", "F", "F", None, "M"]
    assert table["age"] == [68, 87, 83, 0, 73]
    assert table["view"] == ["AP", "AP", "Lateral", "LL", "PA"]
    assert table["sample_id"][0] == f"{SMALL}/train/patient00001/study1/view1_frontal.jpg"


def test_unmentioned_can_count_as_negative(folder):
    manifest = read_manifest(folder / "train.csv", uncertain="u_ignore", unmentioned="negative")
    assert np.isnan(np.array(manifest.table["label"].to_pylist())).sum() == 6
    with pytest.raises(FastpieError, match="'unknown' or 'negative'"):
        read_manifest(folder / "train.csv", uncertain="u_ones", unmentioned="zero")


def test_the_root_is_the_folder_or_the_one_above(folder):
    for root in (None, folder, folder.parent):
        manifest = read_manifest(folder / "train.csv", uncertain="u_ones", root=root)
        assert manifest.files.open(manifest.table["path"][0].as_py()).read_bytes() == b"jpeg"


def test_a_patient_in_both_files_is_leakage(folder):
    with (folder / "valid.csv").open("a") as file:
        file.write(VALID[0].format(SMALL).replace("64541", "00001") + "\n")
    with pytest.raises(FastpieError, match=r"patient00001 \(train, val\)"):
        read_manifest(folder, uncertain="u_ones")
