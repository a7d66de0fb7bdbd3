"""ChestX-ray14 as the NIH hands it out."""

import numpy as np
import pytest

from fastpie import FastpieError
from fastpie.data import read_manifest

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,{sex},View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
ROWS = [  # the first three as they are in the file, then its oddities
    "00000001_000.png,Cardiomegaly,0,1,{a}58{y},M,PA,2682,2749,0.14300000000000002,0.14300000000000002,",
    "00000001_001.png,Cardiomegaly|Emphysema,1,1,058Y,M,PA,2894,2729,0.143,0.143,",
    "00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171,",
    "00005567_000.png,Effusion|Pneumonia,0,5567,412,F,AP,3056,2544,0.139,0.139,",
    "00013670_151.png,Pleural_Thickening|Hernia,1,13670,006M,F,PA,2992,2991,0.143,0.143,",
    "00020900_002.png,,2,20900,411Y,,AP,3056,2544,0.139,0.139,",
]


@pytest.fixture
def folder(tmp_path):
    for i, row in enumerate(ROWS[:5]):
        images = tmp_path / f"images_{i // 2 + 1:03d}/images"
        images.mkdir(parents=True, exist_ok=True)
        (images / row.partition(",")[0]).write_bytes(b"png")
    return tmp_path


def write(folder, sex="Patient Gender", name="Data_Entry_2017.csv", rows=ROWS):
    text = "\n".join([HEADER.format(sex=sex), *rows]).format(a="", y="") + "\n"
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("sex", "name"),
    [("Patient Gender", "Data_Entry_2017.csv"), ("Patient Sex", "Data_Entry_2017_v2020.csv")],
)
def test_the_file_as_it_is(folder, sex, name):
    source = write(folder, sex, name)
    for manifest in (
        read_manifest(source),
        read_manifest(folder),
        read_manifest(source, format="nih"),
    ):
        table = manifest.table.to_pydict()
        assert manifest.task == "multilabel"
        assert manifest.class_names[:2] + manifest.class_names[-2:] == [
            "Atelectasis", "Cardiomegaly", "Pleural_Thickening", "Hernia",
        ]  # fmt: skip
        assert len(manifest.class_names) == 14
        found = [
            {manifest.class_names[i] for i in np.flatnonzero(row)} for row in table["label"][:5]
        ]
        assert found == [
            {"Cardiomegaly"}, {"Cardiomegaly", "Emphysema"}, set(), {"Effusion", "Pneumonia"},
            {"Pleural_Thickening", "Hernia"},
        ]  # fmt: skip
        assert np.isnan(table["label"][5]).all()  # an empty cell is unknown, not healthy
        assert table["group"] == ["1", "1", "2", "5567", "13670", "20900"]
        assert table["age"] == [58, 58, 81, None, 0.5, None]
        assert table["sex"] == ["M", "M", "M", "F", "F", None]
        assert table["view"] == ["PA", "PA", "PA", "AP", "PA", "AP"]
        assert "split" not in table
        assert table["OriginalImage[Width"][0] == "2682"
        assert table["sample_id"][0] == "00000001_000.png"
        assert table["path"][:3] == [
            "images_001/images/00000001_000.png",
            "images_001/images/00000001_001.png",
            "images_002/images/00000002_000.png",
        ]
        assert all(manifest.files.open(p).is_file() for p in table["path"][:5])
        assert table["path"][5] == "00020900_002.png"  # not there; fails when it is read


def test_the_lists_give_the_split(folder):
    source = write(folder)
    (folder / "train_val_list.txt").write_text("00000001_000.png\r\n00000001_001.png\r\n")
    (folder / "test_list.txt").write_text("00000002_000.png\n00005567_000.png\n00013670_151.png")
    manifest = read_manifest(source)
    assert manifest.table["split"].to_pylist() == ["train_val"] * 2 + ["test"] * 3 + [None]
    assert len(manifest.subset("test")) == 3
    (folder / "test_list.txt").write_text("00000001_001.png\n")
    with pytest.raises(FastpieError, match="1 are in both"):
        read_manifest(source)
    (folder / "train_val_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(FastpieError, match=r"1 are in several: 1 \(test, train_val\)"):
        read_manifest(source)


def test_the_order_of_classes_can_be_another(folder):
    source = write(folder)
    names = read_manifest(source).class_names[::-1]
    manifest = read_manifest(source, class_names=names)
    assert manifest.class_names == names
    assert manifest.table["label"][0].as_py()[names.index("Cardiomegaly")] == 1
    with pytest.raises(FastpieError, match=r"lacks \['Hernia'\]"):
        read_manifest(source, class_names=names[1:])


def test_unknown_findings_are_named(folder):
    rows = [ROWS[0].replace("Cardiomegaly", "Cardiomegaly|Cardiomegalie")]
    with pytest.raises(FastpieError, match="Cardiomegalie"):
        read_manifest(write(folder, rows=rows))


def test_two_images_of_one_name_are_refused(folder):
    (folder / "small").mkdir()
    (folder / "small/00000001_000.png").write_bytes(b"png")
    source = write(folder)
    with pytest.raises(FastpieError, match="`root`"):
        read_manifest(source)
    assert (
        read_manifest(source, root=folder / "small").table["path"][0].as_py() == "00000001_000.png"
    )


def test_options_that_mean_nothing_here_are_refused(folder):
    with pytest.raises(FastpieError, match=r"'nih', but got \['uncertain'\]"):
        read_manifest(write(folder), uncertain="u_ones")
    with pytest.raises(FastpieError, match="multilabel"):
        read_manifest(write(folder), task="multiclass")
